"""OCRBench: reading text in images; an answer counts when the prediction holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.files import find_file, read_json
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.metric import Metric
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, Scorer, register_task, tally_scores

SOURCE = "https://github.com/Yuliang-Liu/MultimodalOCR (OCRBench/OCRBench.json and its pictures)"
# Handwritten mathematics, the only part whose answers are LaTeX.
FORMULAS = "HME100k"
# Unicode has the printable ASCII characters once more, as wide as a Chinese one, 0xFEE0 further on.
_PLAIN = {code + 0xFEE0: code for code in range(ord("!"), ord("~") + 1)} | {0x3000: ord(" ")}


def read_items(data: Path) -> list[Item]:
    """Return the questions; the source is the kind of task."""
    items = []
    for number, record in enumerate(read_json(find_file(data, "OCRBench.json", SOURCE))):
        name = str(record.get("id", number))
        answer = answer_of(record["answers"], record["dataset_name"])
        items.append(Item(name, record["type"], record["image_path"], record["question"], answer))
    return items


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which carries no id."""
    answer = answer_of(row["answer"], row["dataset"])
    return Item(str(number), row["question_type"], image_in_row(number), row["question"], answer)


def answer_of(answers: Any, dataset: str) -> dict[str, Any]:
    """Return any of the answers, one alone or a list, and whether they are formulas."""
    if not isinstance(answers, list):
        answers = [answers]
    return {"any": [str(answer) for answer in answers], "formula": dataset == FORMULAS}


def score(prediction: str, item: Item) -> float:
    """Return 1 if the prediction holds one of the answers, full-width letters and digits taken for plain ones.

    Of formulas spaces don't count, of everything else the case.
    """
    if item.answer["formula"]:
        return official_score(prediction, item)
    answers = [fold(answer) for answer in item.answer["any"]]
    return _held(fold(prediction), answers, formula=False)


def official_score(prediction: str, item: Item) -> float:
    """Return 1 if the prediction holds one of the answers as they are; see :func:`score` for what does not count."""
    return _held(prediction, item.answer["any"], item.answer["formula"])


def fold(text: str) -> str:
    """Return a text with full-width ASCII and the ideographic space as plain ASCII, and all else as it is."""
    return text.translate(_PLAIN)


def _held(prediction: str, answers: Sequence[str], formula: bool) -> float:
    # Held and not equal: models read the text out within a sentence, and reading is what is asked for.
    said = _comparable(prediction, formula)
    return float(any(_comparable(answer, formula) in said for answer in answers))


def _comparable(text: str, formula: bool) -> str:
    line = text.strip().replace("\n", " ")
    # In a formula x and X are two variables, while spaces mean nothing in LaTeX.
    return line.replace(" ", "") if formula else line.lower()


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the number of right answers (of 1,000 in the published set), in all and by kind."""
    # Answers found, not percent: of 1,000 questions, as the leaderboard has it.
    kinds: dict[str, int] = {}
    for one in scored:
        kinds[one.item.source] = kinds.get(one.item.source, 0) + int(one.score or 0)
    return {"score": sum(kinds.values()), "of": len(scored), "by_kind": kinds}


METRICS = (Metric("score", "points", "answers found; pictures are drawn", tally_scores, lambda counts: counts[..., 0]),)

register_task(
    Benchmark(
        name="ocrbench",
        protocol="lmms-eval",
        prompt="question",
        about="OCRBench: reading text in pictures (answers found, of 1,000)",
        readers=[PublishedFiles(read_items, images_below("OCRBench_Images")), ParquetRows("ocrbench", read_row)],
        scorer=Scorer(score, summarise, METRICS),
        others={"official": Scorer(official_score, summarise, METRICS)},
        source_is="kind",
    )
)
