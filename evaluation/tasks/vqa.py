"""Tasks scored by VQA accuracy: TextVQA, VQAv2, VizWiz and OK-VQA."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.files import find_file, read_json, read_lines, read_questions
from prunetune.evaluation.metrics.vqa import normalize, vqa_accuracy
from prunetune.evaluation.predictions import Prediction
from prunetune.evaluation.tasks.base import (
    SHORT_ANSWER,
    Item,
    Pair,
    Task,
    TaskError,
    by_source,
    image_folder,
    percent,
    register_task,
)

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def score(prediction: str, item: Item) -> float:
    """Return the VQA accuracy, from 0 to 1."""
    return vqa_accuracy(prediction, item.answer)


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return VQA accuracy in percent, of all and by answer type."""
    return {"accuracy": percent(score, pairs), "by_answer_type": by_source(score, pairs)}


# ---- TextVQA ---------------------------------------------------------------------------------------------------

TEXTVQA, TEXTVQA_OCR = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"
TEXTVQA_SOURCE = "https://textvqa.org/dataset"
LLAVA_EVAL = "LLaVA's eval.zip, see its docs/Evaluation.md"


def textvqa_items(data: Path) -> list[Item]:
    """Return the validation questions; ids are ``IMAGE/QUESTION``, lower-case, as LLaVA pairs them."""
    records = read_json(find_file(data, TEXTVQA, TEXTVQA_SOURCE))["data"]
    # Where a picture is asked the same twice, LLaVA's scorer compares both answers with the last annotation.
    last = {_textvqa_id(record["image_id"], record["question"]): record["answers"] for record in records}
    items = []
    seen: Counter[str] = Counter()
    for record in records:
        name = _textvqa_id(record["image_id"], record["question"])
        seen[name] += 1
        number = name if seen[name] == 1 else f"{name}#{seen[name]}"
        question = f"{record['question'].capitalize()}\n{SHORT_ANSWER}"
        items.append(Item(number, "textvqa", f"{record['image_id']}.jpg", question, last[name]))
    return items


def textvqa_items_with_ocr(data: Path) -> list[Item]:
    """Return the questions as LLaVA asks them, with the reference OCR tokens between question and format."""
    known = {item.id: item for item in textvqa_items(data)}
    items = []
    seen: Counter[str] = Counter()
    path = find_file(data, TEXTVQA_OCR, LLAVA_EVAL)
    for line, record in read_lines(path):
        if not record.get("image"):
            raise TaskError(f"{path}, line {line}: question {record.get('question_id')!r} has no image")
        name = _textvqa_id(record["question_id"], question_of(record["text"], f"{path}, line {line}"))
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        if name not in known:
            raise TaskError(f"{path}, line {line}: question {name!r} is not in {TEXTVQA}")
        items.append(Item(name, "textvqa", record["image"], record["text"], known[name].answer))
    return items


def question_of(prompt: str, where: str) -> str:
    """Return the question within a TextVQA prompt of any of LLaVA's forms.

    Raises:
        TaskError: if the prompt has none of them.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found.group(1)
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith("Reference OCR token:") else lines[0]
    elif len(lines) <= 2:
        return lines[0]
    raise TaskError(f"{where}: the prompt has none of the known forms, so its question can't be told: {prompt!r}")


def textvqa_key(prediction: Prediction, where: str) -> str:
    """Return an item's id for a prediction of LLaVA's (whose question_id is the picture's) or of ours."""
    if "/" in prediction.id and not prediction.prompt:
        return prediction.id
    image = prediction.id.split("/")[0]
    return _textvqa_id(image, question_of(prediction.prompt, where))


def _textvqa_id(image: str, question: str) -> str:
    return f"{image}/{question.lower()}"


for _name, _read, _prompt in (
    ("textvqa", textvqa_items_with_ocr, "question, reference OCR tokens, short answer"),
    ("textvqa_no_ocr", textvqa_items, "question, short answer"),
):
    register_task(
        Task(
            name=_name,
            protocol="llava",
            prompt=_prompt,
            read=_read,
            answers=textvqa_items,
            images=lambda data: FolderImages(image_folder(data, "train_images")),
            score=score,
            metrics=lambda pairs: {"accuracy": percent(score, pairs)},
            key=textvqa_key,
            about=f"TextVQA validation, {_prompt} (VQA accuracy)",
        )
    )


# ---- VQAv2 and OK-VQA ------------------------------------------------------------------------------------------


def coco_items(data: Path, questions: str, annotations: str, source: str) -> list[Item]:
    """Return the questions of a COCO-style pair of files, with ten answers each; the source is the answer's type."""
    answers: dict[str, Any] = {}
    for record in read_json(find_file(data, annotations, source))["annotations"]:
        if str(record["question_id"]) in answers:
            raise TaskError(f"{annotations}: question {record['question_id']} is annotated twice")
        answers[str(record["question_id"])] = record
    items = []
    path = find_file(data, questions, source)
    for record in read_json(path)["questions"]:
        name = str(record["question_id"])
        if name not in answers:
            raise TaskError(f"{path}: question {name} has no annotation in {annotations}")
        given = [answer["answer"] for answer in answers[name]["answers"]]
        image = f"COCO_val2014_{int(record['image_id']):012d}.jpg"
        question = f"{record['question']}\n{SHORT_ANSWER}"
        items.append(Item(name, str(answers[name].get("answer_type", "other")), image, question, given))
    return items


VQA_SOURCE = "https://visualqa.org/download.html"
OKVQA_SOURCE = "https://okvqa.allenai.org/download.html"
register_task(
    Task(
        name="vqav2",
        protocol="llava",
        prompt="question, short answer",
        read=lambda data: coco_items(
            data,
            "v2_OpenEnded_mscoco_val2014_questions.json",
            "v2_mscoco_val2014_annotations.json",
            VQA_SOURCE,
        ),
        images=lambda data: FolderImages(image_folder(data, "val2014")),
        score=score,
        metrics=metrics,
        about="VQAv2 validation (VQA accuracy); test-dev is vqav2_testdev",
    )
)
register_task(
    Task(
        name="okvqa",
        protocol="llava",
        prompt="question, short answer",
        read=lambda data: coco_items(
            data, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", OKVQA_SOURCE
        ),
        images=lambda data: FolderImages(image_folder(data, "val2014")),
        score=score,
        metrics=metrics,
        about="OK-VQA validation: questions that need knowledge (VQA accuracy)",
    )
)


def hidden_items(file: str, data: Path) -> list[Item]:
    """Return the questions of one of LLaVA's question files whose answers are hidden."""
    path = find_file(data, file, LLAVA_EVAL)
    return [
        Item(str(record["question_id"]), "hidden", record["image"], record["text"], None)
        for _, record in read_questions(path)
    ]


def upload_vqav2(pairs: list[Pair], folder: Path) -> Path:
    """Write the file that EvalAI's VQAv2 server takes."""
    path = folder / "vqav2_evalai.json"
    rows = [{"question_id": int(item.id), "answer": normalize(prediction)} for prediction, item in pairs]
    path.write_text(json.dumps(rows))
    return path


register_task(
    Task(
        name="vqav2_testdev",
        protocol="llava",
        prompt="question, short answer",
        read=partial(hidden_items, "llava_vqav2_mscoco_test-dev2015.jsonl"),
        images=lambda data: FolderImages(image_folder(data, "test2015")),
        score=None,
        upload=upload_vqav2,
        about="VQAv2 test-dev: answers are hidden, writes the EvalAI file",
    )
)


# ---- VizWiz ----------------------------------------------------------------------------------------------------

VIZWIZ_SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa/"


def vizwiz_items(data: Path) -> list[Item]:
    """Return the validation questions; an item's id is its picture's name."""
    return [
        Item(
            record["image"],
            str(record.get("answer_type", "other")),
            record["image"],
            f"{record['question']}\n{UNANSWERABLE}\n{SHORT_ANSWER}",
            [answer["answer"] for answer in record["answers"]],
        )
        for record in read_json(find_file(data, "val.json", VIZWIZ_SOURCE))
    ]


def vizwiz_key(prediction: Prediction, where: str) -> str:
    """Return the picture's name; LLaVA's ids may lack its extension."""
    return prediction.id if "." in prediction.id else f"{prediction.id}.jpg"


def upload_vizwiz(pairs: list[Pair], folder: Path) -> Path:
    """Write the file that VizWiz's server takes."""
    path = folder / "vizwiz_upload.json"
    rows = [{"image": item.image, "answer": normalize(prediction)} for prediction, item in pairs]
    path.write_text(json.dumps(rows))
    return path


register_task(
    Task(
        name="vizwiz",
        protocol="llava",
        prompt="question, unanswerable hint, short answer",
        read=vizwiz_items,
        images=lambda data: FolderImages(image_folder(data, "val")),
        score=score,
        metrics=metrics,
        key=vizwiz_key,
        about="VizWiz validation: blind people's questions (VQA accuracy)",
    )
)
register_task(
    Task(
        name="vizwiz_test",
        protocol="llava",
        prompt="question, unanswerable hint, short answer",
        read=partial(hidden_items, "llava_test.jsonl"),
        images=lambda data: FolderImages(image_folder(data, "test")),
        score=None,
        upload=upload_vizwiz,
        about="VizWiz test: answers are hidden, writes the upload file",
    )
)
