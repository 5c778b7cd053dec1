"""LlavaNext (LLaVA-1.6): a base view and crops per image, merged into one grid whose rows end with a newline token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunetune.pruning.families.base import Family, register_family
from prunetune.pruning.families.stock import llava_next_model
from prunetune.pruning.families.tower import blank_image, record_signals, tower_of, visual_tokens
from prunetune.pruning.hooks import record_input, record_output
from prunetune.pruning.vision import NEWLINE, Vision


class LlavaNext(Family):
    """The pruner sees every crop; the model merges the crops of an image, cuts padding away and ends each row."""

    name = "llava_next"
    model_types = ("llava_next",)
    unread = ("token_type_ids", "mm_token_type_ids")
    item = "crop"

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers."""
        return tower_of(model).signals()

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, crops, 3, H, W) of ``image_sizes`` (images, 2)."""
        stock = llava_next_model(model)
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        # Crops are read around the projector: what the model returns is merged, and the padding of crops is cut away.
        with (
            record_input(stock.multi_modal_projector) as features,
            record_output(stock.multi_modal_projector) as outputs,
            record_signals(model, needs) as signals,
        ):
            output = stock.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True)
        projected = outputs[0]  # (crops of all images, N, D)
        count = projected.shape[1]
        crops = _crops_per_image(model, sizes)
        owner: list[int] = []
        for image, number in enumerate(crops):
            owner += [image] * number
        origin = _origin(model, sizes, crops, count, projected.device)
        return Vision(
            modality=modality,
            groups=(visual_tokens(model, needs, features[0], projected, signals),),
            owner=(tuple(owner),),
            slots=tuple(output.pooler_output),
            origin=tuple(origin),
            row=tuple(_rows(numbers, count) for numbers in origin),
        )

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image of the base view's size, with as many crops as the model makes of it."""
        pixels = blank_image(model)
        height, width = pixels.shape[-2:]
        size = torch.tensor([[height, width]], device=pixels.device)
        crops = _crops_per_image(model, size)[0]
        # Expanded and not copied: all crops are the same black image.
        return {"pixel_values": pixels[None].expand(1, crops, -1, -1, -1), "image_sizes": size}


def _origin(
    model: nn.Module,
    sizes: Int[Tensor, "images 2"],
    crops: list[int],
    count: int,
    device: torch.device,
) -> list[Int[Tensor, " L"]]:
    """Return for every packed token of each image (L,) its number among all crop tokens, or ``NEWLINE``.

    Numbers instead of features are sent through the model's own packing, so that no line of it is written again here;
    float64 holds them exactly.
    """
    config: Any = model.config
    numbers = torch.arange(sum(crops) * count, dtype=torch.float64, device=device)
    numbers = numbers.view(-1, count, 1)  # (crops of all images, N, 1)
    packed, _ = llava_next_model(model).pack_image_features(
        numbers.split(crops, dim=0),
        sizes,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.full((1,), NEWLINE, dtype=torch.float64, device=device),
    )
    return [image[:, 0].long() for image in packed]


def _rows(
    origin: Int[Tensor, " L"],
    count: int,
) -> Int[Tensor, " L"]:
    """Return the row of the merged grid (L,) that each slot lies in or ends; the base view before it has none.

    A base view of 2 tokens and a grid of 2 rows with 1 token each, ``[0, 1, 2, -1, 3, -1]``, give
    ``[-1, -1, 0, 0, 1, 1]``.

    Args:
        origin: (L,) the number behind each slot.
        count: tokens per crop, and so of the base view.
    """
    ends = int((origin == NEWLINE).sum())
    if ends == 1 and len(origin) == count + 1:  # a single view, and one newline after it
        return torch.zeros_like(origin)
    rows = torch.full_like(origin, -1)
    if ends:  # all rows are equally long, with their newline
        merged = len(origin) - count
        rows[count:] = torch.arange(merged, device=origin.device) // (merged // ends)
    return rows


def _crops_per_image(model: nn.Module, sizes: Tensor) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config: Any = model.config
    grids, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [image_size_to_num_patches(size, grids, side) for size in sizes]


register_family(LlavaNext())
