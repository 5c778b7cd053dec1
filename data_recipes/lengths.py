"""How long samples are in tokens, without opening a picture: for planning batches before the first one is built."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from prunetune.data_recipes import store
from prunetune.data_recipes.formatting import PLACE, Formatter, conversation, readable_template
from prunetune.data_recipes.recipe import RecipeData
from prunetune.data_recipes.sample import Sample, Turn, samples_of
from prunetune.data_recipes.segments import MODELS_TOKENS
from prunetune.data_recipes.videos import VIDEO

FORMAT = 1
BATCH = 1_000
"""Samples that are tokenized together."""


def text_lengths(data: RecipeData, formatter: Formatter) -> np.ndarray:
    """Return the text tokens of every training sample: int64, one per row of the recipe.

    The places of pictures and videos are not among them, nor is anything cut: both are the caller's, who knows how many
    tokens pruning leaves and what ``max_length`` is. What a processor writes around the places of one picture, such as
    Gemma 3's marks and line ends, is counted; what it writes between tiles or frames is not, since no picture is
    opened.

    The result is kept beside the Arrow cache, by the recipe's content and what tokenizes it. Of several ranks each may
    call this at once; the first makes it, or all of them do.

    Args:
        data: the recipe's samples.
        formatter: the one they are trained with.
    """
    name = f"lengths-{_key(data, formatter)}.npy"
    known = _load(name, len(data))
    if known is not None:
        return known
    lengths = np.empty(len(data), dtype=np.int64)
    around = None
    for start in range(0, len(data), BATCH):
        samples = samples_of(data.rows[start : start + BATCH])
        if around is None and any(_is_picture(sample) for sample in samples):
            around = _around_a_picture(formatter)
        found = _text_tokens(samples, formatter)
        with_picture = np.array([_is_picture(sample) for sample in samples])
        lengths[start : start + len(samples)] = found + with_picture * (around or 0)
    _keep(name, lengths)
    return lengths


def image_sizes(data: RecipeData) -> np.ndarray:
    """Return width and height of every sample's image: int64 (n, 2), zeros where there is none.

    Of a file its head alone is read, once for all samples about it. The result is kept beside the Arrow cache.

    Raises:
        DataError: naming the sample whose image can't be read.
    """
    root = getattr(data.images, "root", None)
    key = json.dumps([FORMAT, data.content_hash, type(data.images).__name__, str(root)])
    name = f"sizes-{hashlib.sha256(key.encode()).hexdigest()[:40]}.npy"
    known = _load(name, len(data), 2)
    if known is not None:
        return known
    images: Any = data.images
    has_heads = hasattr(images, "size")  # an opener of somebody else's may open alone
    found: dict[str, tuple[int, int]] = {}
    sizes = np.zeros((len(data), 2), dtype=np.int64)
    names = data.rows["id"]
    for number, reference in enumerate(data.rows["image"]):
        if reference is None or reference.startswith(VIDEO):
            continue
        if reference not in found:
            what = reference, names[number]
            found[reference] = images.size(*what) if has_heads else images.open(*what).size
        sizes[number] = found[reference]
    _keep(name, sizes)
    return sizes


def _is_picture(sample: Sample) -> bool:
    return sample.image is not None and not sample.image.startswith(VIDEO)


def _text_tokens(samples: Sequence[Sample], formatter: Formatter) -> np.ndarray:
    """Return the tokens of each sample's text as the template writes it, without its placeholder."""
    found: list[int | None] = [None] * len(samples)
    if formatter.segments is not None and formatter.pictures.plain:
        found = formatter.segments.lengths(samples)
    left = [number for number, length in enumerate(found) if length is None]
    by_template = _templated([samples[number] for number in left], formatter) if left else []
    for number, length in zip(left, by_template, strict=True):
        found[number] = length
    return np.array(found, dtype=np.int64)


def _templated(samples: Sequence[Sample], formatter: Formatter) -> list[int]:
    processor, tokenizer = formatter.processor, formatter.processor.tokenizer
    conversations = []
    for sample in samples:
        turns = sample.turns
        if formatter.takes_suffix:  # the answer is no part of what the template writes
            turns = (Turn(turns[0].question, None),)
        conversations.append(
            conversation(Sample(sample.id, sample.source, sample.image, turns), PLACE if sample.image else None)
        )
    with readable_template():
        texts = processor.apply_chat_template(
            conversations,
            chat_template=formatter.template,
            tokenize=False,
            add_generation_prompt=formatter.takes_suffix,
        )
    begun = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    encoded = tokenizer(texts, add_special_tokens=not begun, verbose=False)["input_ids"]
    places = _placeholders(processor)
    lengths = [len(ids) - sum(token in places for token in ids) for ids in encoded]
    if formatter.takes_suffix:
        ended = [f"{sample.turns[0].answer or ''}{tokenizer.eos_token}" for sample in samples]
        answers = tokenizer(ended, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = [length + len(answer) for length, answer in zip(lengths, answers, strict=True)]
    return lengths


def _placeholders(processor: Any) -> set[int]:
    """Return the tokens that stand for pictures and videos, before and after the processor has expanded them."""
    found = set()
    for name in ("image_token", "video_token", "boi_token"):
        for owner in (processor, processor.tokenizer):
            token = getattr(owner, name, None)
            if token is not None:
                found.add(processor.tokenizer.convert_tokens_to_ids(str(token)))
    return found


class _Grey:
    """Opens a picture of no content."""

    def exists(self, reference: str) -> bool:
        return True

    def open(self, reference: str, sample_id: str) -> Image.Image:
        return Image.new("RGB", (64, 64), (128, 128, 128))


def _around_a_picture(formatter: Formatter) -> int:
    """Return how many text tokens the processor writes for a picture beside its places."""
    own = copy.copy(formatter)
    own.images, own.max_length, own.raw_pixels = _Grey(), None, False
    sample = Sample("length of a picture", "custom", "grey", (Turn("a", "a"),))
    batch = own.training_batch([sample])
    places = _visual_places(formatter.processor)
    seen = [token for token in batch["input_ids"][0].tolist() if token not in places]
    return len(seen) - int(_text_tokens([sample], formatter)[0])


def _visual_places(processor: Any) -> set[int]:
    """Return the tokens whose embeddings a picture's or video's features replace."""
    found = set()
    for owner in (processor.tokenizer, processor):
        for name in ("image_token", "video_token"):
            token = getattr(owner, name, None)
            if token is not None and token != getattr(processor, "boi_token", None):
                found.add(processor.tokenizer.convert_tokens_to_ids(str(token)))
    return found


def _key(data: RecipeData, formatter: Formatter) -> str:
    """Return what the lengths depend on."""
    tokenizer = formatter.processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = sorted(tokenizer.get_vocab().items())
    else:
        words = json.loads(backend.to_str())
        words |= {"truncation": None, "padding": None}  # the last call's, not the tokenizer's
    parts = [
        FORMAT,
        data.content_hash,
        formatter.template,
        type(formatter.processor).__name__,
        formatter.segments is not None,
        tokenizer.special_tokens_map,
        words,
    ]
    if formatter.tokens != MODELS_TOKENS:
        parts.append(formatter.tokens)  # named where it is not the default: what was kept before stays
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def _keep(name: str, numbers: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, numbers)
    store.keep(name, file.getvalue())


def _load(name: str, *shape: int) -> np.ndarray | None:
    content = store.load(name)
    if content is None:
        return None
    try:
        lengths = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError):  # cut short or edited: made anew
        return None
    return lengths if lengths.shape == shape and lengths.dtype == np.int64 else None
