"""Finished evaluations made by hand, on benchmarks made by hand: every number of their table can be counted."""

from dataclasses import replace

import numpy as np

from prunetune.configs import ModelConfig
from prunetune.evaluation.metrics.metric import Metric, tallied
from prunetune.evaluation.records import (
    CodeRecord,
    KeptTokens,
    Manifest,
    ProjectorRecord,
    Result,
    TaskRecord,
    TaskSummary,
    results_hash,
    write_manifest,
    write_results,
)
from prunetune.evaluation.tasks import base
from prunetune.evaluation.tasks.base import (
    ACCURACY,
    Benchmark,
    Item,
    Scorer,
    items_hash,
    score_as_a_set,
    unit_of,
)
from prunetune.pruning import PruningSpec


def right(prediction, item):
    return float(prediction) if item.answer == "graded" else float(prediction == item.answer)


def tally_f1(scored):
    rows = []
    for one in scored:
        yes, true = one.prediction == "yes", one.item.answer == "yes"
        rows.append((yes and true, yes and not true, true and not yes))
    return tallied([unit_of(one.item) for one in scored], rows)


def f1(counts):
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * 2 * counts[..., 0] / (2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


F1 = Metric("f1", "%", "F1 of yes; images are drawn", tally_f1, f1)
ERRORS = replace(ACCURACY, name="errors", higher=False, value=lambda counts: 100 - ACCURACY.value(counts))


def benchmark(name, scorer):
    return Benchmark(name, "by hand", "question", "", [], scorer)


BENCHMARKS = {
    task.name: task
    for task in (
        benchmark("many", Scorer(right)),
        benchmark("few", Scorer(right)),
        benchmark("yes_no", Scorer(right, metrics=(F1, ACCURACY))),
        benchmark("faults", Scorer(right, metrics=(ERRORS,))),
        benchmark("captions", Scorer(score_as_a_set)),
        benchmark("secret", None),
    )
}


def register(monkeypatch, **changed):
    """Have the benchmarks above, some of them as they are given."""
    base.tasks()
    for name, task in {**BENCHMARKS, **changed}.items():
        monkeypatch.setitem(base._TASKS, name, task)


def questions(number, per_image=1, answer="a", kinds=("one",)):
    """Return items: as many of an image, of kinds by turns."""
    return [Item(str(n), kinds[n % len(kinds)], f"{n // per_image}.jpg", "what ?", answer) for n in range(number)]


def write_arm(
    folder,
    answers,
    pruning=("identity", "100%"),
    adapter=None,
    tuned_for=None,
    elastic=None,
    metrics=None,
    model="some/model-7b",
    stored=True,
    **fields,
):
    """Write an arm.

    Args:
        folder: its folder.
        answers: by benchmark, its items and what the arm says to each.
        pruning: method, budget and options, or all that it can say.
        adapter: name of the projector; None is the base's own.
        tuned_for: the pruning that it was tuned for; None is the arm's.
        elastic: settings of an elastic one.
        metrics: the summaries of benchmarks that only have one as a set.
        model: the base.
        stored: whether scores are stored as today's scorers say, or a function of score and item.
        fields: of the manifest.
    """
    spec = pruning if isinstance(pruning, PruningSpec) else PruningSpec(*pruning)
    rows, records, summaries = [], {}, {}
    for name, (items, said) in answers.items():
        records[name] = TaskRecord(items=len(items), hash=items_hash(items), protocol="by hand", prompt="question")
        summaries[name] = (metrics or {}).get(name, TaskSummary(metrics={}, interval_95=None))
        for item, text in zip(items, said, strict=True):
            score = base.get_task(name).score(text, item).score
            if stored is not True:
                score = stored(score, item)
            rows.append(Result(task=name, id=item.id, source=item.source, image=item.image, question=item.question,
                               answer=item.answer, prediction=text, score=score, kept=16))  # fmt: skip
    folder.mkdir(parents=True)
    write_results(folder, rows)
    keep = spec.keep if isinstance(spec.keep, int) else 576
    projector = ProjectorRecord(
        adapter=adapter, hash=f"{adapter}-loaded", stored_hash=None if adapter is None else f"{adapter}-stored",
        tuned_for=None if adapter is None else (tuned_for or spec).model_dump(), elastic=elastic,
    )  # fmt: skip
    values = {
        "model": ModelConfig(path=model), "frozen_hash": f"{model}-frozen", "original_projector_hash": "o" * 16,
        "projectors": ["projector"], "settings_hash": "s", "template_hash": "t", "projector": projector,
        "pruning": spec, "tasks": records, "batch_size": 8, "max_new_tokens": 9, "image_processor": "P",
        "device": "a GPU", "versions": {"torch": "3"},
        "prunetune": CodeRecord(version="1", sha256="c" * 64, commit=None, dirty=None),
    }  # fmt: skip
    manifest = Manifest(**{**values, **fields})
    kept = KeptTokens(mean=float(keep), min=keep, max=keep)
    write_manifest(folder, manifest.finished(summaries, kept, None, results_hash(folder)))
    return folder


def says(number, of, answer="a"):
    """Return the answers of an arm that is right in the first ``number`` questions."""
    return [answer] * number + ["b"] * (of - number)
