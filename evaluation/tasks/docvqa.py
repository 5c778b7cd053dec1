"""DocVQA and InfographicVQA: reading documents and infographics, compared by ANLS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.anls import anls
from prunetune.evaluation.metrics.metric import Metric
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import (
    SHORT_ANSWER,
    Benchmark,
    Item,
    Scored,
    Scorer,
    averaged,
    register_task,
    tally_scores,
)
from prunetune.outputs import write_text

SOURCE = "https://rrc.cvc.uab.es/?ch=17&com=downloads ({})"


def read_items(name: str, file: str, task: str, data: Path) -> list[Item]:
    """Return the questions of one of the challenge's files, ``{"data": [...]}``."""
    items = []
    for record in read_json(find_file(data, file, SOURCE.format(task)))["data"]:
        # DocVQA's names begin with a folder, infographics have their local name beside an address.
        image = record.get("image_local_name") or record["image"]
        items.append(_item(name, record, str(image).removeprefix("documents/")))
    return items


def read_row(name: str, split: str, row: Row, number: int) -> Item | None:
    """Return a row of lmms-lab's table; None for one of another split, of which a folder may hold the files."""
    if row.get("data_split", split) != split:
        return None
    return _item(name, row, image_in_row(number))


def _item(name: str, record: Mapping[str, Any], image: str) -> Item:
    """Return a question as lmms-eval asks it, which is LLaVA's form; the answers of the test sets are hidden."""
    answers = list(record.get("answers") or [])
    if not name.endswith("_test") and not answers:
        raise TaskError(f"{name}: question {record['questionId']} has no answers; is it the file of the test set?")
    question = f"{record['question']}\n{SHORT_ANSWER}"
    source = "hidden" if name.endswith("_test") else _kind(record)
    return Item(str(record["questionId"]), source, image, question, None if name.endswith("_test") else answers)


def _kind(record: Mapping[str, Any]) -> str:
    """Return what kinds of question or answer the files call it, joined; a question may be of several."""
    kinds = record.get("question_types") or record.get("answer_type") or []
    return ", ".join(sorted(str(kind) for kind in kinds)) or "other"


def score(prediction: str, item: Item) -> float:
    """Return the ANLS, from 0 to 1."""
    return anls(prediction, item.answer)


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the mean ANLS in percent, as papers print it, and by kind; a question of two kinds counts for both."""
    kinds: dict[str, list[float]] = {}
    for one in scored:
        for kind in one.item.source.split(", "):
            kinds.setdefault(kind, []).append(one.score or 0.0)
    by_kind = {kind: 100 * sum(scores) / len(scores) for kind, scores in sorted(kinds.items())}
    return {"anls": averaged(scored).overall, "by_kind": by_kind}


def upload(name: str, scored: Sequence[Scored], folder: Path) -> Path:
    """Write what the challenge's server takes: a JSON list of ``{"questionId": NUMBER, "answer": TEXT}``."""
    rows = [{"questionId": int(one.item.id), "answer": one.prediction} for one in scored]
    path = folder / f"{name}_upload.json"
    write_text(path, json.dumps(rows, ensure_ascii=False))
    return path


ANLS = Metric(
    name="anls",
    unit="%",
    about="mean ANLS of the questions; images are drawn",
    tally=tally_scores,
    value=lambda counts: 100 * counts[..., 0] / counts[..., 1],
)

_TITLES = {
    "docvqa": ("DocVQA", "val_v1.0_withQT.json", "test_v1.0.json", "documents", "Single Page Document VQA"),
    "infovqa": (
        "InfographicVQA",
        "infographicsVQA_val_v1.0_withQT.json",
        "infographicsVQA_test_v1.0.json",
        "images",
        "Infographics VQA",
    ),
}

for _name, (_title, _validation, _test, _images, _task) in _TITLES.items():
    register_task(
        Benchmark(
            name=_name,
            protocol="lmms-eval",
            prompt="question, short answer",
            about=f"{_title} validation: reading {_images if _name == 'docvqa' else 'infographics'} (ANLS)",
            readers=[
                PublishedFiles(partial(read_items, _name, _validation, _task), images_below(_images)),
                ParquetRows(_name, partial(read_row, _name, "val")),
            ],
            scorer=Scorer(score, summarise, metrics=(ANLS,)),
        )
    )
    register_task(
        Benchmark(
            name=f"{_name}_test",
            protocol="lmms-eval",
            prompt="question, short answer",
            about=f"{_title} test, hidden answers; writes the server's file",
            readers=[
                PublishedFiles(partial(read_items, f"{_name}_test", _test, _task), images_below(_images)),
                ParquetRows(f"{_name}_test", partial(read_row, f"{_name}_test", "test")),
            ],
            scorer=None,
            upload=partial(upload, f"{_name}_test"),
        )
    )
