"""Training-free accuracy of the bundled tiny VLM over methods and budgets, beside a blind guesser.

    python benchmarks/tiny_vlm.py [--scenes 300] [--methods divprune fps ...]

Prints a Markdown table; the numbers of ``assets/tiny_vlm/README.md`` come from here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from configs import EvaluateConfig, ModelConfig, PruningConfig
from data_recipes.shapes_world import ask, sample_scene, split_seeds
from evaluation.arm import evaluate, read_results
from evaluation.tasks.tiny_world import read_items
from pruning import registered_methods

ROOT = Path(__file__).resolve().parent.parent
METHODS = [name for name in registered_methods() if name != "identity"]
OPTIONS = {  # what belongs to this small model: a layer it has, and its own complexity (prunetune calibrate)
    "hiprune": {"object_layer": 2},
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


def accuracy(folder: Path, pruning: PruningConfig, scenes: int) -> tuple[float, dict[str, float]]:
    """Return overall accuracy and accuracy per source, in percent."""
    config = EvaluateConfig(
        model=ModelConfig(path=str(ROOT / "assets" / "tiny_vlm"), dtype="float32"),
        pruning=pruning,
        tasks=["tiny_world"],
        limit=8 * scenes,
        batch_size=80,
        max_new_tokens=6,
        output=str(folder / f"{pruning.pruner}_{pruning.keep}"),
    )
    scores: dict[str, list[float]] = {}
    for row in read_results(evaluate(config)):
        scores.setdefault(row["source"], []).append(row["score"])
    every = [score for values in scores.values() for score in values]
    return 100 * sum(every) / len(every), {k: 100 * sum(v) / len(v) for k, v in sorted(scores.items())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    scenes = options.scenes
    with tempfile.TemporaryDirectory() as folder:
        dense, sources = accuracy(Path(folder), PruningConfig(), scenes)
        table = [[name] for name in options.methods]
        for row, name in zip(table, options.methods, strict=True):
            for keep in BUDGETS:
                pruning = PruningConfig(
                    pruner=name,
                    keep=keep,
                    options=OPTIONS.get(name, {}),
                    text_tower=str(ROOT / "assets" / "tiny_vlm" / "clip"),
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
