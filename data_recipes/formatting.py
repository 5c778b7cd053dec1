"""From conversations to model inputs: templates, assistant masks, padding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_recipes.images import ImageOpener, pad_to_square
from data_recipes.sample import DataError, Sample

IGNORE_INDEX = -100
TEMPLATE_FOLDER = Path(__file__).parent / "templates"


class Formatter:
    """Turns samples into batches for one model.

    Args:
        processor: the model's Hugging Face processor.
        images: opens the samples' pictures.
        template: "model" for the processor's own chat template, or a name from ``data_recipes/templates/``.
        square: "pad" pads pictures to squares of the processor's mean colour first, "processor" leaves them.
        max_length: longest sequence in tokens, None for no limit.

    Raises:
        DataError: if the template is unknown or does not mark the assistant's text.
    """

    def __init__(
        self,
        processor: Any,
        images: ImageOpener,
        template: str = "model",
        square: str = "processor",
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.images = images
        self.template = template_text(processor, template)
        self.square = square
        self.max_length = max_length
        self.unsupervised: list[str] = []

    def training_batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return right-padded ``input_ids``, ``attention_mask``, ``labels`` (B, L) and the picture inputs.

        Only the assistant's answers and end tokens are supervised; every other label is -100. A sample cut so short
        that nothing supervised is left keeps its place without a loss and is named in ``unsupervised``.

        Raises:
            DataError: if a sample's supervised text is not its answers, or truncation would cut into its picture.
        """
        batch = self._batch(samples, "right", return_assistant_tokens_mask=True, add_generation_prompt=False)
        mask = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~mask, IGNORE_INDEX)
        for row, sample in enumerate(samples):
            if not mask[row].any():
                raise DataError(
                    f"sample {sample.id!r}: the template marked no answer token; its answers are "
                    f"{[turn.answer for turn in sample.turns]}"
                )
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            self._truncate(batch, samples)
        return batch

    def prompt_batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return left-padded prompts that end where the answer to each sample's last question begins."""
        return self._batch(samples, "left", add_generation_prompt=True)

    def _batch(self, samples: Sequence[Sample], padding_side: str, **options: Any) -> dict[str, Tensor]:
        conversations = [self._messages(sample) for sample in samples]
        encoded = self.processor.apply_chat_template(
            conversations,
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": padding_side},
            **options,
        )
        batch = dict(encoded)
        batch.pop("token_type_ids", None)
        return batch

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(sample.turns):
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
            if number == 0 and sample.image is not None:
                content.insert(0, {"type": "image", "image": self._open(sample)})
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return messages

    def _open(self, sample: Sample) -> Image.Image:
        picture = self.images.open(str(sample.image), sample.id)
        if self.square == "pad":
            mean = self.processor.image_processor.image_mean
            picture = pad_to_square(picture, tuple(int(255 * part) for part in mean))  # type: ignore[arg-type]
        return picture

    def _truncate(self, batch: dict[str, Tensor], samples: Sequence[Sample]) -> None:
        limit = self.max_length
        assert limit is not None
        image_token = getattr(self.processor, "image_token_id", None)
        for row, sample in enumerate(samples):
            beyond = batch["input_ids"][row, limit:]
            if image_token is not None and bool((beyond == image_token).any()):
                raise DataError(
                    f"sample {sample.id!r}: max_length={limit} would cut its picture apart; raise train.max_length"
                )
            if not bool((batch["labels"][row, :limit] != IGNORE_INDEX).any()):
                self.unsupervised.append(sample.id)
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = batch[name][:, :limit]


def template_text(processor: Any, template: str) -> str:
    """Return the chat template's source.

    Raises:
        DataError: for an unknown name, or a template that does not mark what the assistant says.
    """
    if template == "model":
        source = processor.chat_template
        if not source:
            raise DataError("this processor has no chat template; set model.template, for example to vicuna_v1")
        if "{% generation %}" not in source and "{%- generation" not in source:
            raise DataError(
                "the model's chat template has no {% generation %} marks around the assistant's text, so "
                "answers can't be told from questions; set model.template to a template that has them "
                f"({', '.join(sorted(p.stem for p in TEMPLATE_FOLDER.glob('*.jinja')))})"
            )
        return source
    path = TEMPLATE_FOLDER / f"{template}.jinja"
    if not path.is_file():
        raise DataError(f"unknown template {template!r}")
    return path.read_text()
