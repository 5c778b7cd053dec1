"""What a feature cache saves and costs: a training step with and without it, and reading it at LLaVA-1.5's shape.

    python benchmarks/features.py [--steps 12] [--images 2000]

Steps with and without alternate, so that whatever else the machine does meets both; ratios are of medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunetune.assets import shipped
from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.models import Arm
from prunetune.models.adapter import projector_state
from prunetune.models.features import FeatureData, FeatureFormatter, FeatureStore, make_features
from prunetune.models.features.kept import KeptImage, KeptOf
from prunetune.models.features.shard import Entry, Shard, write_shard
from prunetune.models.features.store import stored_images
from prunetune.models.ranks import Ranks
from prunetune.outputs import FEATURES, OutputFolder
from prunetune.pruning import PruningSpec
from prunetune.tiny_world.recipe import SceneImages

BATCH = 32
QUESTION = Turn("what number is shown ?", "4 7")


def steps(folder: Path, count: int) -> None:
    """Print the time of a step of the tiny VLM with and without features, data loading included."""
    arm = Arm.load(
        ModelConfig(path=shipped("assets/tiny_vlm"), dtype="float32"), PruningSpec("prismprune", 16), None, "cpu"
    )
    samples = [Sample(str(seed), "vg", f"scene:{10_000_000 + seed}", (QUESTION,)) for seed in range(BATCH)]
    data = FeatureData("scenes", samples, SceneImages())
    with OutputFolder(folder / "tiny", FEATURES) as output:
        make_features(output, arm, [arm.spec], data, Ranks())
    store = FeatureStore.open(folder / "tiny", arm, data, trains=True)
    plain, cached = arm.formatter(SceneImages()), FeatureFormatter(store, arm)
    arm.model.requires_grad_(False).train()
    for parameter in projector_state(arm.model, keep_vars=True).values():
        parameter.requires_grad_(True)
    batches = {"pixels": plain.training_batch(samples), "features": cached.training_batch(samples)}
    works: dict[str, Callable[[], Any]] = {
        "batch pixels": partial(plain.training_batch, samples),
        "batch features": partial(cached.training_batch, samples),
        "step pixels": partial(step, arm, batches["pixels"]),
        "step features": partial(step, arm, batches["features"]),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(count):
        for name, work in works.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for part in ("step", "batch"):
        without, with_it = medians[f"{part} pixels"], medians[f"{part} features"]
        print(f"tiny VLM, {part} of {BATCH}: {1e3 * without:.0f} ms from pixels, {1e3 * with_it:.0f} ms from features, "
              f"{without / with_it:.2f} x")  # fmt: skip


def step(arm: Arm, batch: dict[str, Any]) -> None:
    """Take the gradient of one batch."""
    arm.pruned.forward(**batch).loss.backward()


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def reading(folder: Path, images: int, keep: int = 64, count: int = 576, width: int = 1024) -> None:
    """Print disk and reading time of LLaVA-1.5's shape: bfloat16 features of random numbers."""
    entries = []
    for number in range(images):
        at = torch.randperm(count)[:keep].sort().values
        rows = torch.randn(keep, width).bfloat16()
        kept = KeptImage(count, rows, [KeptOf(at, torch.arange(keep))])
        entries.append(Entry(number.to_bytes(16, "big"), (640, 480), bytes(16), kept))
    path = folder / "features-00000.safetensors"
    writing = seconds(lambda: write_shard(path, entries, None, [False], ""))
    shard = Shard(path)
    each = path.stat().st_size / images
    print(f"LLaVA-1.5, K = {keep}: {each / 1024:.1f} KiB an image, {keep * width * 2 / 1024:.0f} of them features; "
          f"written at {path.stat().st_size / writing / 1e6:.0f} MB/s")  # fmt: skip
    draw = random.Random(0)
    batches = [[(shard, draw.randrange(images)) for _ in range(16)] for _ in range(100)]
    taken = seconds(lambda: [stored_images(batch, [0] * len(batch), [{}], shard) for batch in batches])
    print(f"read at random, digests checked: {1e3 * taken / 1600:.2f} ms an image, {1600 / taken:.0f} images/s a core")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps(Path(folder), options.steps)
        reading(Path(folder), options.images)


if __name__ == "__main__":
    main()
