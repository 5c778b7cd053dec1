"""InternVL: tiles of InternViT, whose patches a pixel shuffle joins to blocks before they enter the projector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.anyres import owner_of
from prunetune.pruning.families.base import Family, register_family
from prunetune.pruning.families.tiling import Tiling, canvas_tiling
from prunetune.pruning.families.tower import (
    blank_image,
    per_llm_token,
    record_signals,
    tower_of,
    visual_tokens,
)
from prunetune.pruning.hooks import record_input
from prunetune.pruning.vision import Vision


class InternVL(Family):
    """The items are the tiles of images; a frame of a video is an image of one tile, with the placeholder of images.

    A token's feature is its block of patches side by side, as it enters the projector; its scores are means over them.
    """

    name = "internvl"
    model_types = ("internvl",)
    replaced = ()
    unread = ("token_type_ids", "mm_token_type_ids")
    one_tensor = ("image",)
    frames_are_images = True
    item = "crop"

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers, but for the hidden state of [CLS]: it is no block, as wide as features are."""
        return tower_of(model).signals() - {"cls_feature"}

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (tiles of all images, 3, H, W)."""
        base: Any = model.base_model
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4:
            raise PruningError(f"`pixel_values` must be (tiles, 3, height, width), got {tuple(pixels.shape)}")
        with record_input(base.multi_modal_projector) as features, record_signals(model, needs) as signals:
            output = base.get_image_features(pixel_values=pixels, return_dict=True)
        projected = output.pooler_output  # (tiles, N, D)
        tiles, count = projected.shape[:2]
        patches, grid = self._patches(model, pixels)

        def shuffled(values: Tensor) -> Tensor:
            """Return (B, P, C) as the means (B, N, C) of blocks."""
            return values[:, patches].mean(dim=2)

        tokens = visual_tokens(model, needs, features[0], projected, per_llm_token(signals, shuffled), grid=grid)
        per_image = self._tiles_per_image(model, inputs.get("input_ids"), tiles, count)
        lengths = [number * count for number in per_image]
        numbers = torch.arange(tiles * count, device=projected.device)
        return Vision(
            modality=modality,
            groups=(tokens,),
            owner=(owner_of(per_image),),
            slots=projected.flatten(0, 1).split(lengths),
            origin=numbers.split(lengths),
        )

    def tilings(
        self, model: nn.Module, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
    ) -> list[Tiling] | None:
        """Return the tiles that the processor makes of pictures of these sizes, which its output does not say."""
        return [canvas_tiling(size, processor.image_processor) for size in sizes]

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black tile."""
        return {"pixel_values": blank_image(model)}

    def _patches(self, model: nn.Module, pixels: Tensor) -> tuple[Int[Tensor, "N block"], tuple[int, int]]:
        """Return for each LLM token the numbers of its patches (N, block), and the rows and columns of tokens.

        Of 4 x 4 patches the first token is made of ``[0, 1, 4, 5]``, in an order of the shuffle's own.
        """
        base: Any = model.base_model
        config: Any = model.config
        height, width = config.vision_config.patch_size
        count = (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
        side = math.isqrt(count)  # the model takes every tile for a square
        # Numbers are sent through the model's own shuffle; float64 holds them exactly.
        numbers = torch.arange(count, dtype=torch.float64, device=pixels.device)
        blocks = base.pixel_shuffle(numbers.view(1, side, side, 1), scale_factor=config.downsample_ratio)
        return blocks[0].flatten(0, 1).long(), tuple(blocks.shape[1:3])

    def _tiles_per_image(self, model: nn.Module, ids: Tensor | None, tiles: int, count: int) -> list[int]:
        """Return how many tiles each image has, from its run of placeholders: pixels come without a number of tiles.

        Where runs do not say it, every tile is an image of its own.
        """
        alone = [1] * tiles
        if ids is None:
            return alone
        is_image = (ids == self.token_id(model, "image")).cpu()
        ends = torch.zeros(len(ids), 1, dtype=torch.bool)
        padded = torch.cat([ends, is_image, ends], dim=1).flatten().int()
        change = padded.diff()
        lengths = (change == -1).nonzero()[:, 0] - (change == 1).nonzero()[:, 0]
        if int(lengths.sum()) != tiles * count or bool((lengths % count).any()):
            return alone
        return (lengths // count).tolist()


register_family(InternVL())
