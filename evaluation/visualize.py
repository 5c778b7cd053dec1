"""Which tokens each method keeps of some pictures, drawn over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.pictures import kept_overlay
from prunetune.evaluation.sources import open_images, read_items
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.models import Arm
from prunetune.pruning import PruningSpec


def visualize(
    config: ModelConfig,
    specs: list[PruningSpec],
    task: str,
    count: int,
    output: Path,
    data: str | None = None,
    arm: Arm | None = None,
) -> list[Path]:
    """Write one PNG per picture with a panel per method, for the first ``count`` pictures of a task.

    Args:
        config: the model.
        specs: pruners and budgets, one panel each.
        task: a benchmark whose pictures are shown.
        count: how many pictures.
        output: folder of the PNG files.
        data: folder of the benchmark's files, see EvaluateConfig.
        arm: one of that model that is loaded already; None loads it.

    Raises:
        TaskError: if the visual tokens of this model form no grid.
    """
    output.mkdir(parents=True, exist_ok=True)
    loaded = Arm.load(config) if arm is None else arm
    arms = [loaded.with_pruning(spec) for spec in specs]
    benchmark, folder = get_task(task), task_folder(data, task)
    items = [item for item in read_items(benchmark, folder) if item.image is not None]
    images = open_images(benchmark, folder, items)
    first = {str(item.image): item for item in reversed(items)}  # each picture with its first question
    written = []
    for number, reference in enumerate(list(dict.fromkeys(str(item.image) for item in items))[:count]):
        sample = Sample(reference, task, reference, (Turn(first[reference].question, None),))
        panels: dict[str, np.ndarray] = {}
        grid: tuple[int, int] | None = None
        for one in arms:
            inputs = one.place(one.formatter(images).prompt_batch([sample]))
            with torch.inference_mode():
                chosen = one.pruned.prepare(inputs).chosen["image"]
            tokens = chosen.vision.groups[0]
            grid = tokens.grid
            if grid is None:
                raise TaskError("the visual tokens of this model form no grid, so they can't be drawn over the picture")
            base_view = chosen.kept_tokens()[: tokens.count]  # of several crops, the first
            positions = base_view.nonzero()[:, 0].cpu().numpy()
            panels[f"{one.spec.pruner}, {len(positions)}"] = positions
        assert grid is not None  # there is at least one method
        path = output / f"kept_{number:02d}.png"
        kept_overlay(_seen(inputs["pixel_values"][0], loaded.processor), panels, grid).save(path)
        written.append(path)
    return written


def _seen(pixels: Any, processor: Any) -> Image.Image:
    """Return the picture as the vision tower saw it, from normalised pixels (3, H, W) or (crops, 3, H, W)."""
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(processor.image_processor.image_std)[:, None, None]
    pixels = pixels[0] if pixels.ndim == 4 else pixels  # of several crops, the base view
    picture = (pixels.float().cpu() * deviation + mean).clamp(0, 1)
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
