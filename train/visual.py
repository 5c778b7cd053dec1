"""How many items, patches and tokens an image of some height and width is to a model, before and after pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from prunetune.pruning import PruningError, PruningSpec
from prunetune.pruning.budget import resolve_budget
from prunetune.pruning.families import family_of
from prunetune.pruning.families.anyres import crops_of
from prunetune.pruning.stages.inside import schedule_in
from prunetune.train.flops import Work, image

TILES = 12
"""InternVL's processor cuts an image into at most so many tiles, beside a view of the whole."""
LONG_SIDE = 4
"""Idefics 3's processor makes so many tiles of an image's long side, beside a view of the whole."""

_ENCODED: WeakKeyDictionary[Any, Visual] = WeakKeyDictionary()


@dataclass(frozen=True)
class Visual:
    """One image.

    Attributes:
        items: crops, tiles, or the image itself.
        tokens: of one item, before pruning.
        patches: of one item, as the tower sees them.
        row_ends: tokens at ends of rows, where the family has them.
        sized: whether these depend on the image's height and width.
    """

    items: int
    tokens: int
    patches: int
    row_ends: int = 0
    sized: bool = False

    def kept(self, spec: PruningSpec) -> int:
        """Return how many tokens reach the LLM; row ends are counted as if a token were kept in every row.

        Raises:
            PruningError: for a budget that such an image does not have.
        """
        ends = 0 if spec.newline == "none" else self.row_ends
        whole = spec.scope == "image"
        count = self.items * self.tokens if whole else self.tokens
        if spec.small_images == "keep_all":
            try:
                keep = resolve_budget(spec.keep, count)
            except PruningError:
                keep = count
        else:
            keep = resolve_budget(spec.keep, count)
        return keep + ends if whole else keep * self.items + ends


def visual_layers(model: Any, spec: PruningSpec, entering: int) -> list[int]:
    """Return how many visual tokens each layer of the LLM processes of a sample.

    Args:
        model: the stock model, which may lie on the meta device.
        spec: whose stages drop some between layers, if it has any.
        entering: how many enter the LLM.

    Raises:
        PruningError: for stages that the model can't have, or an average that can't be reached, with the least.
    """
    schedule = schedule_in(model, spec.stages)
    if schedule is None:
        return [entering] * int(model.config.get_text_config().num_hidden_layers)
    return list(schedule.counts(entering).layers)


def visual_of(model: Any, height: int, width: int) -> Visual:
    """Return what an image is to a model; the model may lie on the meta device.

    Where the processor's own limits decide (the smallest and largest image of Qwen-VL), the image is taken to lie
    within them. Padding that a model cuts away again is counted as tokens.

    Raises:
        PruningError: if the model is of a family of which this can't be told.
    """
    config = model.config
    vision = config.vision_config
    side = _side(getattr(vision, "image_size", None))
    patch = _side(getattr(vision, "patch_size", None)) or 1
    if getattr(config, "image_grid_pinpoints", None):
        crops = crops_of(model, torch.tensor([[height, width]]))[0]
        grid = side // patch
        # Crops lie in a grid that is about as wide and high as the image; every row of it ends with a token.
        rows = max(1, round(math.sqrt((crops - 1) * height / width)))
        return Visual(crops, grid**2, _patches(model, grid**2), grid * rows, sized=True)
    if hasattr(vision, "spatial_merge_size") and not side:
        block = patch * vision.spatial_merge_size
        tokens = max(1, round(height / block)) * max(1, round(width / block))
        return Visual(1, tokens, tokens * vision.spatial_merge_size**2, sized=True)
    if hasattr(config, "downsample_ratio"):
        columns, rows = get_optimal_tiled_canvas((height, width), (side, side), 1, TILES)
        tiles = columns * rows + (columns * rows > 1)
        tokens = round((side // patch) ** 2 * config.downsample_ratio**2)
        return Visual(tiles, tokens, _patches(model, (side // patch) ** 2), sized=True)
    if isinstance(getattr(config, "scale_factor", None), int):
        short, long = sorted((height, width))
        tiles = LONG_SIDE * math.ceil(LONG_SIDE * short / long) + 1
        return Visual(tiles, (side // patch) ** 2 // config.scale_factor**2, (side // patch) ** 2, sized=True)
    if model not in _ENCODED:  # a second of the meta device's time
        _ENCODED[model] = _encoded(model, (side // patch) ** 2)
    return _ENCODED[model]


def tower_work(model: Any, inputs: Mapping[str, Any]) -> Work:
    """Return the tower's work of a batch, by the shapes of its pixels.

    Args:
        model: the stock model.
        inputs: of a processor, still on the CPU: sizes of images are read from them.
    """
    work = Work()
    for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        values = inputs.get(pixels)
        if values is None:
            continue
        if values.ndim == 2:  # patches of all images behind one another
            for frames, rows, columns in inputs[grids].tolist():
                work += image(rows * columns, frames)
            continue
        items = math.prod(values.shape[:-3])
        if values.ndim == 5 and pixels == "pixel_values" and getattr(model.config, "image_grid_pinpoints", None):
            items = sum(crops_of(model, inputs["image_sizes"]))  # without those that pad a batch
        patch = _side(model.config.vision_config.patch_size)
        work += image(_patches(model, (values.shape[-2] // patch) * (values.shape[-1] // patch)), items)
    return work


def _encoded(model: Any, patches: int) -> Visual:
    """Return what the model itself makes of an image without values, where every image has as many tokens."""
    family = family_of(model)
    with torch.device("meta"):
        blank = family.blank(model)
        try:
            vision = family.encode(model, blank, "image", frozenset())
        except (NotImplementedError, RuntimeError) as error:
            raise PruningError(
                f"how many tokens an image has can't be told for family {family.name!r} without its weights"
            ) from error
    (group,) = vision.groups
    items, tokens = group.features.shape[:2]
    return Visual(items, tokens, _patches(model, patches))


def _patches(model: Any, patches: int) -> int:
    """Return an item's patches, with [CLS] where the tower has one."""
    names = [name for name, _ in model.named_parameters()]
    return patches + any(name.endswith(("class_embedding", "cls_token")) for name in names)


def _side(size: Any) -> int:
    """Return a side in pixels; configurations write one number or two; 0 if there is none."""
    if isinstance(size, list | tuple):
        return int(size[0])
    return int(size or 0)
