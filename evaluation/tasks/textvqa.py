"""TextVQA, validation: reading text in images, with and without the OCR tokens that LLaVA puts into the prompt."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json, read_lines
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.readers import PublishedFiles, images_below, number_repeats
from prunetune.evaluation.tasks.base import (
    SHORT_ANSWER,
    Benchmark,
    Item,
    Pairing,
    Prediction,
    Scorer,
    register_task,
)
from prunetune.evaluation.tasks.vqa import LLAVA_EVAL, METRICS, people, score

ANNOTATIONS = "TextVQA_0.5.1_val.json"
WITH_OCR = "llava_textvqa_val_v051_ocr.jsonl"
SOURCE = "https://textvqa.org/dataset"


def read_items(data: Path) -> list[Item]:
    """Return the validation questions; ids are ``IMAGE/QUESTION``, lower-case, as LLaVA pairs them."""
    records = read_json(find_file(data, ANNOTATIONS, SOURCE))["data"]
    names = []
    answers = {}
    for record in records:
        name = _id(record["image_id"], record["question"])
        names.append(name)
        # Where an image is asked the same twice, LLaVA's scorer compares both answers with the last annotation.
        answers[name] = record["answers"]
    items = []
    for record, name, number in zip(records, names, number_repeats(names), strict=True):
        question = f"{capitalised(record['question'])}\n{SHORT_ANSWER}"
        items.append(Item(number, "textvqa", f"{record['image_id']}.jpg", question, answers[name]))
    return items


def read_items_with_ocr(data: Path) -> list[Item]:
    """Return the questions as LLaVA asks them, with the reference OCR tokens between question and format."""
    answers = {item.id: item.answer for item in read_items(data)}
    path = find_file(data, WITH_OCR, LLAVA_EVAL)
    lines = list(read_lines(path))
    names = []
    for line, record in lines:
        if not record.get("image"):
            raise TaskError(f"{path}, line {line}: question {record.get('question_id')!r} has no image")
        # LLaVA calls the image by the question's name; which question it is, only the prompt says.
        names.append(_id(record["question_id"], question_of(record["text"], f"{path}, line {line}")))
    items = []
    for (line, record), number in zip(lines, number_repeats(names), strict=True):
        if number not in answers:
            raise TaskError(f"{path}, line {line}: question {number!r} is not in {ANNOTATIONS}")
        items.append(Item(number, "textvqa", record["image"], capitalised(record["text"]), answers[number]))
    return items


def read_row(row: Row, number: int, ocr: bool) -> Item:
    """Return a row of lmms-lab's table, which has the OCR tokens in a column, in the same prompt."""
    lines = [capitalised(row["question"])]
    if ocr:
        lines.append(f"Reference OCR token: {', '.join(row['ocr_tokens'])}")
    lines.append(SHORT_ANSWER)
    name = _id(row["image_id"], row["question"])
    return Item(name, "textvqa", image_in_row(number), "\n".join(lines), people(row))


def capitalised(prompt: str) -> str:
    """Return a prompt whose first line, the question, is capitalised as lmms-eval does it, in every layout alike.

    LLaVA's file of prompts has it so; annotations and lmms-lab's table are lower-case.
    """
    # Whatever a capital within the question is, "NASA" or "What is this? Who", lower case: the two layouts write it
    # differently, and one benchmark must not ask two questions. A prompt that begins with its OCR tokens stays.
    question, line, rest = prompt.partition("\n")
    if question.startswith(("OCR tokens: ", "Reference OCR token: ")):
        return prompt
    return question.capitalize() + line + rest


def question_of(prompt: str, where: str) -> str:
    """Return the question within a TextVQA prompt of any of LLaVA's forms.

    Raises:
        TaskError: if the prompt has none of them.
    """
    # LLaVA's files have had three forms, with the OCR tokens before the question, behind it, or in one line with it.
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


def item_ids(predictions: list[Prediction], data: Path, where: str) -> list[str]:
    """Return the item of each prediction of LLaVA's (whose question_id is the image's) or of ours."""
    ids = []
    for prediction in predictions:
        if "/" in prediction.id and not prediction.prompt:
            ids.append(prediction.id)
            continue
        image = prediction.id.split("/")[0]
        ids.append(_id(image, question_of(prediction.prompt, f"{where}, line {prediction.line}")))
    return ids


def _id(image: str, question: str) -> str:
    # Both halves: an image has several questions, and many images have the same one.
    return f"{image}/{question.lower()}"


for _name, _read, _ocr in (("textvqa", read_items_with_ocr, True), ("textvqa_no_ocr", read_items, False)):
    _prompt = "question, reference OCR tokens, short answer" if _ocr else "question, short answer"
    register_task(
        Benchmark(
            name=_name,
            protocol="llava",
            prompt=_prompt,
            about=f"TextVQA validation, {_prompt} (VQA accuracy)",
            readers=[
                # Saved predictions need the annotations alone: what was asked is in their own prompts.
                PublishedFiles(_read, images_below("train_images"), answers=read_items),
                ParquetRows(_name, partial(read_row, ocr=_ocr), repeats=True),
            ],
            scorer=Scorer(score, metrics=METRICS),
            pairing=Pairing(item_ids),
        )
    )
