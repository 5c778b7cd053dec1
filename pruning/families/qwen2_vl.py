"""Qwen2-VL: images and videos at native resolution, four patches to a token, rotary positions in three parts."""

from __future__ import annotations

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.qwen_vl import QwenVL


class Qwen2VL(QwenVL):
    """Every block of the tower sees a whole image or frame; there are no windows to undo."""

    name = "qwen2_vl"
    model_types = ("qwen2_vl",)


register_family(Qwen2VL())
