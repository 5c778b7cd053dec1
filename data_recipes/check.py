"""Reading a data set once, whole, to report everything that would trouble a recalibration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from prunetune.data_recipes.chat_templates import template_text
from prunetune.data_recipes.formats import LlavaJsonRecipe
from prunetune.data_recipes.formatting import readable_template
from prunetune.data_recipes.images import MAX_PIXELS, ImageOpener, TooLarge, limited
from prunetune.data_recipes.llava_json import (
    BrokenRecord,
    OutsidePath,
    PlaceholderError,
    check_sources,
    parse_record,
    read_records,
)
from prunetune.data_recipes.oddities import oddities
from prunetune.data_recipes.parquet import ROW, ParquetImages, parquet_rows
from prunetune.data_recipes.recipe import read_recipe
from prunetune.data_recipes.sample import DataError, Sample
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.data_recipes.segments import MODELS_TOKENS, Tokens, segments_of
from prunetune.data_recipes.tokens import check_tokens
from prunetune.data_recipes.videos import VIDEO, FolderVisuals

PERCENTILES = (50, 90, 95, 99, 100)
SHOWN = 5
KINDS = (
    "missing image",
    "corrupt image",
    "too large image",
    "outside path",
    "unknown source",
    "placeholder mismatch",
    "malformed",
    "over-length",
    "duplicate id",
    "odd in LLaVA's prompt",
)
"""All problems, in the order of the report; those that were not found are shown with 0."""


@dataclass
class Report:
    """What a data set holds, and what is wrong with it.

    Attributes:
        recipe: its name.
        counts: samples per source, the broken ones included.
        problems: for each kind of problem its samples, by id or where they stand, with a word on each.
        lengths: percentiles of tokens per sample, if a tokenizer was given.
        text_only: samples without an image.
        tokens: what the tokenizer does not give of LLaVA's own tokens, see
            :func:`prunetune.data_recipes.tokens.check_tokens`.
    """

    recipe: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    text_only: int = 0
    tokens: str | None = None

    @property
    def total(self) -> int:
        """All samples that were asked for."""
        return sum(self.counts.values())

    def add(self, kind: str, what: str) -> None:
        """Note a problem."""
        self.problems.setdefault(kind, []).append(what)

    def failures(self, max_missing: float, max_broken: float) -> list[str]:
        """Return what would stop a recalibration: too many missing images or broken records, and a path or size at all.

        An image that can't be decoded counts as missing here, though a run meets it later.
        """
        failed = []
        unusable = self._number("missing image", "corrupt image")
        if self.total and unusable > max_missing * self.total:
            failed.append(f"{unusable} of {self.total} images can't be used, more than max_missing={max_missing:.2%}")
        broken = self._number("malformed", "placeholder mismatch")
        if self.total and broken > max_broken * self.total:
            failed.append(
                f"{broken} of {self.total} records are no conversation, more than max_broken={max_broken:.2%}"
            )
        for kind in ("outside path", "unknown source", "too large image"):
            if self._number(kind):
                failed.append(f"{self._number(kind)} samples: {kind}")
        if not self.total:
            failed.append("there is no sample at all")
        return failed

    def _number(self, *kinds: str) -> int:
        return sum(len(self.problems.get(kind, ())) for kind in kinds)

    def to_text(self) -> str:
        """Return the report as tables for people."""
        lines = [f"recipe {self.recipe}: {self.total:,} samples, {self.text_only:,} of them text alone"]
        for source, count in sorted(self.counts.items()):
            lines.append(f"  {source:<12} {count:>9,}")
        for kind in KINDS:
            found = self.problems.get(kind, [])
            lines.append(f"{kind:<21} {len(found):>9,}")
            for what in found[:SHOWN]:
                lines.append(f"    {what}")
            if len(found) > SHOWN:
                lines.append(f"    ... and {len(found) - SHOWN:,} more")
        measured = "not measured: give --model for its tokenizer"
        if self.lengths:
            measured = ", ".join(f"{share} %: {length:,}" for share, length in self.lengths.items())
        lines.append(f"tokens per sample     {measured}")
        if self.tokens is not None:
            lines.append(f"tokenizer             {self.tokens}")
        return "\n".join(lines)


def check_data(
    recipe_name: str,
    file: str | None,
    image_root: str | None,
    processor: Any = None,
    template: str = "model",
    max_length: int = 2048,
    num_proc: int = 1,
    max_pixels: int = MAX_PIXELS,
    tokens: Tokens = MODELS_TOKENS,
    folder: Path | None = None,
) -> Report:
    """Read every sample of a recipe once: records, images and, with a processor, lengths in tokens.

    Args:
        recipe_name: a shipped recipe or the path of a YAML file.
        file: its data file; None is the one the recipe names, or LLaVA's mix in the folder of the images.
        image_root: folder of the images.
        processor: the model's, for token lengths; without it they are not measured.
        template: conversation template.
        max_length: longest sample in tokens that training takes whole.
        num_proc: processes that decode images.
        max_pixels: largest image that is decoded.
        tokens: whose tokens, as ``model.tokens``.
        folder: of the model, whose tokenizer.model says in what order pieces are merged.

    Raises:
        DataError: if the file can't be read at all, or the tokens can't be given; single records that are wrong are
            reported instead.
    """
    recipe = read_recipe(recipe_name)
    if not isinstance(recipe, LlavaJsonRecipe):
        raise DataError(f"recipe {recipe_name!r} draws its samples; there is no file to check")
    file = str(recipe.data_file(file, image_root))
    check_sources(recipe.sources or ())
    if processor is None and tokens != MODELS_TOKENS:
        raise DataError(f"tokens {tokens} are measured with a model's tokenizer; give --model")
    tokens_per_image = differs = None
    if processor is not None:  # before the file is read: an unfit processor should not cost minutes
        tokens_per_image = _tokens_per_image(processor)
        differs = check_tokens(processor, template, tokens, folder)
    report = Report(recipe.name, tokens=differs)
    samples = _samples(recipe, file, report)
    if any(sample.image is not None for sample in samples):
        images = _opener(samples, file, image_root, recipe.video)
        _check_images(samples, limited(images, max_pixels), report, num_proc)
    if tokens_per_image is not None and samples:
        _measure(samples, processor, template, tokens, max_length, tokens_per_image, report)
    return report


def _samples(recipe: LlavaJsonRecipe, file: str, report: Report) -> list[Sample]:
    samples: list[Sample] = []
    seen: Counter[tuple[str, str]] = Counter()
    for where, record in tqdm(read_records(file), desc="records", unit="record", dynamic_ncols=True):
        try:
            sample = parse_record(record, where, recipe.sources)
        except DataError as error:
            report.add(_kind(error), str(error))
            report.counts["(unreadable)"] += 1
            continue
        if sample is None:
            continue
        report.counts[sample.source] += 1
        report.text_only += sample.image is None
        seen[sample.source, sample.id] += 1
        if seen[sample.source, sample.id] == 2:  # named once, however often it repeats
            report.add("duplicate id", f"{sample.source} {sample.id}")
        for oddity in oddities(sample):
            report.add("odd in LLaVA's prompt", oddity)
        samples.append(sample)
    return samples


def _kind(error: DataError) -> str:
    if isinstance(error, PlaceholderError):
        return "placeholder mismatch"
    if isinstance(error, BrokenRecord):
        return "malformed"
    return "outside path" if isinstance(error, OutsidePath) else "unknown source"


def _opener(samples: list[Sample], file: str, image_root: str | None, video: VideoSampling) -> ImageOpener:
    for sample in samples:
        if sample.image is not None and sample.image.startswith(ROW):
            return ParquetImages(parquet_rows(Path(file)))
    return FolderVisuals(image_root, video)


def _check_images(samples: list[Sample], images: ImageOpener, report: Report, num_proc: int) -> None:
    there, missing = [], set()
    # Each image once: many samples share one, and decoding takes longest.
    for reference in dict.fromkeys(sample.image for sample in samples):
        if reference is None:
            continue
        if images.exists(reference):
            there.append(reference)
        else:
            missing.add(reference)
    broken = _undecodable(there, images, num_proc) if there else {}
    for sample in samples:
        if sample.image in missing:
            report.add("missing image", f"{sample.id}: {sample.image}")
        elif sample.image in broken:
            report.add(*broken[sample.image])


def _undecodable(references: list[str], images: ImageOpener, num_proc: int) -> dict[str, tuple[str, str]]:
    """Return the images that can't be decoded, each with the kind of its problem and the reason."""
    rows = Dataset.from_dict({"reference": references}).map(
        _decode,
        fn_kwargs={"images": images},
        num_proc=num_proc if num_proc > 1 else None,  # None decodes in this process
        desc="images",
    )
    return {row["reference"]: (row["kind"], row["error"]) for row in rows if row["error"]}


def _decode(row: dict[str, str], images: ImageOpener) -> dict[str, str]:
    # As a value: an exception in a worker process would end the pass over the others.
    try:
        images.open(row["reference"], row["reference"])
    except TooLarge as error:
        return {"kind": "too large image", "error": str(error)}
    except DataError as error:
        return {"kind": "corrupt image", "error": str(error)}
    return {"kind": "", "error": ""}


def _measure(
    samples: list[Sample],
    processor: Any,
    template: str,
    tokens: Tokens,
    max_length: int,
    tokens_per_image: int,
    report: Report,
) -> None:
    if any((sample.image or "").startswith(VIDEO) for sample in samples):
        raise DataError("how many tokens a video has depends on its size and length; leave --model out")
    source = template_text(processor, template)
    exact = None
    if tokens != MODELS_TOKENS:
        exact = segments_of(processor.tokenizer, getattr(processor, "image_token", None), tokens)
    lengths = []
    for sample in tqdm(samples, desc="lengths", unit="sample", dynamic_ncols=True):
        length = None if exact is None else exact.lengths([sample])[0]
        if length is None:
            length = _templated_length(sample, processor, source)
        if sample.image is not None:
            length += tokens_per_image
        lengths.append(length)
        if length > max_length:
            report.add("over-length", f"{sample.id}: {length:,} tokens, max_length is {max_length:,}")
    lengths.sort()
    last = len(lengths) - 1
    for percentile in PERCENTILES:
        rank = round(percentile / 100 * last)
        report.lengths[percentile] = lengths[min(last, rank)]


def _templated_length(sample: Sample, processor: Any, source: str) -> int:
    """Return the tokens of a sample as its template writes it, without its picture's."""
    with readable_template():
        text = processor.apply_chat_template(_messages(sample), chat_template=source, tokenize=False)
    length = len(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return length - (sample.image is not None)  # the placeholder is one token of the text


def _messages(sample: Sample) -> list[dict[str, Any]]:
    """Return a sample's conversation as chat templates read it, with a placeholder instead of the image."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(sample.turns):
        content = [{"type": "text", "text": turn.question}]
        if number == 0 and sample.image is not None:
            content.insert(0, {"type": "video" if sample.image.startswith(VIDEO) else "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer or ""}]})
    return messages


def _tokens_per_image(processor: Any) -> int:
    """Return the visual tokens of one image of the processor's own size, as its placeholder expands.

    Raises:
        DataError: for a processor that does not say.
    """
    if not hasattr(processor, "patch_size") or not hasattr(processor, "vision_feature_select_strategy"):
        raise DataError(f"{type(processor).__name__} does not say how many tokens an image has; leave --model out")
    images = processor.image_processor
    # What the tower sees is the crop, or where nothing is cropped the resized image.
    size = getattr(images, "crop_size", None) or images.size
    side = size.get("height") or images.size["shortest_edge"]
    tokens = (side // processor.patch_size) ** 2
    tokens += getattr(processor, "num_additional_image_tokens", 0)
    if processor.vision_feature_select_strategy == "default":
        tokens -= 1  # [CLS] is among the additional tokens, and does not enter the projector
    return tokens
