"""LlavaNext (LLaVA-1.6): a base view and crops per image, merged into one grid whose rows end with a newline token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning.families.anyres import check_crops, crops_of, owner_of, packed_images
from prunetune.pruning.families.base import Family, register_family
from prunetune.pruning.families.stock import llava_next_model
from prunetune.pruning.families.tiling import WHOLE, Tiling, anyres_tiling
from prunetune.pruning.families.tower import blank_image, record_signals, tower_of, visual_tokens
from prunetune.pruning.hooks import record_input, record_output
from prunetune.pruning.vision import Vision


class LlavaNext(Family):
    """The pruner sees every crop; the model merges the crops of an image, cuts padding away and ends each row."""

    name = "llava_next"
    model_types = ("llava_next",)
    unread = ("token_type_ids", "mm_token_type_ids")
    projects_tokens = True
    item = "crop"

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers."""
        return tower_of(model).signals()

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, crops, 3, H, W) of ``image_sizes`` (images, 2)."""
        stock = llava_next_model(model)
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        crops = crops_of(model, sizes)
        check_crops(pixels, crops)
        # Crops are read around the projector: what the model returns is merged, and the padding of crops is cut away.
        with (
            record_input(stock.multi_modal_projector) as features,
            record_output(stock.multi_modal_projector) as outputs,
            record_signals(model, needs) as signals,
        ):
            output = stock.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True)
        projected = outputs[0]  # (crops of all images, N, D)
        count = projected.shape[1]

        def pack(images: Sequence[Tensor], own_sizes: Tensor, newline: Tensor) -> list[Tensor]:
            config: Any = model.config
            strategy = config.vision_feature_select_strategy
            return stock.pack_image_features(
                images, own_sizes, vision_feature_select_strategy=strategy, image_newline=newline
            )[0]

        origin, row = packed_images(model, pack, sizes, crops, count, projected.device)
        return Vision(
            modality=modality,
            groups=(visual_tokens(model, needs, features[0], projected, signals),),
            owner=(owner_of(crops),),
            slots=tuple(output.pooler_output),
            origin=origin,
            row=row,
        )

    def tilings(
        self, model: nn.Module, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
    ) -> list[Tiling] | None:
        """Return the tiles of ``image_sizes`` (images, 2), behind the base view."""
        config: Any = model.config
        crops = self.crops(model, inputs)
        grids, side = config.image_grid_pinpoints, config.vision_config.image_size
        found = []
        for (height, width), number in zip(inputs["image_sizes"].tolist(), crops, strict=True):
            found.append(WHOLE if number == 1 else anyres_tiling((height, width), grids, side))
        return found

    def crops(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
        """Return how many crops each image has."""
        return crops_of(model, inputs["image_sizes"])

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image of the base view's size, with as many crops as the model makes of it."""
        pixels = blank_image(model)
        height, width = pixels.shape[-2:]
        size = torch.tensor([[height, width]], device=pixels.device)
        crops = crops_of(model, size)[0]
        # Expanded and not copied: all crops are the same black image.
        return {"pixel_values": pixels[None].expand(1, crops, -1, -1, -1), "image_sizes": size}


register_family(LlavaNext())
