"""Training-free accuracy of the bundled tiny VLM over methods and budgets, beside a blind guesser.

    python benchmarks/tiny_vlm.py [--scenes 300] [--methods divprune fps ...]

Prints a Markdown table; the numbers of ``assets/tiny_vlm/README.md`` come from here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from prunetune.assets import TINY_VLM
from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.metrics.averages import average
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.pruning import PruningSpec, registered_methods
from prunetune.tiny_world import ask, sample_scene, split_seeds
from prunetune.tiny_world.task import read_items

METHODS = [name for name in registered_methods() if name != "identity"]
OPTIONS = {  # what belongs to this small model: a layer it has, and its own complexity (prunetune calibrate)
    "hiprune": {"object_layer": 2},
    "vscan": {"shallow_layer": 2},
    "adaptive": {"erank_avg": 24.132},
}
BUDGETS = (72, 36, 16, 8)


def blind_accuracy(scenes: int, seen: int = 5000) -> float:
    """Return the accuracy in percent of answering every question text with its most frequent answer elsewhere."""
    votes: dict[str, Counter] = defaultdict(Counter)
    for seed in split_seeds("pretrain", seen):
        for question in ask(sample_scene(seed)):
            votes[question.text][question.answer] += 1
    items = read_items("test", scenes)
    right = sum(votes[i.question].most_common(1)[0][0] == i.answer for i in items if votes[i.question])
    return 100 * right / len(items)


def accuracy(folder: Path, pruning: PruningSpec, scenes: int) -> tuple[float, dict[str, float]]:
    """Return overall accuracy and accuracy per source, in percent."""
    config = EvaluateConfig(
        model=ModelConfig(path=str(TINY_VLM), dtype="float32"),
        pruning=pruning,
        tasks=["tiny_world"],
        limit=8 * scenes,
        batch_size=80,
        max_new_tokens=6,
        output=str(folder / f"{pruning.pruner}_{pruning.keep}"),
    )
    rows = read_results(evaluate(config))
    mean = average([row.score for row in rows], [row.source for row in rows])
    assert mean.overall is not None  # the tiny world hides no answers
    return mean.overall, mean.by_source


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    scenes = options.scenes
    with tempfile.TemporaryDirectory() as folder:
        dense, sources = accuracy(Path(folder), PruningSpec(), scenes)
        table = [[name] for name in options.methods]
        for row, name in zip(table, options.methods, strict=True):
            for keep in BUDGETS:
                pruning = PruningSpec(
                    pruner=name,
                    keep=keep,
                    options=OPTIONS.get(name, {}),
                    text_tower=str(TINY_VLM / "clip"),
                )
                overall, _ = accuracy(Path(folder), pruning, scenes)
                row.append(f"{overall:.1f}")
    print(
        f"\nblind {blind_accuracy(scenes):.1f}, dense {dense:.1f} "
        f"({', '.join(f'{name} {value:.1f}' for name, value in sources.items())})\n"
    )
    print("| training-free | " + " | ".join(f"{k} tokens ({100 * k / 144:.1f} %)" for k in BUDGETS) + " |")
    print("|---|" + "---:|" * len(BUDGETS))
    for row in table:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
