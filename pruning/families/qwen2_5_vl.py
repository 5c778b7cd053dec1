"""Qwen2.5-VL: images and videos at native resolution, four patches to a token, rotary positions in three parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunetune.pruning.families.base import Family, register_family
from prunetune.pruning.families.frames import of_frames
from prunetune.pruning.families.qwen_tower import QwenTower
from prunetune.pruning.families.stock import qwen_visual
from prunetune.pruning.hooks import record_input
from prunetune.pruning.signals import signal_of
from prunetune.pruning.vision import Vision

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class Qwen25VL(Family):
    """The items are images, and the frames of videos; frames of one size are pruned together.

    The tower orders patches by attention window; features and signals are brought back to raster order, in which the
    LLM sees the tokens.
    """

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    pixels: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    replaced = (*GRIDS.values(), "mm_token_type_ids", "second_per_grid_ts")
    unread = ("token_type_ids",)
    projectors = ("visual.merger",)
    item = "frame"
    position_policies = ("original",)
    counts_rows_and_columns = True

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the vision blocks offer."""
        return self._tower(model).signals()

    def frozen_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the tower."""
        base: Any = model.base_model
        return (base.visual,)

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode patches (P, values) of ``image_grid_thw`` or ``video_grid_thw`` (images, 3)."""
        base: Any = model.base_model
        visual = qwen_visual(model)
        pixels, grids = inputs[self.pixels[modality]], inputs[GRIDS[modality]]
        encode = getattr(base, f"get_{modality}_features")
        with record_input(visual.merger) as patches, self._tower(model).record(needs) as flat:
            output = encode(**{self.pixels[modality]: pixels, GRIDS[modality]: grids}, return_dict=True)

        # Images come back in raster order, what was read on the way is in the order of attention windows.
        raster = self._raster_order(model, grids)  # (T,)
        features = patches[0].reshape(len(raster), -1)[raster]  # (T, 4 * C)
        signals = {}
        for name, values in flat.items():
            if signal_of(name).axes == "B H N":
                signals[name] = values[:, raster]
            else:
                signals[name] = values[raster]
        merge = visual.spatial_merge_size
        sizes = []
        for frames, rows, columns in grids.tolist():
            sizes.append((frames, rows // merge, columns // merge))
        # The processor writes the pixels of a token one after another, tokens in raster order already.
        pixel_rows = pixels.reshape(len(raster), -1)
        return of_frames(modality, sizes, features, output.pooler_output, signals, pixel_rows, needs)

    def positions(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the model's own positions (3, B, L) of the full sequence: of time, row and column."""
        given_positions = inputs.get("position_ids")
        if given_positions is not None:
            return given_positions[-3:]  # stock generation puts a row before the three that counts tokens
        base: Any = model.base_model
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:
            # The codes of transformers' processor: 0 text, 1 image, 2 video.
            ids = inputs["input_ids"]
            is_image = (ids == self.token_id(model, "image")).int()
            is_video = (ids == self.token_id(model, "video")).int()
            kinds = is_image + 2 * is_video
        names = (*GRIDS.values(), "second_per_grid_ts", "attention_mask")
        given = {name: inputs.get(name) for name in names}
        return base.get_rope_index(inputs["input_ids"], mm_token_type_ids=kinds, **given)[0]

    def project(
        self,
        model: nn.Module,
        features: Float[Tensor, "K C4"],
    ) -> Float[Tensor, "K D"]:
        """Return blocks of four patches (K, 4 * C) in LLM space (K, D)."""
        visual = qwen_visual(model)
        # The merger takes patches one by one and joins them itself.
        width = features.shape[-1] // 4
        patches = features.reshape(-1, visual.spatial_merge_unit, width).flatten(0, 1)
        return visual.merger(patches)

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image of two by two tokens."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        parameter = next(model.parameters())
        side = 2 * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]], device=parameter.device)
        return {"pixel_values": parameter.new_zeros(side * side, values), "image_grid_thw": grid}

    def _tower(self, model: nn.Module) -> QwenTower:
        visual = qwen_visual(model)
        # The last block that attends to a whole image: the others see one window each.
        return QwenTower(visual.blocks, visual.fullatt_block_indexes[-1], visual.spatial_merge_unit)

    def _raster_order(
        self,
        model: nn.Module,
        grids: Int[Tensor, "images 3"],
    ) -> Int[Tensor, " T"]:
        """Return for each token in raster order its index in the order of attention windows, (T,)."""
        from transformers.vision_utils import get_vision_window_index

        visual = qwen_visual(model)
        window, _ = get_vision_window_index(
            grids,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return window.argsort().to(grids.device)  # the inverse of a permutation


register_family(Qwen25VL())
