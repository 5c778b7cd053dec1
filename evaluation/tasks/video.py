"""Video question answering in Video-ChatGPT's format: TGIF, MSVD, MSRVTT and ActivityNet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, VideoRows
from prunetune.evaluation.metrics.vqa import normalize
from prunetune.evaluation.readers import PublishedFiles, videos_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scorer, register_task
from prunetune.outputs import write_text

SOURCE = "https://github.com/PKU-YuanGroup/Video-LLaVA (eval/GPT_Zero_Shot_QA, test_q.json and test_a.json)"
NAMES = {
    "tgif": "TGIF-QA",
    "msvd": "MSVD-QA",
    "msrvtt": "MSRVTT-QA",
    "activitynet": "ActivityNet-QA",
}


def read_items(data: Path) -> list[Item]:
    """Return the questions with their answers; the image is the video's name.

    Raises:
        TaskError: for a question without an answer, or a repeated id.
    """
    path = find_file(data, "test_q.json", SOURCE)
    # Beside the questions: every video benchmark calls its two files the same, so the folder says whose they are.
    answers = {}
    for record in read_json(path.with_name("test_a.json")):
        answers[str(record["question_id"])] = record["answer"]
    items: dict[str, Item] = {}
    for record in read_json(path):
        number = str(record["question_id"])
        if number in items:
            raise TaskError(f"{path}: question_id {number} is there twice")
        if number not in answers:
            raise TaskError(f"{path}: question {number} has no answer in test_a.json")
        items[number] = Item(number, "video", str(record["video_name"]), record["question"], answers[number])
    return list(items.values())


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's tables, which give the question's number and its video under several names."""
    name = row.get("question_id", row.get("id", number))
    video = row.get("video_name", row.get("video_id", row.get("video")))
    if video is None:
        raise KeyError("video_name")
    return Item(str(name), "video", str(video), row["question"], row["answer"])


def score(prediction: str, item: Item) -> float:
    """Return 1 if the answers are the same after the normalisation of VQA answers."""
    # A number that needs no language model: it is lower than the papers', but the same for everybody, every time.
    return float(normalize(prediction) == normalize(str(item.answer)))


def write_predictions(pairs: Iterable[tuple[str, Item]], path: Path) -> None:
    """Write predictions with their items as Video-ChatGPT's graders read them, a JSON object per line."""
    lines = []
    for prediction, item in pairs:
        row = {
            "id": item.id,
            "video_name": item.image,
            "question": item.question,
            "answer": item.answer,
            "pred": prediction,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


for _name, _title in NAMES.items():
    register_task(
        Benchmark(
            name=_name,
            protocol="video-chatgpt",
            prompt="question",
            about=f"{_title}: open questions about videos (exact match, or a grader)",
            readers=[
                PublishedFiles(read_items, videos_below("videos")),
                VideoRows(ParquetRows(_name, read_row), videos_below("videos")),
            ],
            video=True,
            scorer=Scorer(score),
            notes=("accuracy is exact match; the papers' is a language model's judgement, see --grader",),
        )
    )
