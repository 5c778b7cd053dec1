"""LLaVA-Bench in the wild: open answers about 24 images, which a language model compares with GPT-4's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import find_file, read_lines, read_questions
from prunetune.evaluation.lmms_lab import ParquetRows, Row, image_in_row
from prunetune.evaluation.metrics.metric import interval, resampled, tallied
from prunetune.evaluation.readers import PublishedFiles, images_below
from prunetune.evaluation.tasks.base import Benchmark, Item, Scored, register_task, unit_of
from prunetune.outputs import write_text

QUESTIONS = "questions.jsonl"
REFERENCES = "answers_gpt4.jsonl"
CONTEXTS = "context.jsonl"
SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
CATEGORIES = ("conv", "detail", "complex")

# What LLaVA's script asks its judge, to the letter: the scores depend on every word of it.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TASK = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in "
    "the image is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, "
    "accuracy, level of details of their responses. Each assistant receives an overall score on a scale of 1 to 10, "
    "where a higher score indicates better overall performance.\nPlease first output a single line containing only "
    "two values indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a "
    "space.\nIn the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any "
    "potential bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


def read_items(data: Path) -> list[Item]:
    """Return the questions; the answer holds GPT-4's and what the image shows, for the judge alone."""
    references = {str(record["question_id"]): record["text"] for _, record in _lines(data, REFERENCES)}
    contexts = {record["image"]: record["caption"] for _, record in _lines(data, CONTEXTS)}
    items = []
    for line, record in read_questions(find_file(data, QUESTIONS, SOURCE)):
        name, image = str(record["question_id"]), record["image"]
        if name not in references or image not in contexts:
            lacking = f"{REFERENCES} has no answer" if name not in references else f"{CONTEXTS} has no text"
            raise TaskError(f"{QUESTIONS}, line {line}: {lacking} for question {name}; get it from {SOURCE}")
        items.append(_item(name, record["category"], image, record["text"], references[name], contexts[image]))
    return items


def _lines(data: Path, file: str) -> Any:
    return read_lines(find_file(data, file, SOURCE))


def read_row(row: Row, number: int) -> Item:
    """Return a row of lmms-lab's table, which has all three in columns."""
    image = image_in_row(number)
    return _item(str(row["question_id"]), row["category"], image, row["question"], row["gpt_answer"], row["caption"])


def _item(name: str, category: str, image: str, question: str, reference: str, context: Any) -> Item:
    if category not in CATEGORIES:
        raise TaskError(f"question {name}: {category!r} is none of {', '.join(CATEGORIES)}")
    # Some files hold a list of sentences, others one text.
    text = "\n".join(context) if isinstance(context, list) else context
    return Item(name, category, image, question, {"reference": reference, "context": text})


def judge_prompt(prediction: str, item: Item) -> str:
    """Return what the judge is asked about an answer: GPT-4's is the first assistant, the model the second."""
    return (
        f"[Context]\n{item.answer['context']}\n\n"
        f"[Question]\n{item.question}\n\n"
        f"[Assistant 1]\n{item.answer['reference']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{prediction}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{TASK}\n\n"
    )


def read_scores(reply: str) -> tuple[float, float]:
    """Return the two scores in the first line of a review.

    Raises:
        TaskError: if there are not two, or GPT-4's is none that anything can be divided by.
    """
    line = reply.strip().split("\n")[0]
    numbers = re.findall(r"\d+(?:\.\d+)?", line)
    if len(numbers) != 2 or float(numbers[0]) <= 0:
        raise TaskError(f"the judge replied {line!r}, expected two scores from 1 to 10 in the first line")
    return float(numbers[0]), float(numbers[1])


def judge(ask: Callable[[str, str], str], scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the model's scores in percent of GPT-4's, in all and by category, with an interval over images.

    Args:
        ask: returns a language model's reply to a system's and a user's message.
        scored: the predictions.
    """
    from tqdm import tqdm

    rows = []
    for one in tqdm(scored, desc="judging", unit="answer", dynamic_ncols=True):
        reference, own = read_scores(ask(SYSTEM, judge_prompt(one.prediction, one.item)))
        rows.append((own, reference))
    tally = tallied([unit_of(one.item) for one in scored], rows)
    draws = resampled([tally])[:, 0]  # (R, 2)
    by_category: dict[str, list[tuple[float, float]]] = {}
    for one, row in zip(scored, rows, strict=True):
        by_category.setdefault(one.item.source, []).append(row)
    return {
        "relative_score": _percent(rows),
        "relative_score_interval_95": interval(100 * draws[:, 0] / draws[:, 1]),
        "by_category": {name: _percent(own) for name, own in sorted(by_category.items())},
    }


def _percent(rows: Sequence[tuple[float, float]]) -> float:
    return 100 * sum(own for own, _ in rows) / sum(reference for _, reference in rows)


def upload(scored: Sequence[Scored], folder: Path) -> Path:
    """Write the answers as LLaVA's own judging script reads them, a JSON object per line."""
    lines = []
    for one in scored:
        row: Mapping[str, Any] = {
            "question_id": int(one.item.id),
            "prompt": one.item.question,
            "text": one.prediction,
            "answer_id": f"prunetune-{one.item.id}",
            "model_id": "prunetune",
            "metadata": {},
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = folder / "llava_bench_answers.jsonl"
    write_text(path, "".join(lines))
    return path


register_task(
    Benchmark(
        name="llava_bench",
        protocol="llava",
        prompt="question",
        about="LLaVA-Bench in the wild: open answers, judged beside GPT-4's; writes the judge's file",
        readers=[PublishedFiles(read_items, images_below("images")), ParquetRows("llava_bench", read_row)],
        # As MM-Vet: the answers are there, but only a language model can compare open answers with them.
        scorer=None,
        upload=upload,
        judge=judge,
        notes=(
            "a review without two scores is an error; LLaVA's script counts it as -1 and -1",
            "the judge decodes greedily; LLaVA's script asks at temperature 0.2",
        ),
    )
)
