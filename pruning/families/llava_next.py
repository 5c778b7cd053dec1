"""LlavaNext (LLaVA-1.6): a base view and crops per picture, merged into one grid with row-end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning.families.base import Encoded, Family, project_kept, register_family
from pruning.families.llava import blank as blank_crop
from pruning.families.tower import record_signals, vision_signals, visual_tokens
from pruning.signals import record_input, record_output
from pruning.types import Selection

_NEWLINE = -1


def encode(model: nn.Module, inputs: Mapping[str, Any], needs: frozenset[str]) -> Encoded:
    """Encode ``pixel_values`` (images, crops, 3, H, W) of ``image_sizes`` (images, 2); the pruner sees every crop.

    The model merges the crops of a picture, cuts padding away and ends rows with a newline token. Sending positions
    instead of features through that same function says which crop token each packed token is.
    """
    base: Any = model.base_model
    projector = base.multi_modal_projector
    with (
        record_input(projector) as features,
        record_output(projector) as projected,
        record_signals(model, needs) as signals,
    ):
        output = base.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True
        )
    crops, count, _ = projected[0].shape
    tokens = visual_tokens(model, needs, features[0], projected[0], signals)
    packed = list(output.pooler_output)
    origin = _origins(model, inputs, packed, crops, count)

    per_image = _crops_per_image(model, inputs)
    owner = [image for image, number in enumerate(per_image) for _ in range(number)]

    def keep_of(selection: Selection, newline: str) -> list[tuple[Tensor, Tensor]]:
        flat = torch.cat([crop * count + selection.of(crop) for crop in range(crops)])
        kept = torch.zeros(crops * count, dtype=torch.bool, device=flat.device).index_fill(0, flat, True)
        merged = None
        if selection.merged is not None:
            features = torch.cat(project_kept(selection, tokens, projector))
            slots = torch.cat([crop * count + selection.slots_of(crop) for crop in range(crops)])
            merged = projected[0].flatten(0, 1).index_copy(0, slots, features)
        images = []
        for image, where in enumerate(origin):
            stays = _stays(where, kept, newline)
            features = packed[image]
            if merged is not None:
                features = torch.where((where == _NEWLINE)[:, None], features, merged[where.clamp(min=0)])
            images.append((stays, features[stays]))
        return images

    def pools() -> list[Tensor]:
        return [where[where != _NEWLINE].sort().values for where in origin]

    return Encoded(output, tokens, [len(features) for features in packed], owner, keep_of, pools)


def _origins(model: nn.Module, inputs: Mapping[str, Any], packed: list[Tensor], crops: int, count: int) -> list[Tensor]:
    """Return for every packed token of each image (L,) its place among all crop tokens, or -1 for a newline."""
    base: Any = model.base_model
    config: Any = model.config
    places = torch.arange(crops * count, dtype=torch.float64, device=packed[0].device).view(crops, count, 1)
    per_image = places.split(_crops_per_image(model, inputs), dim=0)
    maps, _ = base.pack_image_features(
        per_image,
        inputs["image_sizes"],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.full((1,), _NEWLINE, dtype=torch.float64, device=places.device),
    )
    return [positions[:, 0].long() for positions in maps]


def _crops_per_image(model: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config: Any = model.config
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in inputs["image_sizes"]
    ]


def _stays(where: Tensor, kept: Tensor, newline: str) -> Tensor:
    """Return the packed positions that stay: the kept tokens, and newlines by policy."""
    is_newline = where == _NEWLINE
    stays = kept[where.clamp(min=0)] & ~is_newline
    if newline == "all":
        stays = stays | is_newline
    elif newline == "rows":
        # A newline stays if anything was kept since the newline before it.
        seen = stays.long().cumsum(0)
        ends = is_newline.nonzero()[:, 0]
        at_end = seen[ends]
        begins = torch.cat([at_end.new_zeros(1), at_end[:-1]])
        stays = stays.clone()
        stays[ends] = at_end > begins
    return stays.nonzero()[:, 0]


def blank(model: nn.Module) -> dict[str, Tensor]:
    """Return one black picture of the base view's size, with as many crops as the model makes of it."""
    pixels = blank_crop(model)["pixel_values"]
    size = torch.tensor([[pixels.shape[-2], pixels.shape[-1]]], device=pixels.device)
    crops = _crops_per_image(model, {"image_sizes": size})[0]
    return {"pixel_values": pixels[None].expand(1, crops, -1, -1, -1), "image_sizes": size}


LLAVA_NEXT = register_family(
    Family(
        name="llava_next",
        model_types=("llava_next",),
        projectors=("multi_modal_projector",),
        language_model="language_model",
        drop=("pixel_values", "image_sizes"),
        item="crop",
        signals=vision_signals,
        encode=encode,
        blank=blank,
    )
)
