"""From conversations to model inputs: templates, assistant masks, padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import Image
from torch import Tensor

from prunetune.data_recipes.chat_templates import V1, check_marks, template_text
from prunetune.data_recipes.images import HERE, Album, Counted, Dialogue, ImageOpener
from prunetune.data_recipes.pixels import PIXELS, Pictures, look_up, mean_color
from prunetune.data_recipes.sample import DataError, Sample
from prunetune.data_recipes.segments import MODELS_TOKENS, Row, Segments, Tokens, first_difference, segments_of
from prunetune.data_recipes.templated import for_text_alone, with_fast_masks
from prunetune.data_recipes.videos import VIDEO, Clip, squared
from prunetune.reading import one_line

IGNORE_INDEX = -100
COMPARED = 64
"""Samples of each kind whose segments are compared with the template, by every formatter."""
SUPERVISED = 1_000
"""Samples built by segments whose supervised text is read back, by every formatter: 0.13 ms each."""
PLACE = object()
"""Stands for a picture that is not opened."""


class Formatter:
    """Turns samples into batches for one model.

    Text and pictures take the fast way where it gives the very same batch, and the processor's own everywhere else:
    LLaVA's v1 prompt with a tokenizer of Llama's kind is built by segments (:mod:`prunetune.data_recipes.segments`),
    and pictures padded to squares for a processor of CLIP's kind are resized in two passes
    (:mod:`prunetune.data_recipes.pixels`).

    Args:
        processor: the model's Hugging Face processor.
        images: opens the samples' pictures and videos.
        template: the chat template, see :mod:`prunetune.data_recipes.chat_templates`.
        square: "pad" pads pictures to squares of the processor's mean colour first, "processor" leaves them.
        max_length: longest sequence in tokens, None for no limit.
        instructions: a function from the user's turns to the text that pruning may read; batches then carry
            ``instructions``, one text per sample. Training and inference get it the same way, answers are left out.
        raw_pixels: leave ``pixel_values`` uint8 where the fast way is exact, a quarter of the bytes; :meth:`finish`
            makes the numbers of them.
        tokens: whose tokens LLaVA's v1 prompt has: what the loaded tokenizer makes of it ("model"), or what LLaVA's own
            code made of it in one of its modes, see :data:`prunetune.data_recipes.segments.Tokens`.

    Raises:
        DataError: if the template is unknown, or LLaVA's tokens are asked for and can't be had.
    """

    def __init__(
        self,
        processor: Any,
        images: ImageOpener,
        template: str = "model",
        square: str = "processor",
        max_length: int | None = None,
        instructions: Callable[[Sequence[str]], str] | None = None,
        raw_pixels: bool = False,
        tokens: Tokens = MODELS_TOKENS,
    ) -> None:
        self.processor = processor
        self.images = images
        self.template = template_text(processor, template)
        self.square = square
        self.max_length = max_length
        self.instructions = instructions
        self.raw_pixels = raw_pixels
        self.takes_suffix = "suffix" in inspect.signature(type(processor).__call__).parameters
        self._templated = with_fast_masks(processor)
        self._text_alone = for_text_alone(processor)
        self._tables: dict[torch.device, Tensor] = {}
        self._compared = {"training": 0, "prompt": 0}
        self._supervised = 0
        self.tokens = tokens
        if tokens != MODELS_TOKENS and self.segments is None:
            raise DataError(
                f"model.tokens {tokens} builds LLaVA's own prompts: it needs model.template {V1} and a tokenizer of "
                'Llama\'s kind (a BPE with byte fallback that writes spaces as "▁"); leave model.tokens out, or choose '
                "another model or template"
            )

    @cached_property
    def segments(self) -> Segments | None:
        """What builds rows of LLaVA's v1 prompt; None for another template, or a tokenizer of another kind."""
        if self.takes_suffix or self.template != template_text(self.processor, V1):
            return None
        return segments_of(self.processor.tokenizer, getattr(self.processor, "image_token", None), self.tokens)

    @cached_property
    def pictures(self) -> Pictures:
        """What turns pictures into the processor's inputs; tried against the processor when it is first used."""
        return Pictures(self.processor, self.square, self.segments is not None)

    def training_batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return right-padded ``input_ids``, ``attention_mask``, ``labels`` (B, L) and the picture inputs.

        What else the processor returns for every token, such as ``token_type_ids``, stays, and ``sample_ids`` name the
        rows; ``PrunedModel.prepare`` takes both. With videos, ``video_seconds`` says how long each is, if known. Of a
        processor that takes a suffix (PaliGemma's) the answer is the suffix, and the template writes the prompt alone.

        Only the assistant's answers and end tokens are supervised; every other label is -100. A sample cut so short
        that nothing supervised is left keeps its place with -100 everywhere.

        Raises:
            DataError: if the template does not mark what the assistant says, a sample's supervised text is not its
                answers with their end tokens, truncation would cut into its picture, or one of the first samples has
                other tokens by segments than by its template.
        """
        check_marks(self.template)
        batch, by_segments = self._batch(samples, "right", answered=True)
        mask = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~mask, IGNORE_INDEX)
        for row, sample in enumerate(samples):
            if by_segments[row]:
                self._supervised += 1
                if self._supervised > SUPERVISED:
                    continue
            check_supervision(self.processor.tokenizer, batch["input_ids"][row], mask[row], sample)
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            self._truncate(batch, samples)
        return batch

    def prompt_batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return left-padded prompts that end where the answer to each sample's last question begins."""
        return self._batch(samples, "left", answered=False)[0]

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch whose uint8 pixels have become the processor's numbers, on the device where they are.

        They are looked up in a table that the processor computed: float32, bit for bit what it would have returned. A
        batch without uint8 pixels is returned as it is.
        """
        pixels = batch.get(PIXELS)
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or self.pictures.fast is None:
            return batch
        if pixels.device not in self._tables:
            self._tables[pixels.device] = torch.from_numpy(self.pictures.fast.table).to(pixels.device)
        return {**batch, PIXELS: look_up(self._tables[pixels.device], pixels)}

    def _batch(
        self, samples: Sequence[Sample], padding_side: str, answered: bool
    ) -> tuple[dict[str, Any], Sequence[bool]]:
        """Return a batch, and which of its rows were built by segments."""
        opened = [None if sample.image is None else self._open(sample) for sample in samples]
        of_samples = [(s, clip) for s, clip in zip(samples, opened, strict=True) if isinstance(clip, Clip)]
        by_segments: Sequence[bool] = [False] * len(samples)
        built = None if of_samples else self._by_rows(samples, opened, padding_side, answered)
        if built is None and self.tokens != MODELS_TOKENS:
            raise DataError(
                f"samples {samples[0].id!r} to {samples[-1].id!r}: model.tokens {self.tokens} builds LLaVA's prompts, "
                "of text with at most one picture, and here is a video, or a picture with text of its own around it; "
                "set model.tokens to model"
            )
        if built is None:
            opened = [image.blank() if isinstance(image, Counted) else image for image in opened]
        if built is not None:
            batch, by_segments = built
        elif self.takes_suffix:
            batch = self._prefixes_and_suffixes(samples, self._conversations(samples, opened), padding_side, answered)
        else:
            batch = self._by_processor(samples, opened, of_samples, padding_side, answered)
        batch["sample_ids"] = [sample.id for sample in samples]  # for messages; the plug takes them out
        seconds = [clip.seconds for _, clip in of_samples if clip.seconds is not None]
        if of_samples and len(seconds) == len(of_samples):
            batch["video_seconds"] = seconds  # for budgets; a list, which no dtype rounds
        if self.instructions is not None:
            asked = [[turn.question.replace(HERE, "") for turn in sample.turns] for sample in samples]
            batch["instructions"] = [self.instructions(questions) for questions in asked]
        return batch, by_segments

    def _by_rows(
        self, samples: Sequence[Sample], opened: Sequence[Any], padding_side: str, answered: bool
    ) -> tuple[dict[str, Any], Sequence[bool]] | None:
        """Return a batch of rows made without the processor; None where that might not be the processor's own."""
        if self.takes_suffix or not self.pictures.plain or any(isinstance(image, Album) for image in opened):
            return None
        rows, by_segments = self._rows(samples, answered)
        token = self.processor.image_token_id
        for row, sample in zip(rows, samples, strict=True):
            if row.ids.count(token) != (sample.image is not None):  # the text itself has one; the processor says so
                return None
        images = [image for image in opened if image is not None]
        batch: dict[str, Any] = {}
        if any(isinstance(image, Counted) for image in images):
            places = [image.places for image in images]  # no pixels are asked for
        else:
            batch, places = self.pictures.inputs(images, self.raw_pixels)
        of_pictures = iter(places)
        whole = []
        for row, sample in zip(rows, samples, strict=True):
            whole.append(row if sample.image is None else row.expanded(token, next(of_pictures)))
        return {**self._padded_rows(whole, padding_side, answered), **batch}, by_segments

    def _rows(self, samples: Sequence[Sample], answered: bool) -> tuple[list[Row], list[bool]]:
        """Return each sample's tokens with one place for its picture, and whether they were built by segments."""
        if self.segments is None:
            return self._template_rows(samples, answered), [False] * len(samples)
        found = self.segments.rows(samples)
        if self.tokens == MODELS_TOKENS:
            self._compare(samples, found, answered)
        left = [sample for sample, row in zip(samples, found, strict=True) if row is None]
        if left and self.tokens != MODELS_TOKENS:
            raise DataError(
                f"sample {left[0].id!r}: a turn before the last has no answer, and LLaVA's code, which model.tokens "
                f"{self.tokens} follows, writes none; set model.tokens to model"
            )
        others = iter(self._template_rows(left, answered) if left else [])
        rows = [next(others) if row is None else row for row in found]
        return rows, [row is not None for row in found]

    def _compare(self, samples: Sequence[Sample], rows: Sequence[Row | None], answered: bool) -> None:
        """Check the first samples' rows against the chat template, ids and labels.

        Raises:
            DataError: naming the first token that differs.
        """
        kind = "training" if answered else "prompt"
        room = COMPARED - self._compared[kind]
        chosen = [(sample, row) for sample, row in zip(samples, rows, strict=True) if row is not None][: max(room, 0)]
        if not chosen:
            return
        self._compared[kind] += len(chosen)
        expected = self._template_rows([sample for sample, _ in chosen], answered)
        for (sample, row), by_template in zip(chosen, expected, strict=True):
            built = row if answered else Row(row.ids, [])  # a prompt has no labels
            difference = first_difference(built, by_template, self.processor.tokenizer)
            if difference is not None:
                raise DataError(
                    f"sample {sample.id!r}, built by segments: {difference}; the tokenizer's file is not as it was "
                    "published, or of a kind that is not known: put the published files back, or please report it"
                )

    def _template_rows(self, samples: Sequence[Sample], answered: bool) -> list[Row]:
        """Return what the chat template and the tokenizer make of each sample, with one place for its picture."""
        conversations = []
        for sample in samples:
            conversations.append(conversation(sample, None if sample.image is None else PLACE))
        with readable_template():
            encoded = self._text_alone.apply_chat_template(
                conversations,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=answered,
                add_generation_prompt=not answered,
            )
        rows = []
        for number, ids in enumerate(encoded["input_ids"]):
            spans = _runs(np.asarray(encoded["assistant_masks"][number])) if answered else []
            rows.append(Row(list(ids), spans))
        return rows

    def _padded_rows(self, rows: Sequence[Row], padding_side: str, answered: bool) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask`` and, with answers, ``assistant_masks``, all (B, L)."""
        length = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), length), self.processor.tokenizer.pad_token_id, dtype=np.int64)
        attended, marked = np.zeros_like(ids), np.zeros_like(ids)
        for number, row in enumerate(rows):
            first = length - len(row.ids) if padding_side == "left" else 0
            ids[number, first : first + len(row.ids)] = row.ids
            attended[number, first : first + len(row.ids)] = 1
            for start, end in row.spans:
                marked[number, first + start : first + end] = 1
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attended)}
        return {**batch, "assistant_masks": torch.from_numpy(marked)} if answered else batch

    def _by_processor(
        self,
        samples: Sequence[Sample],
        opened: Sequence[Any],
        clips: Sequence[tuple[Sample, Clip]],
        padding_side: str,
        answered: bool,
    ) -> dict[str, Any]:
        """Return the batch that the model's own processor makes of the chat template."""
        settings: dict[str, Any] = {"padding": True, "padding_side": padding_side}
        if clips:
            # The frames are chosen here, for all models alike; the processor is told which they are.
            settings |= {"do_sample_frames": False, "video_metadata": [_metadata(clip) for _, clip in clips]}
        with readable_template(), stackable(clips, type(self.processor).__name__):
            encoded = self._templated.apply_chat_template(
                self._conversations(samples, opened),
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=answered,
                add_generation_prompt=not answered,
                processor_kwargs=settings,
            )
        return dict(encoded)

    def _conversations(self, samples: Sequence[Sample], opened: Sequence[Any]) -> list[list[dict[str, Any]]]:
        return [conversation(sample, self._squared(image)) for sample, image in zip(samples, opened, strict=True)]

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
            pictures = sum(part["type"] == "image" for part in messages[0]["content"])
            if pictures != 1 or len(sample.turns) > 1:
                raise DataError(
                    f"sample {sample.id!r}: a {type(self.processor).__name__} takes one picture with one question, got "
                    f"{['no picture', 'a picture'][pictures] if pictures < 2 else f'{pictures} pictures'} and "
                    f"{len(sample.turns)} turns; leave it out"
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

    def _open(self, sample: Sample) -> Image.Image | Album | Clip | Counted:
        opened: Image.Image | Album | Clip | Counted = self.images.open(str(sample.image), sample.id)
        if isinstance(opened, Clip) and getattr(self.processor, "video_processor", None) is None:
            raise DataError(
                f"sample {sample.id!r} is about a video, and {type(self.processor).__name__} takes no videos; choose a "
                "model that does, or leave such samples out"
            )
        return opened

    def _squared(self, opened: Image.Image | Album | Clip | None) -> Image.Image | Album | Clip | None:
        """Return a picture, or those of an album or a clip, padded to a square if that is asked for."""
        if self.square != "pad" or opened is None:
            return opened
        return squared(opened, mean_color(self.processor))

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


def conversation(sample: Sample, opened: Any) -> list[dict[str, Any]]:
    """Return a sample's conversation as chat templates read it.

    Args:
        sample: the conversation.
        opened: its picture, album or clip; ``PLACE`` for the place of one alone, None for no picture. A dialogue is the
            conversation itself.
    """
    if isinstance(opened, Dialogue):
        return opened.whole()
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(sample.turns):
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
        if number == 0 and opened is PLACE:
            content.insert(0, {"type": "video" if str(sample.image).startswith(VIDEO) else "image"})
        elif number == 0 and isinstance(opened, Album):
            content = opened.placed(turn.question)
        elif number == 0 and isinstance(opened, Clip):
            frames = np.stack([np.asarray(frame) for frame in opened.frames])  # (F, height, width, 3)
            content.insert(0, {"type": "video", "video": frames})
        elif number == 0 and opened is not None:
            content.insert(0, {"type": "image", "image": opened})
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return where a mask (L,) is not 0, as [start, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask != 0, [0]])))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


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


def supervised(labels: Tensor) -> Tensor:
    """Return which labels (B, L) a loss is made of, (B, L - 1): the first token of a row is predicted by none."""
    return labels[:, 1:] != IGNORE_INDEX


def check_supervision(tokenizer: Any, ids: Tensor, mask: Tensor, sample: Sample) -> None:
    """Check that the marked tokens of ``ids`` (L,) are the sample's answers, each followed by an end token.

    Raises:
        DataError: showing the supervised text and the answers.
    """
    answers = [turn.answer for turn in sample.turns if turn.answer is not None]
    if not answers and not bool(mask.any()):
        return  # a question alone, for objectives that read no answer
    runs = torch.tensor_split(ids[mask], ((mask.nonzero()[:, 0].diff() > 1).nonzero()[:, 0] + 1).tolist())
    ended = [len(run) > 0 and int(run[-1]) == tokenizer.eos_token_id for run in runs]
    texts = [tokenizer.decode(run[:-1] if end else run) for run, end in zip(runs, ended, strict=True)]
    if [_letters(text) for text in texts] != [_letters(answer) for answer in answers]:
        raise DataError(
            f"sample {sample.id!r}: the supervised text {texts} is not its answers {answers}; the template marks the "
            "wrong part, or the tokenizer lacks words of the answers"
        )
    if not all(ended):
        raise DataError(
            f"sample {sample.id!r}: the template does not supervise an end token after each answer, so the model would "
            "never learn to stop; set model.template to one that does, for example vicuna_v1"
        )


def _letters(text: str) -> str:
    """Return a text without its spaces; Llama's tokenizer reads one that writes a space as "▁" as a space."""
    return "".join(text.replace("▁", " ").split())
