"""Training-free accuracy of the bundled tiny VLM over methods and budgets, beside a blind guesser.

    python benchmarks/tiny_vlm.py [--scenes 300] [--methods divprune fps ...]

Methods with options that belong to the model (a sign, a mean, a layer) are fitted first, as ``prunetune calibrate``
does it, on scenes of the validation range at 16 tokens; each has a row with what was fitted, and rows with what was
published and with the other sign. Prints a Markdown table; the numbers of ``assets/tiny_vlm/README.md`` come from here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from prunetune.assets import TINY_VLM
from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.metrics.averages import average
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.calibrate import calibrate, fitted_lines
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.models import Arm
from prunetune.pruning import PruningSpec, registered_methods
from prunetune.pruning.fitting import Choice
from prunetune.tiny_world import ask, sample_scene, split_seeds
from prunetune.tiny_world.task import read_items

METHODS = [name for name, method in registered_methods().items() if name != "identity" and not method.video]
BUDGETS = (72, 36, 16, 8)
FITTED_AT = 16
FITTED_ON = 512
"""Items of the validation scenes."""


def blind_accuracy(scenes: int, seen: int = 5000) -> float:
    """Return the accuracy in percent of answering every question text with its most frequent answer elsewhere."""
    votes: dict[str, Counter] = defaultdict(Counter)
    for seed in split_seeds("pretrain", seen):
        for question in ask(sample_scene(seed)):
            votes[question.text][question.answer] += 1
    items = read_items("test", scenes)
    right = sum(votes[i.question].most_common(1)[0][0] == i.answer for i in items if votes[i.question])
    return 100 * right / len(items)


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the options of each row of a method by the row's name: fitted, published, and other values of a sign."""
    config = EvaluateConfig(
        model=ModelConfig(path=str(TINY_VLM), dtype="float32"),
        pruning=PruningSpec(name, FITTED_AT, text_tower=str(TINY_VLM / "clip")),
        tasks=["tiny_world_validation"],
        max_new_tokens=6,
        output="unused",
    )
    method = registered_methods()[name]
    if not method.fits:
        return {name: {}}
    profile = calibrate(config, FITTED_ON, batch_size=64).profile
    assert profile is not None
    print(f"\n{name}\n" + "\n".join(fitted_lines(profile)), flush=True)
    rows = {}
    for option, fitted in profile.options.items():
        published = getattr(method.pruner(), option)
        values = {fitted: "fitted"}
        for fit in method.fits:
            if fit.option == option and isinstance(fit, Choice):
                values |= dict.fromkeys(fit.values, "not fitted") | {fitted: "fitted"}
        # Of a layer that the model has not there is nothing to measure.
        if isinstance(published, float) or any(row.value == published for row in profile.evidence[option]):
            values[published] = "published" if published != fitted else "published and fitted"
        for value, why in values.items():
            rows[f"{name}, {option} {value} ({why})"] = {option: value}
    return rows


def named_row(text: str) -> tuple[str, str, dict[str, Any]]:
    """Return label, method and options of ``cdpruner:relevance_sign=1``."""
    name, _, option = text.partition(":")
    key, _, value = option.partition("=")
    return f"{name}, {key} {value}", name, {key: json.loads(value)}


def accuracy(folder: Path, arm: Arm, scenes: int) -> tuple[float, dict[str, float]]:
    """Return overall accuracy and accuracy per source, in percent."""
    config = EvaluateConfig(
        model=arm.base.config,
        pruning=arm.spec,
        tasks=["tiny_world"],
        limit=8 * scenes,
        batch_size=80,
        max_new_tokens=6,
        output=str(folder / f"{arm.spec.pruner}_{arm.spec.keep}"),
    )
    rows = read_results(evaluate(config, arm))
    mean = average([row.score for row in rows], [row.source for row in rows])
    assert mean.overall is not None  # the tiny world hides no answers
    return mean.overall, mean.by_source


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rows", nargs="+", help="these rows alone and nothing fitted: cdpruner:relevance_sign=1")
    options = parser.parse_args()
    stock = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu")
    rows: list[tuple[str, str, dict[str, Any]]] = []
    if options.rows:
        rows = [named_row(row) for row in options.rows]
    else:
        for name in options.methods:
            rows += [(label, name, chosen) for label, chosen in rows_of(name).items()]
    with tempfile.TemporaryDirectory() as folder:
        dense, sources = accuracy(Path(folder), stock, options.scenes)
        told = ", ".join(f"{name} {value:.1f}" for name, value in sources.items())
        print(f"\nblind {blind_accuracy(options.scenes):.1f}, dense {dense:.1f} ({told})\n")
        print("| training-free | " + " | ".join(f"{k} tokens ({100 * k / 144:.1f} %)" for k in BUDGETS) + " |")
        print("|---|" + "---:|" * len(BUDGETS), flush=True)
        for number, (label, name, chosen) in enumerate(rows):
            reached = []
            for keep in BUDGETS:
                arm = stock.with_pruning(PruningSpec(name, keep, chosen, text_tower=str(TINY_VLM / "clip")))
                overall, _ = accuracy(Path(folder) / f"row{number}", arm, options.scenes)
                reached.append(f"{overall:.1f}")
            print(f"| {label} | " + " | ".join(reached) + " |", flush=True)


if __name__ == "__main__":
    main()
