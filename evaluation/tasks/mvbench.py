"""MVBench: twenty kinds of questions about what happens in a video, multiple choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.data_recipes.parquet import parquet_rows
from prunetune.data_recipes.videos import NamedVideos, part_of
from prunetune.evaluation.errors import MissingFile, TaskError
from prunetune.evaluation.files import read_json
from prunetune.evaluation.metrics.choices import chosen_letter
from prunetune.evaluation.metrics.metric import Metric, Tally, mean_of_groups, share, tallied
from prunetune.evaluation.readers import PublishedFiles, videos_below
from prunetune.evaluation.tasks.base import ACCURACY, Benchmark, Item, Scored, Scorer, averaged, register_task, unit_of

SOURCE = "https://huggingface.co/datasets/OpenGVLab/MVBench (the folder json, and video unpacked)"
INSTRUCTION = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
ENDING = "Only give the best option."
LETTERS = "ABCDEFGH"


def read_items(data: Path) -> list[Item]:
    """Return the questions of all tasks whose file is there, ``action_antonym.json`` and so on, tasks in order.

    Raises:
        MissingFile: if there is no such file.
    """
    files = sorted(_folder(data, "json").glob("*.json"))
    if not files:
        raise MissingFile(f"{data} holds no json/TASK.json; get it from {SOURCE}")
    items = []
    for path in files:
        records = read_json(path)
        if not isinstance(records, list):
            raise TaskError(f"{path} must hold a list of questions, got {type(records).__name__}")
        items += _items(path.stem, records)
    return items


def _folder(data: Path, name: str) -> Path:
    return data / name if (data / name).is_dir() else data


def _items(task: str, records: Iterable[dict[str, Any]]) -> list[Item]:
    return [item_of(task, record, number) for number, record in enumerate(records)]


def item_of(task: str, record: dict[str, Any], number: int) -> Item:
    """Return a record of a task's file as an item; it may ask about a part of its video.

    Raises:
        TaskError: if its answer is none of its candidates.
    """
    candidates = [str(text) for text in record["candidates"]]
    name = f"{task}/{number}"
    if record["answer"] not in candidates:
        raise TaskError(f"question {name}: the answer {record['answer']!r} is none of its candidates")
    options = dict(zip(LETTERS, candidates, strict=False))
    lines = [INSTRUCTION, f"Question: {record['question']}", "Options:"]
    for letter, text in options.items():
        lines.append(f"({letter}) {text}")
    video = str(record["video"])
    if record.get("end") is not None:
        video = part_of(video, float(record.get("start") or 0), float(record["end"]))
    answer = {"letter": LETTERS[candidates.index(record["answer"])], "options": options}
    return Item(name, task, video, "\n".join([*lines, ENDING]), answer)


class Tables:
    """The layout of the hub's Parquet files and of lmms-lab: a folder per task, with the columns of the JSON files."""

    def read(self, data: Path) -> list[Item]:
        """Return the items, tasks in order.

        Raises:
            MissingFile: if there is no Parquet file.
        """
        files: dict[str, list[Path]] = {}
        for path in sorted(data.rglob("*.parquet")):
            files.setdefault(path.parent.name, []).append(path)
        if not files:
            raise MissingFile(f"{data} holds no Parquet file")
        items = []
        for task, paths in sorted(files.items()):
            items += _items(task, parquet_rows(paths))
        return items

    def read_answers(self, data: Path) -> list[Item]:
        """Return the items: the answers are in the same rows."""
        return self.read(data)

    def open_images(self, data: Path) -> NamedVideos:
        """Return the videos."""
        return NamedVideos(data, ("video", "videos"))


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter, or the text of the right option."""
    return float(chosen_letter(prediction, item.answer["options"]) == item.answer["letter"])


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy in percent over all questions, and the mean over tasks, which is the published average."""
    mean = averaged(scored)
    return {"accuracy": mean.overall, "task_mean": sum(mean.by_source.values()) / len(mean.by_source)}


def tally(scored: Sequence[Scored]) -> Tally:
    """Return right answers and questions of every task that is there, by video (U, 2 tasks)."""
    tasks = sorted({one.item.source for one in scored})
    rows = []
    for one in scored:
        row = np.zeros((len(tasks), 2))
        row[tasks.index(one.item.source)] = one.score or 0, 1
        rows.append(row.ravel().tolist())
    return tallied([unit_of(one.item) for one in scored], rows)


def mean_over_tasks(counts: np.ndarray) -> np.ndarray:
    """Return the mean of the tasks' accuracies in percent, of counts (..., 2 tasks)."""
    right, questions = np.moveaxis(counts.reshape(*counts.shape[:-1], -1, 2), -1, 0)
    return 100 * mean_of_groups(share(right, questions), questions > 0)


METRICS = (
    Metric("task_mean", "%", "mean of the tasks' accuracies; videos are drawn", tally, mean_over_tasks),
    replace(ACCURACY, about="accuracy over all questions; videos are drawn"),
)


register_task(
    Benchmark(
        name="mvbench",
        protocol="mvbench",
        prompt="instruction, question, options",
        about="MVBench: 20 kinds of questions about videos, multiple choice",
        readers=[PublishedFiles(read_items, videos_below("video", "videos")), Tables()],
        scorer=Scorer(score, summarise, METRICS),
        source_is="task",
        notes=('the published prompt also begins the answer, "Best option:("; here the model begins it itself',),
        video=True,
    )
)
