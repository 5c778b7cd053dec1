"""VQAv2: validation, and test-dev, whose answers are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.errors import MissingFile
from prunetune.evaluation.lmms_lab import ParquetRows
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, Scorer, register_task
from prunetune.evaluation.tasks.vqa import (
    LLAVA_EVAL,
    METRICS,
    coco_items,
    hidden_items,
    official_score,
    read_row,
    summarise,
    vqav2_score,
    write_answers,
)
from prunetune.screen import say

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
SOURCE = "https://visualqa.org/download.html"
TEST = "llava_vqav2_mscoco_test2015.jsonl"
TESTDEV = "llava_vqav2_mscoco_test-dev2015.jsonl"


def read_items(data: Path) -> list[Item]:
    """Return the validation questions."""
    return coco_items(data, QUESTIONS, ANNOTATIONS, SOURCE)


OFFICIAL = (
    "LLaVA's conversion, then the official vqaEval: answers that all people agree on are not normalised, of the others "
    "the punctuation alone; nothing is rounded"
)


# What papers report: validation, above, is for whoever wants a number without a server.
def read_testdev(data: Path) -> list[Item]:
    """Return the questions of test-dev as LLaVA asks them."""
    return hidden_items(data, TESTDEV)


def read_unasked(data: Path) -> list[Item]:
    """Return the questions of test2015 beside test-dev's; none, and a line that says so, where their file is not."""
    try:
        every = hidden_items(data, TEST)
    except MissingFile:
        say(
            f"{data} lacks {TEST} ({LLAVA_EVAL}): the upload holds the answers to test-dev alone, while EvalAI wants "
            "all of test2015; put the file there and run the same command again"
        )
        return []
    asked = {item.id for item in read_testdev(data)}
    return [item for item in every if item.id not in asked]


def upload(scored: Sequence[Scored], folder: Path) -> Path:
    """Write the file that EvalAI's VQAv2 server takes."""
    return write_answers(folder / "vqav2_evalai.json", scored, "question_id")


register_task(
    Benchmark(
        name="vqav2",
        protocol="lmms-eval",
        prompt="question, short answer",
        about="VQAv2 validation (VQA accuracy); test-dev is vqav2_testdev",
        readers=[PublishedFiles(read_items, images_below("val2014")), ParquetRows("vqav2", read_row)],
        scorer=Scorer(vqav2_score, summarise, METRICS),
        others={"official": Scorer(official_score, summarise, METRICS, (OFFICIAL,))},
        source_is="answer type",
    )
)
register_task(
    Benchmark(
        name="vqav2_testdev",
        protocol="llava",
        prompt="question, short answer",
        about="VQAv2 test-dev: answers are hidden, writes the EvalAI file",
        readers=[PublishedFiles(read_testdev, images_below("test2015"))],
        scorer=None,
        upload=upload,
        unasked=read_unasked,
        notes=("the upload holds every question of test2015, those beside test-dev's with an empty answer",),
    )
)
