"""Accuracy of the bundled hard VLM by kind of question, whole and under training-free pruning, beside a blind guesser.

    python benchmarks/hard_vlm.py [--scenes 240] [--methods random divprune ...] [--keep 72 36 16]

Prints Markdown tables; the numbers of ``assets/hard_vlm/README.md`` come from here. Methods run as they were published,
nothing is fitted. Answers are the stock model's greedy ones, as ``prunetune evaluate`` gets them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from prunetune.assets import HARD_VLM
from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.records import Result, read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.tiny_world import split_seeds
from prunetune.tiny_world.hard import ask_hard, sample_hard_scene
from prunetune.tiny_world.hard.questions import KINDS
from prunetune.tiny_world.hard.task import read_hard_items

METHODS = ("random", "fastervlm", "vispruner", "prismprune", "divprune")


def blind_accuracy(scenes: int, split: str = "test", seen: int = 4000) -> float:
    """Return the accuracy in percent of answering every question text with its most frequent answer elsewhere."""
    votes: dict[str, Counter] = defaultdict(Counter)
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for seed in split_seeds("pretrain", seen):
        for question in ask_hard(sample_hard_scene(seed)):
            votes[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1
    items = read_hard_items(split, scenes)
    right = 0
    for item in items:
        # A question that was never asked gets the most frequent answer of its kind.
        known = votes.get(item.question) or by_kind[item.id.split("-")[2]]
        right += known.most_common(1)[0][0] == item.answer
    return 100 * right / len(items)


def measure(folder: Path, arm: Arm, scenes: int, task: str) -> list[Result]:
    """Return the rows of one arm."""
    config = EvaluateConfig(
        model=arm.base.config,
        pruning=arm.spec,
        tasks=[task],
        limit=10 * scenes,
        batch_size=80,
        max_new_tokens=6,
        output=str(folder),
    )
    return read_results(evaluate(config, arm))


def accuracy_by_kind(rows: list[Result]) -> dict[str, float]:
    """Return accuracy in percent by kind of question, the mean over all questions and its standard error by scene."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    by_scene: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        assert row.score is not None  # the world hides no answers
        seed, _, kind = row.id.split("-")
        by_kind[kind].append(row.score)
        by_scene[seed].append(row.score)
    of_scenes = [np.mean(scores) for scores in by_scene.values()]  # ten questions each
    means = {"all": 100 * float(np.mean(of_scenes))}
    means["standard error"] = 100 * float(np.std(of_scenes, ddof=1) / len(of_scenes) ** 0.5)
    for kind in KINDS:
        if by_kind[kind]:
            means[kind] = 100 * float(np.mean(by_kind[kind]))
    return means


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HARD_VLM)
    parser.add_argument("--task", default="hard_world", choices=["hard_world", "hard_world_validation"])
    parser.add_argument("--scenes", type=int, default=240)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--keep", nargs="+", type=int, default=[72, 36, 16])
    options = parser.parse_args()
    stock = Arm.load(ModelConfig(path=str(options.model), dtype="float32"), device="cpu")
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        columns["dense"] = accuracy_by_kind(measure(Path(folder) / "dense", stock, options.scenes, options.task))
        for method in options.methods:
            for keep in options.keep:
                arm = stock.with_pruning(PruningSpec(method, keep, text_tower=str(options.model / "clip")))
                rows = measure(Path(folder) / f"{method}{keep}", arm, options.scenes, options.task)
                columns[f"{method} {keep}"] = accuracy_by_kind(rows)
                print(f"{method} {keep}: {columns[f'{method} {keep}']['all']:.1f}", flush=True)
    split = "test" if options.task == "hard_world" else "validation"
    dense = columns["dense"]
    print(f"\nblind {blind_accuracy(options.scenes, split):.1f}, dense {dense['all']:.1f}")
    print("\n| kind | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for kind in dense:
        print(f"| {kind} | " + " | ".join(f"{column[kind]:.1f}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
