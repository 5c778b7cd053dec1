"""What ``prunetune answers`` does: the dense model's own answers to questions about images, as a recipe to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import DataError, Sample, Turn, load_recipe
from prunetune.data_recipes.images import FolderImages, ImageOpener, limited
from prunetune.data_recipes.parquet import ROW
from prunetune.data_recipes.questions import (
    ASKING,
    GENERAL,
    asked_of,
    dealt,
    images_below,
    images_hash,
    question_in,
    read_questions,
    without_repeats,
)
from prunetune.data_recipes.recipe import read_recipe
from prunetune.data_recipes.videos import VIDEO
from prunetune.models import Arm
from prunetune.models.code import code_record
from prunetune.models.ranks import Ranks
from prunetune.models.seal import seal_of, sealed, why_unsealed
from prunetune.outputs import OutputError, write_text
from prunetune.outputs.errors import writing
from prunetune.plugins import plugin_records
from prunetune.reading import read_json
from prunetune.screen import SCREEN, say

KIND = "prunetune answers"
FORMAT = 1
_BESIDE = ("kind", "format", "counts", "file_hash", "seal", "prunetune", "plugins")


@dataclass(frozen=True)
class Asking:
    """What is asked, and how it is answered.

    Attributes:
        images: folder of images without questions; None reads the configuration's recipe.
        questions: file of questions about them, one a line; None takes a shipped list.
        ask: let the model ask so many questions about each image itself, in place of a list.
        each: how many questions of a list an image gets.
        max_new_tokens: longest answer in tokens.
        batch_size: questions that are answered at once, or images.
    """

    images: str | None = None
    questions: str | None = None
    ask: int = 0
    each: int = 1
    max_new_tokens: int = 128
    batch_size: int = 16

    def check(self) -> None:
        """Raise ConfigError for options that contradict one another."""
        if self.images is None and (self.questions is not None or self.ask):
            raise ConfigError("--questions and --ask are for images without questions: give --images DIR with them")
        if self.questions is not None and self.ask:
            raise ConfigError("--ask lets the model ask, and --questions says what is asked; give one of them")
        if not 0 <= self.ask <= len(ASKING):
            raise ConfigError(f"--ask takes 0 to {len(ASKING)} questions an image, of a kind each, got {self.ask}")


@dataclass(frozen=True)
class _Questions:
    """What is asked: samples whose turns have no answer, or images about which the model asks.

    Attributes:
        samples: in their order; of images alone they have no turn.
        images: opens the images.
        about: what decides them, for the record.
    """

    samples: list[Sample]
    images: ImageOpener
    about: dict[str, Any]


def answers(settings: RecalibrateConfig, asking: Asking, ranks: Ranks) -> Path:
    """Write the model's answers with their recipe and their record, and return the file; a run that was killed goes on.

    The model is the stock one: all visual tokens, its original projector. Batches are cut alike in every run and dealt
    to the ranks in turn, so a run that was killed, one that was not and one on several ranks write the same bytes.

    Args:
        settings: model, data, and the file as ``output``; nothing else of it is read.
        asking: what is asked.
        ranks: this process among its peers.

    Raises:
        ConfigError, DataError: for options or data that can't work.
        OutputError: if the file is there and holds something else, or can't be written.
    """
    asking.check()
    target = Path(settings.output)
    if target.suffix != ".json":
        raise ConfigError(f"prunetune answers writes a file in LLaVA's format: give --output FILE.json, not {target}")
    asked = _asked(settings, asking)
    arm = Arm.load(settings.model)
    about = _about(settings, asking, asked, arm)
    if _is_complete(target, about, settings.overwrite):
        if ranks.is_zero:
            say(f"{target} is complete: nothing to answer")
        return target
    seal = seal_of(about)
    number = asking.batch_size
    batches = [asked.samples[first : first + number] for first in range(0, len(asked.samples), number)]
    if ranks.is_zero:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if settings.overwrite:
                for part in _parts(target):
                    part.unlink()
    ranks.wait()
    done = _done(target, seal)
    ranks.wait()  # nobody appends before everybody has read
    _answer(arm, asked, asking, batches, done, target, seal, ranks)
    ranks.wait()
    if ranks.is_zero:
        _finish(target, about, asked, _done(target, seal), len(batches))
    ranks.wait()
    return target


def _asked(settings: RecalibrateConfig, asking: Asking) -> _Questions:
    """Return what is asked, and of what."""
    data = settings.data
    if asking.images is None:
        if read_recipe(data.recipe).draws:
            raise DataError(
                f"recipe {data.recipe!r} draws its images, which a JSON file can't name; write them to a folder, and "
                "give --images"
            )
        options = data.model_dump(exclude={"recipe"})
        recipe = load_recipe(data.recipe, **options, questions=True)
        samples = []
        for number in range(len(recipe)):
            samples.append(_unanswered(recipe[number], data.recipe))
        return _Questions(samples, recipe.images, {"name": recipe.name, "hash": recipe.content_hash, "by": "recipe"})
    references = images_below(asking.images)
    about: dict[str, Any] = {"name": Path(asking.images).name, "hash": images_hash(asking.images, references)}
    images = limited(FolderImages(asking.images), data.max_pixels)
    if asking.ask:
        about |= {"by": "the model", "asking": list(ASKING[: asking.ask])}
        return _Questions([Sample(name, "custom", name, ()) for name in references], images, about)
    questions = list(GENERAL) if asking.questions is None else read_questions(asking.questions)
    about |= {"by": "a list", "questions": seal_of({"questions": questions}), "each": asking.each}
    about |= {"seed": data.seed or 0}
    return _Questions(list(dealt(references, questions, asking.each, data.seed or 0)), images, about)


def _unanswered(sample: Sample, recipe: str) -> Sample:
    """Return a sample without its answers; raises DataError for one whose image is in no file of its own."""
    if sample.image is not None and sample.image.startswith(ROW):
        raise DataError(
            f"sample {sample.id!r} of recipe {recipe!r} has its image in the data file, which a JSON file can't name; "
            "write the images to a folder, and give --images"
        )
    turns = tuple(Turn(turn.question, None) for turn in sample.turns)
    return Sample(sample.id, sample.source, sample.image, turns)


def _about(settings: RecalibrateConfig, asking: Asking, asked: _Questions, arm: Arm) -> dict[str, Any]:
    """Return everything that decides the answers."""
    return {
        "model": settings.model.model_dump(),
        "frozen_hash": arm.base.hashes.frozen_hash,
        "original_projector_hash": arm.base.hashes.original_projector_hash,
        "settings_hash": arm.base.settings_hash,
        "template_hash": arm.template_hash,
        "data": {**asked.about, "count": len(asked.samples)},
        "max_new_tokens": asking.max_new_tokens,
        "batch_size": asking.batch_size,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def record_file(target: Path) -> Path:
    """Return where the record of a file of answers is."""
    return target.with_suffix(".record.json")


def recipe_path(target: Path) -> Path:
    """Return where the recipe of a file of answers is."""
    return target.with_suffix(".yaml")


def _is_complete(target: Path, about: dict[str, Any], overwrite: bool) -> bool:
    """Return whether these very answers are there.

    Raises:
        OutputError: for other answers, or a file that was not written here.
    """
    there = [path for path in (target, recipe_path(target), record_file(target)) if path.exists()]
    if not there:
        return False
    record = read_json(record_file(target), OutputError) if record_file(target).is_file() else {}
    if not isinstance(record, dict) or record.get("kind") != KIND or why_unsealed(record) is not None:
        raise OutputError(
            f"{there[0]} is in the way: it is not as prunetune answers wrote it; move it, or choose another file"
        )
    earlier = {name: value for name, value in record.items() if name not in _BESIDE}
    if overwrite:
        return False
    parts = [name for name, value in about.items() if earlier.get(name) != value]
    if parts:
        raise OutputError(
            f"{target} holds answers that differ in {', '.join(parts)}; choose another file, or give --overwrite"
        )
    if not target.is_file() or _file_hash(target) != record["file_hash"]:
        raise OutputError(f"{target} was changed after it was written; give --overwrite to make it anew")
    return True


def _parts(target: Path) -> list[Path]:
    """Return the files of a run that has not finished, one for each rank that there was."""
    return sorted(target.parent.glob(f"{target.name}.part-*"))


def _done(target: Path, seal: str) -> dict[int, list[dict[str, Any]]]:
    """Return the batches that are done by number; a line that was cut short is none.

    Raises:
        OutputError: for those of other settings.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for part in _parts(target):
        for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if values["made_with"] != seal:
                raise OutputError(
                    f"{part} holds answers of a run with other settings that was not finished; choose another file, or "
                    "give --overwrite"
                )
            found[values["batch"]] = values["records"]
    return found


def _answer(
    arm: Arm,
    asked: _Questions,
    asking: Asking,
    batches: Sequence[list[Sample]],
    done: dict[int, list[dict[str, Any]]],
    target: Path,
    seal: str,
    ranks: Ranks,
) -> None:
    """Answer this rank's batches that are not done yet."""
    todo = [number for number in range(len(batches)) if number not in done][ranks.rank :: ranks.world]
    formatter = arm.formatter(asked.images)
    part = target.with_name(f"{target.name}.part-{ranks.rank}")
    bar = tqdm(total=len(todo), desc="answers", unit="batch", mininterval=1.0, disable=not ranks.is_zero, file=SCREEN)
    with writing(part), part.open("a", encoding="utf-8") as file, bar:
        file.write("\n" if part.stat().st_size else "")  # behind a line that was cut short
        for number in todo:
            batch = batches[number]
            if asking.ask:
                batch = _asked_by_model(arm, formatter, batch, asking)
            records = []
            for first in range(0, len(batch), asking.batch_size):
                records += _answered(arm, formatter, batch[first : first + asking.batch_size], asking.max_new_tokens)
            line = {"made_with": seal, "batch": number, "records": records}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()  # killed later, this batch is not made again
            bar.update()


def _asked_by_model(arm: Arm, formatter: Any, batch: Sequence[Sample], asking: Asking) -> list[Sample]:
    """Return what the model asks about some images, each question once an image."""
    said: list[list[str]] = [[] for _ in batch]
    for prompt in ASKING[: asking.ask]:
        prompts = [Sample(sample.id, sample.source, sample.image, (Turn(prompt, None),)) for sample in batch]
        for own, answer in zip(said, arm.answer(formatter, prompts, asking.max_new_tokens), strict=True):
            own.append(question_in(answer.text))
    found: list[Sample] = []
    for sample, questions in zip(batch, said, strict=True):
        found += asked_of(str(sample.image), without_repeats(questions))
    return found


def _answered(arm: Arm, formatter: Any, batch: Sequence[Sample], max_new_tokens: int) -> list[dict[str, Any]]:
    """Return the records of one batch; later questions are answered with the earlier answers before them."""
    turns: list[list[Turn]] = [[] for _ in batch]
    for number in range(max((len(sample.turns) for sample in batch), default=0)):
        rows = [row for row, sample in enumerate(batch) if len(sample.turns) > number]
        prompts = []
        for row in rows:
            sample = batch[row]
            prompts.append(Sample(sample.id, sample.source, sample.image, (*turns[row], sample.turns[number])))
        for row, answer in zip(rows, arm.answer(formatter, prompts, max_new_tokens), strict=True):
            turns[row].append(Turn(batch[row].turns[number].question, answer.text))
    return [_record(sample, own) for sample, own in zip(batch, turns, strict=True)]


def _record(sample: Sample, turns: Sequence[Turn]) -> dict[str, Any]:
    """Return a conversation as LLaVA writes it."""
    record: dict[str, Any] = {"id": sample.id}
    placeholder = ""
    if sample.image is not None:
        is_video = sample.image.startswith(VIDEO)
        record["video" if is_video else "image"] = sample.image.removeprefix(VIDEO)
        placeholder = "<video>\n" if is_video else "<image>\n"
    messages = []
    for number, turn in enumerate(turns):
        messages.append({"from": "human", "value": turn.question if number else placeholder + turn.question})
        messages.append({"from": "gpt", "value": str(turn.answer)})
    return {**record, "conversations": messages}


def _finish(
    target: Path, about: dict[str, Any], asked: _Questions, done: dict[int, list[dict[str, Any]]], batches: int
) -> None:
    """Write the answers, their recipe and their record, which comes last."""
    records = [record for number in range(batches) for record in done[number]]
    if not records:
        raise DataError("the model asked no question about any of the images; give --questions FILE")
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(target, "[\n" + ",\n".join(lines) + "\n]\n")
    write_text(recipe_path(target), f"name: {target.stem}\nformat: llava_json\nfile: {target.name}\n")
    empty = sum(not turn["value"] for record in records for turn in record["conversations"][1::2])
    beside = {
        "counts": {"conversations": len(records), "empty answers": empty},
        "file_hash": _file_hash(target),
        "prunetune": code_record(),
        "plugins": plugin_records(),
    }
    record = sealed({"kind": KIND, "format": FORMAT, **about, **beside})
    write_text(record_file(target), json.dumps(record, indent=1) + "\n")
    for part in _parts(target):
        part.unlink()
    root = getattr(asked.images, "root", None)
    say(
        f"{len(records):,} conversations in {target}, {empty:,} answers are empty; train on them with "
        f"--data.recipe {recipe_path(target)}" + (f" --data.image_root {root}" if root is not None else "")
    )


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
