"""A model family of one's own: ViP-LLaVA, which projects the concatenated features of several layers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning import Vision, VisualTokens, register_family
from prunetune.pruning.families import Family, PrunedOutput
from prunetune.pruning.hooks import record_input
from prunetune.pruning.vision import of_equal_images


class VipLlava(Family):
    """One projector call over all images; token i of an image fills its placeholder i. No attention is recorded."""

    name = "vipllava"
    model_types = ("vipllava",)
    unread = ("token_type_ids", "mm_token_type_ids")

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Offer nothing beside the features: five layers enter the projector, and no single one is the last."""
        return frozenset()

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Let the model encode ``pixel_values`` (images, 3, H, W), and listen at the projector."""
        base: Any = model.base_model
        layers = model.config.vision_feature_layer
        with record_input(base.multi_modal_projector) as features:
            output = base.get_image_features(inputs["pixel_values"], vision_feature_layer=layers)
        side = math.isqrt(output.pooler_output.shape[1])
        return of_equal_images(VisualTokens(features[0], output.pooler_output, grid=(side, side)))

    def put_back(self, features: list[Tensor], levels: list[list[Tensor]], modality: str) -> PrunedOutput:
        """Return the features of all images as one tensor (K, D), which is what this model scatters."""
        return PrunedOutput(pooler_output=torch.cat(features))

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image."""
        size, weight = model.config.vision_config.image_size, next(model.parameters())
        return {"pixel_values": weight.new_zeros(1, 3, size, size)}


register_family(VipLlava())
