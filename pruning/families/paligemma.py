"""PaliGemma: one token per patch, a prefix that sees itself both ways, and positions that begin at 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from prunetune.pruning.families.base import Family, PrunedOutput, joined, register_family, stacked
from prunetune.pruning.families.stock import llava_model
from prunetune.pruning.families.tower import blank_image, record_signals, tower_of, visual_tokens
from prunetune.pruning.hooks import record_input
from prunetune.pruning.vision import Vision, of_equal_images


class PaliGemma(Family):
    """One tower run and one projector call; token i of an image fills its placeholder i.

    ``token_type_ids`` are 0 in the prefix (images and prompt), whose tokens see each other both ways, and 1 in the
    suffix; they are cut with the sequence.
    """

    name = "paligemma"
    model_types = ("paligemma",)
    aligned: ClassVar[Mapping[str, int]] = {"token_type_ids": 0}
    unread = ("mm_token_type_ids",)
    first_position = 1

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers."""
        return tower_of(model).signals()

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, 3, H, W)."""
        stock = llava_model(model)
        with record_input(stock.multi_modal_projector) as features, record_signals(model, needs) as signals:
            output = stock.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        return of_equal_images(visual_tokens(model, needs, features[0], stacked(output.pooler_output), signals))

    def put_back(self, features: list[Tensor], levels: list[list[Tensor]], modality: str) -> PrunedOutput:
        """Return the features of all images as one tensor."""
        return PrunedOutput(pooler_output=joined(features))

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image."""
        return {"pixel_values": blank_image(model)}


register_family(PaliGemma())
