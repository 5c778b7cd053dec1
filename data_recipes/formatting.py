"""From conversations to model inputs: templates, assistant masks, padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import Image
from torch import Tensor

from prunetune.data_recipes.chat_templates import check_marks, template_text
from prunetune.data_recipes.images import ImageOpener, pad_to_square
from prunetune.data_recipes.sample import DataError, Sample
from prunetune.data_recipes.videos import Clip
from prunetune.reading import one_line

IGNORE_INDEX = -100


class Formatter:
    """Turns samples into batches for one model.

    Args:
        processor: the model's Hugging Face processor.
        images: opens the samples' pictures and videos.
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
        rows; ``PrunedModel.prepare`` takes both. With videos, ``video_seconds`` says how long each is, if known. Of a
        processor that takes a suffix (PaliGemma's) the answer is the suffix, and the template writes the prompt alone.

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
        conversations = []
        of_samples: list[tuple[Sample, Clip]] = []
        for sample in samples:
            opened = None if sample.image is None else self._open(sample)
            conversations.append(_messages(sample, opened))
            if isinstance(opened, Clip):
                of_samples.append((sample, opened))
        clips = [clip for _, clip in of_samples]
        settings: dict[str, Any] = {"padding": True, "padding_side": padding_side}
        if clips:
            # The frames are chosen here, for all models alike; the processor is told which they are.
            settings |= {"do_sample_frames": False, "video_metadata": [_metadata(clip) for clip in clips]}
        if self.takes_suffix:
            answered = bool(options.pop("return_assistant_tokens_mask", False))
            batch = self._prefixes_and_suffixes(samples, conversations, padding_side, answered)
        else:
            with readable_template(), stackable(of_samples, type(self.processor).__name__):
                encoded = self.processor.apply_chat_template(
                    conversations,
                    chat_template=self.template,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs=settings,
                    **options,
                )
            batch = dict(encoded)
        batch["sample_ids"] = [sample.id for sample in samples]  # for messages; the plug takes them out
        seconds = [clip.seconds for clip in clips if clip.seconds is not None]
        if clips and len(seconds) == len(clips):
            batch["video_seconds"] = seconds  # for budgets; a list, which no dtype rounds
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

    def _open(self, sample: Sample) -> Image.Image | Clip:
        opened = self.images.open(str(sample.image), sample.id)
        if isinstance(opened, Clip) and getattr(self.processor, "video_processor", None) is None:
            raise DataError(
                f"sample {sample.id!r} is about a video, and {type(self.processor).__name__} takes no videos; choose a "
                "model that does, or leave such samples out"
            )
        if self.square == "pad":
            mean = self.processor.image_processor.image_mean
            color = tuple(int(255 * part) for part in mean)
            if isinstance(opened, Clip):
                frames = tuple(pad_to_square(frame, color) for frame in opened.frames)  # type: ignore[arg-type]
                return replace(opened, frames=frames)
            opened = pad_to_square(opened, color)  # type: ignore[arg-type]
        return opened

    def _truncate(self, batch: dict[str, Tensor], samples: Sequence[Sample]) -> None:
        limit = self.max_length
        assert limit is not None
        tokens = []
        for name in ("image_token_id", "video_token_id"):
            tokens.append(getattr(self.processor, name, None))
        for row, sample in enumerate(samples):
            beyond = batch["input_ids"][row, limit:]
            if any(token is not None and bool((beyond == token).any()) for token in tokens):
                raise DataError(
                    f"sample {sample.id!r}: max_length={limit} would cut its picture apart; raise train.max_length"
                )
        shape = batch["input_ids"].shape
        for name, values in batch.items():
            if isinstance(values, Tensor) and values.shape == shape:
                batch[name] = values[:, :limit]


def _messages(sample: Sample, opened: Image.Image | Clip | None) -> list[dict[str, Any]]:
    """Return a sample's conversation as chat templates read it."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(sample.turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
        if number == 0 and isinstance(opened, Clip):
            frames = np.stack([np.asarray(frame) for frame in opened.frames])  # (F, height, width, 3)
            content.insert(0, {"type": "video", "video": frames})
        elif number == 0 and opened is not None:
            content.insert(0, {"type": "image", "image": opened})
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def _metadata(clip: Clip) -> dict[str, Any]:
    """Return which frames these are as video processors read it: some write times into the text or the positions."""
    return {
        "total_num_frames": clip.total,
        "fps": clip.rate,
        "duration": clip.seconds,
        "frames_indices": list(clip.indices),
    }


@contextmanager
def readable_template() -> Iterator[None]:
    """Raise DataError for a chat template that is no Jinja, or asks for what a conversation does not have."""
    try:
        yield
    except TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise DataError(f"the chat template can't be used{line}: {one_line(error)}; see model.template") from error


@contextmanager
def stackable(clips: Sequence[tuple[Sample, Clip]], processor: str) -> Iterator[None]:
    """Raise DataError for clips that a processor can't put into one tensor, since they differ in their frames.

    Some processors take them and some do not, so it is said where one fails.
    """
    try:
        yield
    except ValueError as error:
        numbers = [len(clip.frames) for _, clip in clips]
        if len(set(numbers)) < 2:
            raise
        shortest, longest = numbers.index(min(numbers)), numbers.index(max(numbers))
        short, long = clips[shortest][0].id, clips[longest][0].id
        raise DataError(
            f"samples {short!r} and {long!r} are in one batch with {min(numbers)} and {max(numbers)} frames, and "
            f"{processor} takes only clips of equally many; set batch_size (train.batch_size) to 1, or video.frames to "
            "at most those of the shortest video"
        ) from error


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
