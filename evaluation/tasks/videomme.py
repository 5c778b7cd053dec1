"""Video-MME: multiple choice about short, medium and long videos, without subtitles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, VideoRows
from prunetune.evaluation.metrics.choices import first_letter
from prunetune.evaluation.readers import PublishedFiles, videos_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, Scorer, averaged, register_task

SOURCE = "https://github.com/MME-Benchmarks/Video-MME (evaluation/output_test_template.json)"
FILE = "output_test_template.json"
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)
ENDING = "The best answer is:"
VIDEOS = videos_below("data", "videos", "video")


def read_items(data: Path) -> list[Item]:
    """Return the questions of the authors' template, a record per video; the source is the video's length class."""
    items = []
    for video in read_json(find_file(data, FILE, SOURCE)):
        for question in video["questions"]:
            items.append(_item({**video, **question}))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table."""
    return _item(row)


def _item(record: dict[str, Any]) -> Item:
    """Return a question as an item; options carry their letters."""
    question = "\n".join([INSTRUCTION, record["question"], *record["options"], ENDING])
    return Item(str(record["question_id"]), record["duration"], _video(record), question, record["answer"])


def _video(record: dict[str, Any]) -> str:
    """Return the name of a question's video file: YouTube's, by which the videos are published."""
    if "videoID" in record:
        return str(record["videoID"])
    return str(record["url"]).rpartition("v=")[2]


def score(prediction: str, item: Item) -> float:
    """Return 1 for the right letter."""
    return float(first_letter(prediction, "ABCD") == item.answer)


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return accuracy in percent, over all questions and over those of each length class."""
    mean = averaged(scored)
    return {"accuracy": mean.overall, **{f"{name}_accuracy": value for name, value in sorted(mean.by_source.items())}}


register_task(
    Benchmark(
        name="videomme",
        protocol="video-mme",
        prompt="instruction, question, options",
        about="Video-MME without subtitles: short, medium and long videos, multiple choice",
        readers=[PublishedFiles(read_items, VIDEOS), VideoRows(ParquetRows("videomme", read_row), VIDEOS)],
        scorer=Scorer(score, summarise),
        source_is="length",
        video=True,
    )
)
