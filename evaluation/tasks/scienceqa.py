"""ScienceQA, test: multiple choice by letter, with and without images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import (
    ACCURACY,
    LETTER,
    Benchmark,
    Item,
    Pairing,
    Scored,
    Scorer,
    accuracy_of,
    averaged,
    register_task,
)

# No problem of the test split has more than five choices.
LETTERS = "ABCDE"
SOURCE = "https://github.com/lupantech/ScienceQA (problems.json and pid_splits.json in data/scienceqa)"
QUESTIONS = "llava_test_CQM-A.json"
# Papers call them NAT, SOC and LAN.
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def read_items(data: Path) -> list[Item]:
    """Return the test problems in the split's order, as LLaVA asks them."""
    asked = {}
    for record in read_json(find_file(data, QUESTIONS, "LLaVA's eval.zip, see its docs/Evaluation.md")):
        # LLaVA's file holds training conversations: the prompt with its placeholder, and an answer nobody asks for.
        question = record["conversations"][0]["value"].replace("<image>", "").strip()
        asked[str(record["id"])] = f"{question}\n{LETTER}"
    items = read_answers(data)
    missing = [item.id for item in items if item.id not in asked]
    # Left out in silence, the accuracy would be that of another set.
    if missing:
        raise TaskError(f"{QUESTIONS} lacks {len(missing)} problems of the test split, such as {missing[0]}")
    return [replace(item, question=asked[item.id]) for item in items]


def read_answers(data: Path) -> list[Item]:
    """Return the test problems; the source says whether there is an image ("image" or "text")."""
    problems = read_json(find_file(data, "problems.json", SOURCE))
    split = read_json(find_file(data, "pid_splits.json", SOURCE))["test"]
    items = []
    for number in split:
        problem = problems[number]
        image = f"{number}/{problem['image']}" if problem.get("image") else None
        items.append(_item(str(number), image, problem["question"], problem))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which carries no id, with the question as LLaVA writes it."""
    lines = [row["question"]]
    if row.get("hint"):
        lines.insert(0, f"Context: {row['hint']}")
    for letter, choice in zip(LETTERS, row["choices"], strict=False):
        lines.append(f"{letter}. {choice}")
    image = image_in_row(number) if row.get("image") else None
    return _item(f"row {number}", image, "\n".join([*lines, LETTER]), row)


def _item(name: str, image: str | None, question: str, record: Mapping[str, Any]) -> Item:
    source = "text" if image is None else "image"
    answer = {"index": record["answer"], "choices": len(record["choices"])}
    subject = record.get("subject")
    kinds = {"subject": SUBJECTS.get(subject, subject)} if subject else {}
    return Item(name, source, image, question, answer, kinds)


def chosen(prediction: str, choices: int) -> int:
    """Return the chosen index, or -1: the letter alone, "X. ...", or one "The answer is X."."""
    # LLaVA's scorer, form by form: "b" and "B." are no answers there, and papers' numbers depend on it.
    if prediction in tuple(LETTERS):
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in LETTERS and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        # Two such sentences may contradict each other; LLaVA's scorer takes neither.
        found = _ANSWER_IS.findall(prediction)
        letter = found[0] if len(found) == 1 else ""
    if letter and letter in LETTERS[:choices]:
        return LETTERS.index(letter)
    return -1


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right choice."""
    return float(chosen(prediction, item.answer["choices"]) == item.answer["index"])


def summarise(scored: Sequence[Scored]) -> dict[str, float | None]:
    """Return accuracy in percent, of all problems and of those with an image (what papers report)."""
    mean = averaged(scored)
    return {"accuracy": mean.overall, "image_accuracy": mean.by_source.get("image")}


register_task(
    Benchmark(
        name="scienceqa",
        protocol="llava",
        prompt="context, question, choices, letter",
        about="ScienceQA test: multiple choice (total and IMG accuracy)",
        readers=[
            PublishedFiles(read_items, images_below("test"), answers=read_answers),
            ParquetRows("scienceqa", read_row),
        ],
        scorer=Scorer(
            score,
            summarise,
            (accuracy_of("image", "image_accuracy", "accuracy over the problems with an image (IMG)"), ACCURACY),
        ),
        source_is="picture",
        pairing=Pairing(failed="FAILED"),
        notes=("a missing answer counts as wrong, and in no group, as in LLaVA's scorer",),
    )
)
