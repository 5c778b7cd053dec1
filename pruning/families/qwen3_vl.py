"""Qwen3-VL: deepstack levels beside the features, and videos as one run of placeholders per frame."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.qwen_vl import QwenVL
from prunetune.pruning.families.stock import qwen_visual
from prunetune.pruning.hooks import record_input, record_output
from prunetune.pruning.vision import Vision


class Qwen3VL(QwenVL):
    """A token has features for the LLM's input and, by the deepstack mergers, for the hidden states after its layers.

    What is kept of an image is kept in every level. A merged token has the levels of the token it was made around: a
    method merges what enters the projector, and the levels are made of other layers.

    A video is one item per frame, with a timestamp and a run of placeholders for each.
    """

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    projectors = ("visual.merger", "visual.deepstack_merger_list")

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode patches (P, values) of ``image_grid_thw`` or ``video_grid_thw`` (images, 3)."""
        with ExitStack() as hooks:
            entered, left = [], []
            for merger in qwen_visual(model).deepstack_merger_list:
                entered.append(hooks.enter_context(record_input(merger)))
                left.append(hooks.enter_context(record_output(merger)))
            vision = super().encode(model, inputs, modality, needs)
        # Of raster order as the slots are: the tower has no windows.
        lengths = vision.lengths
        levels, features = [], []
        for before, after in zip(entered, left, strict=True):
            levels.append(after[0].split(lengths))
            features.append(before[0].reshape(sum(lengths), -1).split(lengths))
        return replace(vision, levels=tuple(levels), level_features=tuple(features))

    def project_level(
        self,
        model: nn.Module,
        level: int,
        features: Float[Tensor, "K C4"],
    ) -> Float[Tensor, "K D"]:
        """Return blocks of four patches (K, 4 * C), as they enter a deepstack merger, in LLM space (K, D)."""
        merger = qwen_visual(model).deepstack_merger_list[level]
        return merger(self._patches(model, features))

    def runs(self, modality: str, grid: tuple[int, int, int]) -> list[int]:
        """Return one run of an image, and one per frame of a video."""
        frames, rows, columns = grid
        return [rows * columns] * frames


register_family(Qwen3VL())
