"""What the benchmarks with VQA accuracy share: the score, files in COCO's format, LLaVA's question files, uploads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json, read_questions
from prunetune.evaluation.lmms_lab import Row, image_in_row
from prunetune.evaluation.metrics.vqa import normalize, official_accuracy, vqa_accuracy, vqav2_accuracy
from prunetune.evaluation.tasks.base import ACCURACY, SHORT_ANSWER, Item, Scored, averaged
from prunetune.outputs import write_text

# LLaVA's hint for VizWiz, about a third of whose questions can't be answered; lmms-eval's OK-VQA has it as well.
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LLAVA_EVAL = "LLaVA's eval.zip, see its docs/Evaluation.md"


def score(prediction: str, item: Item) -> float:
    """Return the VQA accuracy, from 0 to 1."""
    return vqa_accuracy(prediction, item.answer)


def vqav2_score(prediction: str, item: Item) -> float:
    """Return the VQA accuracy as lmms-eval's VQAv2 has it, from 0 to 1."""
    return vqav2_accuracy(prediction, item.answer)


def official_score(prediction: str, item: Item) -> float:
    """Return the VQA accuracy as LLaVA's conversion and the official vqaEval have it, from 0 to 1."""
    return official_accuracy(prediction, item.answer)


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return VQA accuracy in percent, of all and by answer type."""
    mean = averaged(scored)
    return {"accuracy": mean.overall, "by_answer_type": mean.by_source}


METRICS = (replace(ACCURACY, about="VQA accuracy against people's answers; pictures are drawn"),)


def coco_items(data: Path, questions: str, annotations: str, source: str, ending: str = SHORT_ANSWER) -> list[Item]:
    """Return the questions of a COCO-style pair of files, with ten answers each; the source is the answer's type.

    Args:
        data: folder of the files.
        questions: name of the file of questions.
        annotations: name of the file of answers.
        source: where to get the two, for messages.
        ending: what is asked below each question.

    Raises:
        TaskError: for a question without answers, or with two lists of them.
    """
    answers: dict[str, Any] = {}
    for record in read_json(find_file(data, annotations, source))["annotations"]:
        name = str(record["question_id"])
        # Ten answers or twenty: which ten would count depends on the order of a file.
        if name in answers:
            raise TaskError(f"{annotations}: question {name} is annotated twice")
        answers[name] = record
    items = []
    path = find_file(data, questions, source)
    for record in read_json(path)["questions"]:
        name = str(record["question_id"])
        if name not in answers:
            raise TaskError(f"{path}: question {name} has no annotation in {annotations}")
        kind = str(answers[name].get("answer_type", "other"))
        image = f"COCO_val2014_{int(record['image_id']):012d}.jpg"  # the files have the number of the image alone
        question = f"{record['question']}\n{ending}"
        items.append(Item(name, kind, image, question, people(answers[name])))
    return items


def read_row(row: Row, number: int, ending: str = SHORT_ANSWER) -> Item:
    """Return a row of lmms-lab's VQAv2 or OK-VQA."""
    kind = str(row.get("answer_type") or "other")
    question = f"{row['question']}\n{ending}"
    return Item(str(row["question_id"]), kind, image_in_row(number), question, people(row))


def people(record: dict[str, Any]) -> list[str]:
    """Return what people answered: a list of answers, or of objects that hold one with its annotator."""
    answers = []
    for answer in record["answers"]:
        answers.append(answer["answer"] if isinstance(answer, dict) else str(answer))
    return answers


def hidden_items(data: Path, file: str) -> list[Item]:
    """Return the questions of one of LLaVA's question files whose answers are hidden."""
    items = []
    for _, record in read_questions(find_file(data, file, LLAVA_EVAL)):
        items.append(Item(str(record["question_id"]), "hidden", record["image"], record["text"], None))
    return items


def write_answers(path: Path, scored: Sequence[Scored], question: str) -> Path:
    """Write what a VQA server takes: a JSON list of answers with their questions.

    Args:
        path: the file.
        scored: the predictions.
        question: what the server calls a question by: ``question_id``, a number, or ``image``, its file name.
    """
    rows = []
    for one in scored:
        name = int(one.item.id) if question == "question_id" else one.item.image
        # Normalised before the upload, as LLaVA's converters do it.
        rows.append({question: name, "answer": normalize(one.prediction)})
    write_text(path, json.dumps(rows))
    return path
