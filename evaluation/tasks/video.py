"""Video question answering in Video-ChatGPT's format: TGIF, MSVD, MSRVTT and ActivityNet.

The families there are encode no videos, so these tasks score saved predictions; they do not run.
"""

from __future__ import annotations

import json
from pathlib import Path

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.metrics.vqa import normalize
from prunetune.evaluation.tasks.base import Item, Pair, Task, TaskError, register_task

SOURCE = "https://github.com/PKU-YuanGroup/Video-LLaVA (eval/GPT_Zero_Shot_QA, test_q.json and test_a.json)"
NAMES = {
    "tgif": "TGIF-QA",
    "msvd": "MSVD-QA",
    "msrvtt": "MSRVTT-QA",
    "activitynet": "ActivityNet-QA",
}


def read_answers(data: Path) -> list[Item]:
    """Return the questions with their answers; the picture is the video's name.

    Raises:
        TaskError: for a question without an answer, or a repeated id.
    """
    path = find_file(data, "test_q.json", SOURCE)
    answers = {str(record["question_id"]): record["answer"] for record in read_json(path.with_name("test_a.json"))}
    items: dict[str, Item] = {}
    for record in read_json(path):
        number = str(record["question_id"])
        if number in items:
            raise TaskError(f"{path}: question_id {number} is there twice")
        if number not in answers:
            raise TaskError(f"{path}: question {number} has no answer in test_a.json")
        items[number] = Item(number, "video", str(record["video_name"]), record["question"], answers[number])
    return list(items.values())


def refuse(data: Path) -> list[Item]:
    """Say that these tasks can't be run."""
    raise TaskError(
        "no model family here encodes videos; score predictions made elsewhere: `prunetune score TASK --predictions "
        "FILE --data DIR`"
    )


def score(prediction: str, item: Item) -> float:
    """Return 1 if the answers are the same after the normalisation of VQA answers."""
    return float(normalize(prediction) == normalize(str(item.answer)))


def write_predictions(pairs: list[Pair], path: Path) -> None:
    """Write predictions as Video-ChatGPT's graders read them, a JSON object per line."""
    rows = [
        {"id": i.id, "video_name": i.image, "question": i.question, "answer": i.answer, "pred": p} for p, i in pairs
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


for _name, _title in NAMES.items():
    register_task(
        Task(
            name=_name,
            protocol="video-chatgpt",
            prompt="question",
            read=refuse,
            answers=read_answers,
            images=refuse,  # type: ignore[arg-type]
            score=score,
            notes=("accuracy is exact match; the papers' is a language model's judgement, see --grader",),
            about=f"{_title}: scores saved predictions (exact match, or a grader)",
        )
    )
