"""OK-VQA, validation: questions that need knowledge from outside the image."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prunetune.evaluation.lmms_lab import ParquetRows
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import SHORT_ANSWER, Benchmark, Item, Scorer, register_task
from prunetune.evaluation.tasks.vqa import METRICS, UNANSWERABLE, coco_items, read_row, score, summarise

# VQAv2's names but for their "v2_": files are found by their whole names, so one folder can hold both.
QUESTIONS = "OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "mscoco_val2014_annotations.json"
# lmms-eval's, whose numbers papers print: LLaVA's own scripts have no OK-VQA.
ENDING = f"{UNANSWERABLE}\n{SHORT_ANSWER}"
SOURCE = "https://okvqa.allenai.org/download.html"


def read_items(data: Path) -> list[Item]:
    """Return the validation questions."""
    return coco_items(data, QUESTIONS, ANNOTATIONS, SOURCE, ENDING)


register_task(
    Benchmark(
        name="okvqa",
        protocol="lmms-eval",
        prompt="question, unanswerable hint, short answer",
        about="OK-VQA validation: questions that need knowledge (VQA accuracy)",
        readers=[
            PublishedFiles(read_items, images_below("val2014")),
            ParquetRows("okvqa", partial(read_row, ending=ENDING)),
        ],
        scorer=Scorer(score, summarise, METRICS),
        source_is="answer type",
    )
)
