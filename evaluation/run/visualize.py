"""Which tokens each method keeps of some images, drawn over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.images import ImageOpener
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.plot import kept_overlay
from prunetune.evaluation.tasks import Item, get_task
from prunetune.evaluation.tasks.base import task_folder
from prunetune.models import Arm
from prunetune.outputs import VISUALIZATION, OutputFolder
from prunetune.pruning import PruningSpec
from prunetune.pruning.rewrite import Chosen


def visualize(
    config: ModelConfig,
    specs: list[PruningSpec],
    task: str,
    count: int,
    output: Path,
    data: str | None = None,
    arm: Arm | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write one PNG per image with a panel per method, for the first ``count`` images of a task.

    Args:
        config: the model.
        specs: pruners and budgets, one panel each.
        task: a benchmark whose images are shown.
        count: how many images.
        output: folder of the PNG files.
        data: folder of the benchmark's files, see EvaluateConfig.
        arm: one of that model that is loaded already; None loads it.
        overwrite: see :class:`~prunetune.outputs.OutputFolder`.

    Raises:
        OutputError: if the folder holds something else, or can't be written.
        TaskError: if the visual tokens of this model form no grid, or the task is about videos.
    """
    if get_task(task).video:
        raise TaskError(f"{task} is about videos, and kept tokens are drawn over images; choose a task about images")
    names = []
    # All or none: beside those of an earlier call, half of the images would pass for a whole set.
    folder = OutputFolder(output, VISUALIZATION, overwrite, reads=(config.path, data))
    with folder, folder.staged(whole=True) as new:
        # Loaded once: the methods share the model's weights, and differ in what they keep of its output.
        loaded = Arm.load(config) if arm is None else arm
        arms = [loaded.with_pruning(spec) for spec in specs]
        questions = get_task(task).open(task_folder(data, task))
        images = questions.open_images()
        for number, item in enumerate(_first_questions(questions.items)[:count]):
            sample = Sample(str(item.image), task, item.image, (Turn(item.question, None),))
            name = f"kept_{number:02d}.png"
            _strip(arms, images, sample).save(new / name)
            names.append(name)
    return [output / name for name in names]


def _first_questions(items: list[Item]) -> list[Item]:
    """Return the first question about each image, since methods that read the question need one."""
    first: dict[str, Item] = {}
    for item in items:
        if item.image is not None:
            first.setdefault(item.image, item)
    return list(first.values())


def _strip(arms: list[Arm], images: ImageOpener, sample: Sample) -> Image.Image:
    """Return one image with a panel for each arm."""
    panels: dict[str, np.ndarray] = {}
    for arm in arms:
        positions, grid, picture = kept_view(arm, images, sample)
        panels[f"{arm.spec.pruner}, {len(positions)}"] = positions
    return kept_overlay(picture, panels, grid)


def kept_view(arm: Arm, images: ImageOpener, sample: Sample) -> tuple[np.ndarray, tuple[int, int], Image.Image]:
    """Return what an arm keeps of a sample's image: positions, rows and columns of the grid, the image as it was seen.

    Raises:
        TaskError: if the visual tokens of the model form no grid.
    """
    inputs = arm.place(arm.formatter(images).prompt_batch([sample]))
    with torch.inference_mode():
        positions, grid = base_view(arm.pruned.prepare(inputs).chosen["image"])
    return positions, grid, seen_image(inputs["pixel_values"][0], arm, images, sample)


def base_view(chosen: Chosen) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the kept positions of an image in raster order, and the rows and columns of its grid.

    Of several crops it is the first, which shows the whole image.

    Raises:
        TaskError: if the visual tokens form no grid.
    """
    tokens = chosen.vision.groups[0]
    if tokens.grid is None:
        raise TaskError("the visual tokens of this model form no grid, so they can't be drawn over the picture")
    return chosen.kept_tokens()[: tokens.count].nonzero()[:, 0].cpu().numpy(), tokens.grid


def seen_image(pixels: Tensor, arm: Arm, images: ImageOpener, sample: Sample) -> Image.Image:
    """Return the image of a sample as the vision tower saw it.

    Args:
        pixels: of the sample's image, as the processor made them.
        arm: whose processor did.
        images: opens the sample's image.
        sample: the sample.
    """
    # At native resolution the pixels are patches in a list; such a model sees the whole image, only resized.
    return _seen(pixels, arm.processor) if pixels.ndim >= 3 else images.open(str(sample.image), sample.id)


def _seen(pixels: Tensor, processor: Any) -> Image.Image:
    """Return the image as the vision tower saw it, from normalised pixels (3, H, W) or (crops, 3, H, W)."""
    # Not the file's image: the processor may have cropped or padded it, and the grid lies over what was left.
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(processor.image_processor.image_std)[:, None, None]
    if pixels.ndim == 4:  # of several crops, the base view
        pixels = pixels[0]
    image = (pixels.float().cpu() * deviation + mean).clamp(0, 1)
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
