"""Which tokens each method keeps of some pictures, drawn over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from configs import ModelConfig
from data_recipes import Formatter, Sample, Turn
from evaluation.pictures import kept_overlay
from evaluation.sources import open_images, read_items
from evaluation.tasks import TaskError, get_task
from evaluation.tasks.base import task_folder
from pruning import PrunedModel, PruningSpec
from pruning.checkpoint import load_model
from pruning.text import instruction_text


def visualize(
    config: ModelConfig, specs: list[PruningSpec], task: str, count: int, output: Path, data: str | None = None
) -> list[Path]:
    """Write one PNG per picture with a panel per method, for the first ``count`` pictures of a task.

    Args:
        config: the model.
        specs: pruners and budgets, one panel each.
        task: a benchmark whose pictures are shown.
        count: how many pictures.
        output: folder of the PNG files.
        data: folder of the benchmark's files, see EvaluateConfig.

    Raises:
        TaskError: if the visual tokens of this model form no grid.
    """
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(**config.model_dump(include={"path", "revision", "dtype", "attention"}))
    benchmark, folder = get_task(task), task_folder(data, task)
    items = [item for item in read_items(benchmark, folder) if item.image is not None]
    images = open_images(benchmark, folder, items)
    formatter = Formatter(processor, images, config.template, config.square, instructions=instruction_text)
    first = {str(item.image): item for item in reversed(items)}  # each picture with its first question
    plugs = [PrunedModel(model, spec, processor.tokenizer) for spec in specs]
    written = []
    for number, reference in enumerate(list(dict.fromkeys(str(item.image) for item in items))[:count]):
        sample = Sample(reference, task, reference, (Turn(first[reference].question, None),))
        inputs = formatter.prompt_batch([sample])
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)  # type: ignore[arg-type]
        panels: dict[str, np.ndarray] = {}
        grid = None
        for spec, plug in zip(specs, plugs, strict=True):
            with torch.inference_mode():
                pruned = plug.prepare(inputs)
            assert pruned.selection is not None and pruned.encoded is not None  # there is a picture
            grid = pruned.encoded.tokens.grid
            positions = pruned.selection.of(0).cpu().numpy()
            panels[f"{spec.pruner}, {len(positions)}"] = positions
        if grid is None:
            raise TaskError("the visual tokens of this model form no grid, so they can't be drawn over the picture")
        path = output / f"kept_{number:02d}.png"
        kept_overlay(_seen(inputs["pixel_values"][0], processor), panels, grid).save(path)
        written.append(path)
    return written


def _seen(pixels: Any, processor: Any) -> Image.Image:
    """Return the picture as the vision tower saw it, from normalised pixels (3, H, W) or (crops, 3, H, W)."""
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(processor.image_processor.image_std)[:, None, None]
    pixels = pixels[0] if pixels.ndim == 4 else pixels  # of several crops, the base view
    picture = (pixels.float().cpu() * deviation + mean).clamp(0, 1)
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
