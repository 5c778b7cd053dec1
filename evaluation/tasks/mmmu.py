"""MMMU, validation: questions of college exams in thirty subjects, with up to seven images."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.letters import mmmu_letter, mmmu_open
from prunetune.evaluation.tasks.base import (
    LETTER,
    SHORT_ANSWER,
    Benchmark,
    Item,
    Scored,
    Scorer,
    averaged,
    register_task,
)
from prunetune.evaluation.tasks.multiple_choice import LETTERS, option_lines

SOURCE = "https://huggingface.co/datasets/MMMU/MMMU or lmms-lab/MMMU (the files of the validation split)"
SPLIT = "validation"
CHOICE = "multiple-choice"
_NAMED = re.compile(r"<image (\d+)>")
_ID = re.compile(rf"{SPLIT}_(.+)_\d+")
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}


def read_row(row: Row, number: int) -> Item | None:
    """Return a row as lmms-eval asks it; the source is the subject. None for a row of another split.

    The images that question and options name come first, in the order of their numbers, and the names stay in the text.
    """
    name = str(row["id"])
    if not name.startswith(f"{SPLIT}_"):
        return None
    found = _ID.fullmatch(name)
    subject = found.group(1) if found else ""
    if subject not in _DISCIPLINE:
        raise TaskError(f"question {name!r} is of no subject of MMMU; its id is {SPLIT}_SUBJECT_NUMBER")
    lines = [row["question"]]
    answer: dict[str, Any] = {"truth": str(row["answer"]), "options": None}
    if row["question_type"] == CHOICE:
        options = _options(name, row["options"])
        answer["options"] = dict(zip(LETTERS, options, strict=False))
        lines += [*option_lines(options), "", LETTER]
    else:
        lines += ["", SHORT_ANSWER]
    question = "\n".join(lines)
    return Item(name, subject, _images(name, row, number, question), question, answer)


def _options(name: str, text: str) -> list[str]:
    """Return the options, which the table holds as a Python list in a text."""
    try:
        return [str(option) for option in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError):
        raise TaskError(f"question {name}: its options are no list: {text!r}") from None


def _images(name: str, row: Row, number: int, question: str) -> str | None:
    columns = [f"image_{image}" for image in sorted(set(_NAMED.findall(question)))]
    missing = [column for column in columns if not row.get(column)]
    if missing:
        raise TaskError(f"question {name} names images that its row does not hold: {', '.join(missing)}")
    return image_in_row(number, *columns) if columns else None


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter, or where the right answer is found in what was said."""
    options = item.answer["options"]
    if options is None:
        return float(mmmu_open(prediction, item.answer["truth"]))
    return float(mmmu_letter(prediction, options) == item.answer["truth"])


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy in percent, over all questions, by discipline and by subject."""
    disciplines: dict[str, list[float]] = {name: [] for name in DISCIPLINES}
    for one in scored:
        disciplines[_DISCIPLINE[one.item.source]].append(one.score or 0.0)
    by_discipline = {name: 100 * sum(scores) / len(scores) for name, scores in disciplines.items() if scores}
    mean = averaged(scored)
    return {"accuracy": mean.overall, "by_discipline": by_discipline, "by_subject": mean.by_source}


register_task(
    Benchmark(
        name="mmmu",
        protocol="lmms-eval",
        prompt="question, options, letter or short answer",
        about="MMMU validation: college exams, multiple choice and open, one to seven images",
        readers=[ParquetRows("mmmu", read_row, source=SOURCE)],
        scorer=Scorer(score, summarise),
        notes=(
            "an answer that names no option is wrong; the published scorer draws one at random",
            "images stand before the question; each keeps its own budget",
        ),
        albums=True,
    )
)
