"""VQAv2: validation, and test-dev, whose answers are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.lmms_lab import ParquetRows
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, Scorer, register_task
from prunetune.evaluation.tasks.vqa import METRICS, coco_items, hidden_items, read_row, score, summarise, write_answers

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
SOURCE = "https://visualqa.org/download.html"
TESTDEV = "llava_vqav2_mscoco_test-dev2015.jsonl"


def read_items(data: Path) -> list[Item]:
    """Return the validation questions."""
    return coco_items(data, QUESTIONS, ANNOTATIONS, SOURCE)


# What papers report: validation, above, is for whoever wants a number without a server.
def read_testdev(data: Path) -> list[Item]:
    """Return the questions of test-dev as LLaVA asks them."""
    return hidden_items(data, TESTDEV)


def upload(scored: Sequence[Scored], folder: Path) -> Path:
    """Write the file that EvalAI's VQAv2 server takes."""
    return write_answers(folder / "vqav2_evalai.json", scored, "question_id")


register_task(
    Benchmark(
        name="vqav2",
        protocol="llava",
        prompt="question, short answer",
        about="VQAv2 validation (VQA accuracy); test-dev is vqav2_testdev",
        readers=[PublishedFiles(read_items, images_below("val2014")), ParquetRows("vqav2", read_row)],
        scorer=Scorer(score, summarise, METRICS),
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
    )
)
