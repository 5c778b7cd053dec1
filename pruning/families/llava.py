"""Llava (LLaVA-1.5 and its kin): one run of equally many visual tokens per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from prunetune.pruning.families.base import Family, register_family, stacked
from prunetune.pruning.families.stock import llava_model
from prunetune.pruning.families.tower import blank_image, record_signals, tower_of, visual_tokens
from prunetune.pruning.hooks import record_input
from prunetune.pruning.vision import Vision, of_equal_images


class Llava(Family):
    """One tower run and one projector call; token i of an image fills its placeholder i."""

    name = "llava"
    model_types = ("llava",)
    unread: ClassVar[tuple[str, ...]] = ("token_type_ids", "mm_token_type_ids")
    projects_tokens = True

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers."""
        return tower_of(model).signals()

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, 3, H, W)."""
        stock = llava_model(model)
        # The projector's input is read where it enters: the model itself picks the layer and drops [CLS].
        with record_input(stock.multi_modal_projector) as features, record_signals(model, needs) as signals:
            output = stock.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        projected = stacked(output.pooler_output)  # (B, N, D)
        return of_equal_images(visual_tokens(model, needs, features[0], projected, signals))

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image."""
        return {"pixel_values": blank_image(model)}


register_family(Llava())
