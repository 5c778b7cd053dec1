"""What a shared prefix saves and moves: the tiny VLM on its own questions, eight an image, dense and at 16 tokens.

    python benchmarks/shared_prefix.py [--questions 2400] [--batch 80] [--dtypes float32 bfloat16]

Both ways run on every batch, one after the other, so that whatever else the machine does meets both; the images are
encoded before, once for both, as a feature cache holds them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.assets import shipped
from prunetune.configs import ModelConfig
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.tasks import get_task
from prunetune.models import Arm
from prunetune.pruning import PruningSpec

TOKENS = 6
"""Longest answer."""


@dataclass
class Found:
    """Sums over batches.

    Attributes:
        encoding: seconds of the vision side.
        whole: of generation from whole prompts.
        shared: of generation from shared prefixes.
        questions: how many there were.
        other_answers: answers that differ.
        logits: how many the answers' first tokens were chosen by.
        other_logits: of them, how many differ in any bit.
        apart: the largest difference of two logits, in parts of the largest logit.
    """

    encoding: float = 0.0
    whole: float = 0.0
    shared: float = 0.0
    questions: int = 0
    other_answers: int = 0
    logits: int = 0
    other_logits: int = 0
    apart: float = 0.0


@contextmanager
def last_logits(model: Any) -> Iterator[list[Tensor]]:
    """While open, every call's logits of the last position are gathered."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output.logits[:, -1])

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long something takes, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


@torch.inference_mode()
def measure(arm: Arm, questions: int, batch_size: int) -> Found:
    """Answer questions both ways, batch by batch."""
    opened = get_task("tiny_world").open(Path())
    samples = [sample_of(item) for item in opened.items[:questions]]
    formatter = arm.formatter(opened.open_images())
    found = Found()
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        inputs = arm.place(formatter.prompt_batch(batch))
        seconds, vision = timed(partial(arm.pruned.encode, inputs))
        found.encoding += seconds
        options = {**inputs, "vision": vision, "max_new_tokens": TOKENS, "do_sample": False}
        images = [sample.image for sample in batch]
        with last_logits(arm.model) as whole_logits:
            seconds, whole = timed(partial(arm.pruned.generate, **options))
            found.whole += seconds
        with last_logits(arm.model) as shared_logits:
            seconds, shared = timed(partial(arm.pruned.generate_shared, images=images, **options))
            found.shared += seconds
        texts = [arm.processor.batch_decode(one.tokens, skip_special_tokens=True) for one in (whole, shared)]
        found.questions += len(batch)
        found.other_answers += sum(one != other for one, other in zip(*texts, strict=True))
        ours, theirs = shared_logits[shared.prefixes is not None], whole_logits[0]
        found.logits += theirs.numel()
        found.other_logits += int((ours != theirs).sum())
        found.apart = max(found.apart, float((ours - theirs).abs().max() / theirs.abs().max()))
    return found


def main() -> None:
    """Print a line for each budget and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    asked = parser.parse_args()
    for dtype in asked.dtypes:
        arm = Arm.load(ModelConfig(path=shipped("assets/tiny_vlm"), dtype=dtype))
        for name, spec in (("dense", PruningSpec()), ("divprune 16", PruningSpec("divprune", 16))):
            found = measure(arm.with_pruning(spec), asked.questions, asked.batch)
            with_tower = (found.encoding + found.shared) / (found.encoding + found.whole)
            print(
                f"{dtype}, {name}: time shared / whole {found.shared / found.whole:.2f} "
                f"({with_tower:.2f} from pixels); {found.other_answers} of {found.questions} answers differ; "
                f"{100 * found.other_logits / found.logits:.1f} % of first logits differ, by at most "
                f"{found.apart:.1e} of the largest"
            )


if __name__ == "__main__":
    main()
