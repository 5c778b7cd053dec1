"""From conversations to model inputs: templates, assistant masks, padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import Image
from torch import Tensor

from prunetune.data_recipes.chat_templates import check_marks, template_text
from prunetune.data_recipes.images import ImageOpener, pad_to_square
from prunetune.data_recipes.sample import DataError, Sample
from prunetune.reading import one_line

IGNORE_INDEX = -100


class Formatter:
    """Turns samples into batches for one model.

    Args:
        processor: the model's Hugging Face processor.
        images: opens the samples' pictures.
        template: the chat template, see :mod:`prunetune.data_recipes.chat_templates`.
        square: "pad" pads pictures to squares of the processor's mean colour first, "processor" leaves them.
        max_length: longest sequence in tokens, None for no limit.
        instructions: a function from the user's turns to the text that pruning may read; batches then carry
            ``instructions``, one text per sample. Training and inference get it the same way, answers are left out.

    Raises:
        DataError: if the template is unknown.
    """

    def __init__(
        self,
        processor: Any,
        images: ImageOpener,
        template: str = "model",
        square: str = "processor",
        max_length: int | None = None,
        instructions: Callable[[Sequence[str]], str] | None = None,
    ) -> None:
        self.processor = processor
        self.images = images
        self.template = template_text(processor, template)
        self.square = square
        self.max_length = max_length
        self.instructions = instructions
        self.takes_suffix = "suffix" in inspect.signature(type(processor).__call__).parameters

    def training_batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return right-padded ``input_ids``, ``attention_mask``, ``labels`` (B, L) and the picture inputs.

        What else the processor returns for every token, such as ``token_type_ids``, stays, and ``sample_ids`` name the
        rows; ``PrunedModel.prepare`` takes both. Of a processor that takes a suffix (PaliGemma's) the answer is the
        suffix, and the template writes the prompt alone.

        Only the assistant's answers and end tokens are supervised; every other label is -100. A sample cut so short
        that nothing supervised is left keeps its place with -100 everywhere.

        Raises:
            DataError: if the template does not mark what the assistant says, a sample's supervised text is not its
                answers with their end tokens, or truncation would cut into its picture.
        """
        check_marks(self.template)
        batch = self._batch(samples, "right", return_assistant_tokens_mask=True, add_generation_prompt=False)
        mask = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~mask, IGNORE_INDEX)
        for row, sample in enumerate(samples):
            check_supervision(self.processor.tokenizer, batch["input_ids"][row], mask[row], sample)
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            self._truncate(batch, samples)
        return batch

    def prompt_batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return left-padded prompts that end where the answer to each sample's last question begins."""
        return self._batch(samples, "left", add_generation_prompt=True)

    def _batch(self, samples: Sequence[Sample], padding_side: str, **options: Any) -> dict[str, Tensor]:
        conversations = [self._messages(sample) for sample in samples]
        if self.takes_suffix:
            answered = bool(options.pop("return_assistant_tokens_mask", False))
            batch = self._prefixes_and_suffixes(samples, conversations, padding_side, answered)
        else:
            with readable_template():
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
        batch["sample_ids"] = [sample.id for sample in samples]  # for messages; the plug takes them out
        if self.instructions is not None:
            batch["instructions"] = [self.instructions([turn.question for turn in s.turns]) for s in samples]
        return batch

    def _prefixes_and_suffixes(
        self,
        samples: Sequence[Sample],
        conversations: list[list[dict[str, Any]]],
        padding_side: str,
        answered: bool,
    ) -> dict[str, Any]:
        """Return the batch of a processor that puts a prompt and its answer together: 0 and 1 in ``token_type_ids``.

        A chat template can't: the processor writes between the two what the template would not know of, and only by
        the types does the model see the prompt both ways and the answer one way.
        """
        images, prompts = [], []
        for sample, messages in zip(samples, conversations, strict=True):
            if sample.image is None or len(sample.turns) > 1:
                raise DataError(
                    f"sample {sample.id!r}: a {type(self.processor).__name__} takes one picture with one question, got "
                    f"{'no' if sample.image is None else 'a'} picture and {len(sample.turns)} turns; leave it out"
                )
            images.append(messages[0]["content"][0]["image"])
            with readable_template():
                prompts.append(
                    self.processor.apply_chat_template(
                        messages[:1], chat_template=self.template, tokenize=False, add_generation_prompt=True
                    )
                )
        suffixes = [sample.turns[0].answer or "" for sample in samples] if answered else None
        encoded = self.processor(
            images=images,
            text=prompts,
            suffix=suffixes,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        batch = dict(encoded)
        batch.pop("labels", None)  # made of the types, and made again by the formatter
        if answered:
            batch["assistant_masks"] = batch["token_type_ids"].clone()
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
        shape = batch["input_ids"].shape
        for name, values in batch.items():
            if isinstance(values, Tensor) and values.shape == shape:
                batch[name] = values[:, :limit]


@contextmanager
def readable_template() -> Iterator[None]:
    """Raise DataError for a chat template that is no Jinja, or asks for what a conversation does not have."""
    try:
        yield
    except TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise DataError(f"the chat template can't be used{line}: {one_line(error)}; see model.template") from error


def check_supervision(tokenizer: Any, ids: Tensor, mask: Tensor, sample: Sample) -> None:
    """Check that the marked tokens of ``ids`` (L,) are the sample's answers, each followed by an end token.

    Raises:
        DataError: showing the supervised text and the answers.
    """
    runs = torch.tensor_split(ids[mask], ((mask.nonzero()[:, 0].diff() > 1).nonzero()[:, 0] + 1).tolist())
    answers = [turn.answer or "" for turn in sample.turns]
    ended = [len(run) > 0 and int(run[-1]) == tokenizer.eos_token_id for run in runs]
    texts = [tokenizer.decode(run[:-1] if end else run) for run, end in zip(runs, ended, strict=True)]
    if ["".join(text.split()) for text in texts] != ["".join(answer.split()) for answer in answers]:
        raise DataError(
            f"sample {sample.id!r}: the supervised text {texts} is not its answers {answers}; the template marks the "
            "wrong part, or the tokenizer lacks words of the answers"
        )
    if not all(ended):
        raise DataError(
            f"sample {sample.id!r}: the template does not supervise an end token after each answer, so the model would "
            "never learn to stop; set model.template to one that does, for example vicuna_v1"
        )
