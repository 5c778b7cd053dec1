"""MME: yes/no questions in pairs about an image, 10 subtasks of perception and 4 of cognition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.errors import MissingFile, TaskError
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.metric import Metric, Tally, share, tallied
from prunetune.evaluation.readers import PublishedFiles
from prunetune.evaluation.tasks.base import (
    SHORT_ANSWER,
    Benchmark,
    Item,
    Pairing,
    Prediction,
    Scored,
    Scorer,
    register_task,
)

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)
SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (MME_Benchmark_release)"
YES_OR_NO = "Please answer yes or no."
_IMAGES = (".jpg", ".png", ".jpeg")


def read_items(data: Path) -> list[Item]:
    """Return the questions of all subtasks, by subtask and image; ids are ``SUBTASK/IMAGE/QUESTION``.

    A question that a file holds twice is one question.

    Raises:
        TaskError: if there is no subtask, a line is not a question, a tab and yes or no, or a question has two answers.
    """
    root = _root(data)
    items: dict[str, Item] = {}
    for subtask in SUBTASKS:
        # Five subtasks come with folders for questions and images, the others with both side by side.
        folder = root / subtask
        questions = folder / "questions_answers_YN"
        images = folder / "images" if questions.is_dir() else folder
        for path in sorted((questions if questions.is_dir() else folder).glob("*.txt")):
            image = _image(images, path.stem).relative_to(data).as_posix()
            for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if not text.strip():
                    continue
                question, answer = _split(text, f"{path}, line {line}")
                # By its text and not by its line: LLaVA's question file need not have the same order.
                item = _item(subtask, path.stem, image, question, answer)
                if item.id in items and items[item.id].answer != answer:
                    raise TaskError(f"{path}, line {line}: the question has another answer above")
                items[item.id] = item
    return list(items.values())


def _root(data: Path) -> Path:
    """Return the folder that holds the subtasks' folders, anywhere below ``data``."""
    if any((data / name).is_dir() for name in SUBTASKS):
        return data
    found = set()
    for name in ("existence", "code_reasoning", "OCR"):  # one of each kind is enough to find the folder of a part
        found |= {path.parent for path in data.rglob(name) if path.is_dir()}
    if not found:
        raise MissingFile(
            f"{data} holds none of MME's subtasks ({', '.join(PERCEPTION[:3])}, ...); get it from {SOURCE}"
        )
    if len(found) > 1:
        raise TaskError(f"{data} holds MME's subtasks several times: {', '.join(map(str, sorted(found)))}; name one")
    return found.pop()


def _image(folder: Path, stem: str) -> Path:
    """Return the image of a question file, or the name it would have: it is missed where it is opened."""
    for end in _IMAGES:
        if (folder / (stem + end)).is_file():
            return folder / (stem + end)
    return folder / f"{stem}.jpg"


def _split(text: str, where: str) -> tuple[str, str]:
    """Return question and answer of a line; raises TaskError beginning with ``where`` if it is none."""
    parts = text.strip().split("\t")
    if len(parts) != 2 or parts[1].strip().lower() not in ("yes", "no"):
        raise TaskError(f"{where}: expected a question, a tab, and Yes or No, got {text!r}")
    return parts[0], parts[1].strip().lower()


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, whose question_id is ``SUBTASK/FILE``."""
    stem = str(row["question_id"]).split("/")[-1].rsplit(".", 1)[0]
    return _item(row["category"], stem, image_in_row(number), row["question"], row["answer"].strip().lower())


def _item(subtask: str, stem: str, image: str, question: str, answer: str) -> Item:
    # Some questions have two spaces within a sentence, and LLaVA's file asks them so: another prompt, another token.
    asked = f"{_unformatted(question)}\n{SHORT_ANSWER}"
    return Item(f"{subtask}/{stem}/{plain(question)}", subtask, image, asked, answer)


def plain(question: str) -> str:
    """Return a question without the two answer formats, single-spaced, by which it is known."""
    return " ".join(_unformatted(question).split())


def _unformatted(question: str) -> str:
    # MME asks for yes or no, LLaVA's question file for a short answer; the question itself is what both share.
    return question.replace(SHORT_ANSWER, "").replace(YES_OR_NO, "").strip()


def says(prediction: str) -> str:
    """Return "yes", "no" or "other", from the first four characters."""
    # MME's own rule, " yes" included; "not at all" is a no by its first two letters.
    head = prediction.lower()[:4]
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else "other"


def score(prediction: str, item: Item) -> float:
    """Return 1 if yes or no is right."""
    return float(says(prediction) == item.answer)


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the score of every subtask (accuracy plus accuracy over whole images, in percent) and the two sums.

    Sums are over the subtasks that are there, None where none is; the others are listed.
    """
    # Papers add the subtasks' scores up (2,000 points of perception, 800 of cognition), so a sum without one of them
    # can't be compared: it is listed as missing beside the sum.
    subtasks: dict[str, dict[str, float]] = {}
    missing = []
    for subtask in SUBTASKS:
        own = [one for one in scored if one.item.source == subtask]
        if own:
            subtasks[subtask] = _subtask(own)
        else:
            missing.append(subtask)
    sums: dict[str, float | None] = {}
    for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION), ("total", SUBTASKS)):
        scores = [subtasks[name]["score"] for name in names if name in subtasks]
        sums[kind] = sum(scores) if scores else None
    return {**sums, "subtasks": subtasks, "missing_subtasks": missing}


def _subtask(scored: Sequence[Scored]) -> dict[str, float]:
    """Return the accuracy over questions, that over images whose every question is right, and their sum."""
    images: dict[str, list[float]] = {}
    for one in scored:
        images.setdefault(one.item.id.split("/")[1], []).append(one.score or 0)
    right = sum(sum(scores) for scores in images.values())
    # Each image has a question that is right to affirm and one to deny: saying yes to everything gets no image whole.
    whole = sum(all(scores) for scores in images.values())
    accuracy = 100 * right / len(scored)
    plus = 100 * whole / len(images)
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy_plus": plus}


def tally(scored: Sequence[Scored]) -> Tally:
    """Return by image and subtask its right answers, questions, whether all are right, and 1: a row of (14, 4)."""
    images: dict[tuple[str, str], list[float]] = {}
    for one in scored:
        images.setdefault((one.item.source, one.item.id.split("/")[1]), []).append(one.score or 0)
    units = []
    rows = []
    for (subtask, image), scores in images.items():
        row = np.zeros((len(SUBTASKS), 4))
        if subtask in SUBTASKS:  # any other is in no sum, as in the summary
            row[SUBTASKS.index(subtask)] = sum(scores), len(scores), all(scores), 1
        units.append(f"{subtask}/{image}")
        rows.append(row.ravel().tolist())
    return tallied(units, rows)


def points(counts: np.ndarray, subtasks: Sequence[str]) -> np.ndarray:
    """Return the sum of the scores of some subtasks, of counts (..., 56); NaN where none of them is there."""
    right, questions, whole, images = np.moveaxis(counts.reshape(*counts.shape[:-1], len(SUBTASKS), 4), -1, 0)
    scores = 100 * share(right, questions) + 100 * share(whole, images)
    own = scores[..., [SUBTASKS.index(name) for name in subtasks]]
    return np.where(np.isnan(own).all(axis=-1), np.nan, np.nansum(own, axis=-1))


def _sum(name: str, subtasks: Sequence[str]) -> Metric:
    about = f"accuracy plus accuracy over whole pictures, added over {len(subtasks)} subtasks; pictures are drawn"
    return Metric(name, "points", about, tally, partial(points, subtasks=subtasks))


METRICS = (_sum("perception", PERCEPTION), _sum("cognition", COGNITION), _sum("total", SUBTASKS))


def item_ids(predictions: list[Prediction], data: Path, where: str) -> list[str]:
    """Return the item of each prediction; LLaVA's id is ``SUBTASK/FILE``, and its prompt says which question it was."""
    ids = []
    for prediction in predictions:
        parts = prediction.id.split("/")
        # Ours has the question as its third part, LLaVA's at most a folder: SUBTASK/images/FILE.
        if len(parts) > 2 and not parts[1].endswith(_IMAGES) and parts[1] != "images":
            ids.append(prediction.id)
            continue
        if not prediction.prompt:
            raise TaskError(
                f"{where}, line {prediction.line}: no prompt, so it can't be told which of the picture's questions was "
                "answered"
            )
        ids.append(f"{parts[0]}/{parts[-1].rsplit('.', 1)[0]}/{plain(prediction.prompt)}")
    return ids


register_task(
    Benchmark(
        name="mme",
        protocol="llava",
        prompt="question, short answer",
        about="MME: perception and cognition (accuracy + accuracy over pictures)",
        readers=[PublishedFiles(read_items, FolderImages), ParquetRows("mme", read_row)],
        scorer=Scorer(score, summarise, METRICS),
        source_is="subtask",
        pairing=Pairing(item_ids, first_counts=True),
        notes=(
            "questions are paired by subtask, picture and text, not by their order in the files",
            "of a question that was answered several times the first answer counts, as in LLaVA's conversion",
        ),
    )
)
