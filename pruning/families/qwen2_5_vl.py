"""Qwen2.5-VL: as Qwen2-VL, with a tower whose blocks but a few attend inside windows."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor, nn

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.qwen_tower import QwenTower
from prunetune.pruning.families.qwen_vl import QwenVL
from prunetune.pruning.families.stock import qwen_visual


class Qwen25VL(QwenVL):
    """The tower orders patches by attention window; features and signals are brought back to raster order.

    In raster order the LLM sees the tokens.
    """

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)

    def tower(self, model: nn.Module) -> QwenTower:
        """Return the blocks; attention is read from the last that sees a whole image, the others see one window."""
        visual = qwen_visual(model)
        return QwenTower(visual.blocks, visual.fullatt_block_indexes[-1], visual.spatial_merge_size**2)

    def raster_order(
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
