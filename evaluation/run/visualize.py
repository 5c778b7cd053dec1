"""Which tokens an arm keeps of an image, and the image as the vision tower saw it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunetune.data_recipes import Sample
from prunetune.data_recipes.images import ImageOpener
from prunetune.evaluation.errors import TaskError
from prunetune.models import Arm
from prunetune.pruning.rewrite import Chosen


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
