"""What the backends of evaluations take: the tiny VLM on its own questions, plain, continuous and static, in one run.

    python benchmarks/backends.py [--questions 320] [--batches 8 32] [--rounds 3] [--device cpu]

Every backend answers all questions from pictures, one after the other in every round, so that whatever else the machine
does meets them all; answers are compared. Long answers are forced: the token that ends one is suppressed, so that the
steps behind the prompts weigh more. What is compiled is compiled before, and its time is told apart.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

from prunetune.assets import shipped
from prunetune.configs import ModelConfig
from prunetune.configs.schema import Backend
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.tasks import get_task
from prunetune.models import Answer, Arm
from prunetune.models.answering import Batches, answered
from prunetune.pruning import PruningSpec

BACKENDS: tuple[Backend, ...] = ("plain", "continuous", "static")
LONG = 48


def answers(
    arm: Arm, batches: Batches, tokens: int, batch_size: int, backend: Backend
) -> tuple[float, float, list[Answer]]:
    """Return seconds until the first batch is answered, seconds from then on, and the answers."""
    began = time.perf_counter()
    running = answered(arm, batches, tokens, batch_size, backend)
    found = list(next(running))
    first = time.perf_counter()
    for own in running:
        found += own
    return first - began, time.perf_counter() - first, found


def measure(arm: Arm, questions: int, batch_size: int, rounds: int, long: bool) -> list[str]:
    """Return a row of the table for each backend."""
    opened = get_task("tiny_world").open(Path())
    samples = [sample_of(item) for item in opened.items[:questions]]
    formatter = arm.formatter(opened.open_images())
    batches = [(formatter, samples[first : first + batch_size]) for first in range(0, questions, batch_size)]
    tokens = LONG if long else 6
    own = arm.model.generation_config
    if long:
        arm.model.generation_config = copy.deepcopy(own)
        arm.model.generation_config.suppress_tokens = [own.eos_token_id]
    first: dict[str, float] = {}
    ratios: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    rates: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    differ = dict.fromkeys(BACKENDS, 0)
    try:
        for _ in range(rounds):
            seconds = {}
            said: dict[str, list[Answer]] = {}
            for backend in BACKENDS:
                # Once more before its batches: what is compiled is compiled there.
                begin, rest, found = answers(arm, [batches[0], *batches], tokens, batch_size, backend)
                first.setdefault(backend, begin)
                seconds[backend] = begin + rest if backend == "continuous" else rest
                said[backend] = found[len(batches[0][1]) :]
            extra = 1 + 1 / len(batches)  # of what continuous was asked, whose first batch has no end of its own
            seconds["continuous"] /= extra
            for backend in BACKENDS:
                ratios[backend].append(seconds["plain"] / seconds[backend])
                rates[backend].append(questions / seconds[backend])
                differ[backend] += sum(a != b for a, b in zip(said[backend], said["plain"], strict=True))
    finally:
        arm.model.generation_config = own
    rows = []
    for backend in BACKENDS:
        compiled = f"{first[backend]:.0f} s" if backend == "static" else ""
        rows.append(
            f"{backend} | {median(rates[backend]):.0f} | {median(ratios[backend]):.2f} "
            f"({min(ratios[backend]):.2f} to {max(ratios[backend]):.2f}) | {compiled} | "
            f"{differ[backend]} of {rounds * questions}"
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--model", default=None, help="folder of a checkpoint; the tiny VLM by default")
    asked = parser.parse_args()
    model = ModelConfig(path=asked.model or shipped("assets/tiny_vlm"), dtype=asked.dtype)
    loaded = Arm.load(model, device=asked.device)
    print("| tokens | answers | batch | backend | items/s | plain = 1 | first compile | answers that differ |")
    print("|---|---|---|---|---|---|---|---|")
    for name, spec in (("all 144", PruningSpec()), ("divprune 16", PruningSpec("divprune", 16))):
        for long in (False, True):
            for size in asked.batches:
                arm = loaded.with_pruning(spec)
                for row in measure(arm, asked.questions, size, asked.rounds, long):
                    print(f"| {name} | {f'{LONG} tokens' if long else 'short'} | {size} | {row} |", flush=True)


if __name__ == "__main__":
    main()
