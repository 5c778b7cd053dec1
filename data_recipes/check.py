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
from prunetune.data_recipes.images import FolderImages, ImageOpener
from prunetune.data_recipes.llava_json import PlaceholderError, check_sources, parse_record, read_records
from prunetune.data_recipes.parquet import ROW, ParquetImages, parquet_rows
from prunetune.data_recipes.recipe import read_recipe
from prunetune.data_recipes.sample import DataError, Sample

PERCENTILES = (50, 90, 95, 99, 100)
SHOWN = 5


@dataclass
class Report:
    """What a data set holds, and what is wrong with it.

    Attributes:
        recipe: its name.
        counts: samples per source, the broken ones included.
        problems: for each kind of problem its samples, by id or place, with a word on each.
        lengths: percentiles of tokens per sample, if a tokenizer was given.
        text_only: samples without a picture.
    """

    recipe: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    text_only: int = 0

    @property
    def total(self) -> int:
        """All samples that were asked for."""
        return sum(self.counts.values())

    def add(self, kind: str, what: str) -> None:
        """Note a problem."""
        self.problems.setdefault(kind, []).append(what)

    def failures(self, max_missing: float) -> list[str]:
        """Return what is beyond the thresholds: pictures above ``max_missing``, and any malformed sample at all."""
        failed = []
        lost = len(self.problems.get("missing image", [])) + len(self.problems.get("corrupt image", []))
        if self.total and lost > max_missing * self.total:
            failed.append(f"{lost} of {self.total} pictures can't be used, more than max_missing={max_missing:.2%}")
        for kind in ("malformed", "placeholder mismatch"):
            if self.problems.get(kind):
                failed.append(f"{len(self.problems[kind])} samples: {kind}")
        if not self.total:
            failed.append("there is no sample at all")
        return failed

    def to_text(self) -> str:
        """Return the report as tables for people."""
        lines = [f"recipe {self.recipe}: {self.total:,} samples, {self.text_only:,} of them text alone"]
        lines += [f"  {source:<12} {count:>9,}" for source, count in sorted(self.counts.items())]
        kinds = ("missing image", "corrupt image", "placeholder mismatch", "malformed", "over-length", "duplicate id")
        for kind in kinds:
            found = self.problems.get(kind, [])
            lines.append(f"{kind:<21} {len(found):>9,}")
            lines += [f"    {what}" for what in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"    ... and {len(found) - SHOWN:,} more")
        if self.lengths:
            lines.append("tokens per sample     " + ", ".join(f"{p} %: {n:,}" for p, n in self.lengths.items()))
        else:
            lines.append("tokens per sample     not measured: give --model for its tokenizer")
        return "\n".join(lines)


def check_data(
    recipe_name: str,
    file: str | None,
    image_root: str | None,
    processor: Any = None,
    template: str = "model",
    max_length: int = 2048,
    num_proc: int = 1,
) -> Report:
    """Read every sample of a recipe once: records, pictures and, with a processor, lengths in tokens.

    Args:
        recipe_name: a shipped recipe or the path of a YAML file.
        file: its data file; None is the one the recipe names, or LLaVA's mix in the folder of the pictures.
        image_root: folder of the pictures.
        processor: the model's, for token lengths; without it they are not measured.
        template: conversation template.
        max_length: longest sample in tokens that training takes whole.
        num_proc: processes that decode pictures.

    Raises:
        DataError: if the file can't be read at all; single records that are wrong are reported instead.
    """
    recipe = read_recipe(recipe_name)
    if not isinstance(recipe, LlavaJsonRecipe):
        raise DataError(f"recipe {recipe_name!r} draws its samples; there is no file to check")
    file = str(recipe.data_file(file, image_root))
    check_sources(recipe.sources or ())
    per_picture = _tokens_per_picture(processor) if processor is not None else 0
    report = Report(recipe.name)
    samples = _samples(recipe, file, report)
    if any(sample.image is not None for sample in samples):
        _check_pictures(samples, _opener(samples, file, image_root), report, num_proc)
    if processor is not None and samples:
        _measure(samples, processor, template, max_length, per_picture, report)
    return report


def _samples(recipe: LlavaJsonRecipe, file: str, report: Report) -> list[Sample]:
    samples: list[Sample] = []
    seen: Counter[tuple[str, str]] = Counter()
    for place, record in tqdm(read_records(file), desc="records", unit="record", dynamic_ncols=True):
        try:
            sample = parse_record(record, place, recipe.sources)
        except DataError as error:
            kind = "placeholder mismatch" if isinstance(error, PlaceholderError) else "malformed"
            report.add(kind, str(error))
            report.counts["(unreadable)"] += 1
            continue
        if sample is None:
            continue
        report.counts[sample.source] += 1
        report.text_only += sample.image is None
        seen[sample.source, sample.id] += 1
        if seen[sample.source, sample.id] == 2:
            report.add("duplicate id", f"{sample.source} {sample.id}")
        samples.append(sample)
    return samples


def _opener(samples: list[Sample], file: str, image_root: str | None) -> ImageOpener:
    if any(sample.image is not None and sample.image.startswith(ROW) for sample in samples):
        return ParquetImages(parquet_rows(Path(file)))
    return FolderImages(image_root)


def _check_pictures(samples: list[Sample], images: ImageOpener, report: Report, num_proc: int) -> None:
    references = list(dict.fromkeys(sample.image for sample in samples if sample.image is not None))
    there = [reference for reference in references if images.exists(reference)]
    missing = set(references) - set(there)
    broken: dict[str, str] = {}
    if there:
        rows = Dataset.from_dict({"reference": there}).map(
            _decode, fn_kwargs={"images": images}, num_proc=num_proc if num_proc > 1 else None, desc="pictures"
        )
        broken = {row["reference"]: row["error"] for row in rows if row["error"]}
    for sample in samples:
        if sample.image in missing:
            report.add("missing image", f"{sample.id}: {sample.image}")
        elif sample.image in broken:
            report.add("corrupt image", broken[str(sample.image)])


def _decode(row: dict[str, str], images: ImageOpener) -> dict[str, str]:
    try:
        images.open(row["reference"], row["reference"])
    except DataError as error:
        return {"error": str(error)}
    return {"error": ""}


def _measure(
    samples: list[Sample], processor: Any, template: str, max_length: int, per_picture: int, report: Report
) -> None:
    source = template_text(processor, template)
    lengths = []
    for sample in tqdm(samples, desc="lengths", unit="sample", dynamic_ncols=True):
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(sample.turns):
            parts = [{"type": "image"}] if number == 0 and sample.image is not None else []
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer or ""}]})
        text = processor.apply_chat_template(messages, chat_template=source, tokenize=False)
        tokens = len(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        length = tokens + (per_picture - 1 if sample.image is not None else 0)
        lengths.append(length)
        if length > max_length:
            report.add("over-length", f"{sample.id}: {length:,} tokens, max_length is {max_length:,}")
    ranked = sorted(lengths)
    report.lengths = {p: ranked[min(len(ranked) - 1, round(p / 100 * (len(ranked) - 1)))] for p in PERCENTILES}


def _tokens_per_picture(processor: Any) -> int:
    """Return the visual tokens of one picture of the processor's own size, as its placeholder expands.

    Raises:
        DataError: for a processor that does not say.
    """
    if not hasattr(processor, "patch_size") or not hasattr(processor, "vision_feature_select_strategy"):
        raise DataError(f"{type(processor).__name__} does not say how many tokens a picture has; leave --model out")
    size = processor.image_processor.crop_size if hasattr(processor.image_processor, "crop_size") else None
    side = (size or processor.image_processor.size).get("height") or processor.image_processor.size["shortest_edge"]
    patches = (side // processor.patch_size) ** 2 + getattr(processor, "num_additional_image_tokens", 0)
    return patches - (processor.vision_feature_select_strategy == "default")
