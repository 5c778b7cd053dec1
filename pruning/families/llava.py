"""Llava (LLaVA-1.5 and its kin): one run of equally many visual tokens per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning.families.base import Encoded, Family, project_kept, register_family, stack_projected
from pruning.signals import image_keys, record_cls_attention, record_input
from pruning.types import PruningError, Selection, VisualTokens

TOWERS_WITH_CLS = ("clip_vision_model",)


def encode(model: nn.Module, inputs: Mapping[str, Any], needs: frozenset[str]) -> Encoded:
    """Encode ``pixel_values`` (images, 3, H, W) with the model's own function and read the signals in ``needs``."""
    base: Any = model.base_model
    pixels: Tensor = inputs["pixel_values"]
    attention = feature_attention(model) if "cls_attention" in needs else None
    with record_input(base.multi_modal_projector) as features, record_cls_attention(attention) as rows:
        output = base.get_image_features(pixel_values=pixels, return_dict=True)
    projected = stack_projected(output.pooler_output)
    tokens = VisualTokens(
        features=features[0],
        projected=projected,
        cls_attention=rows[0] if rows else None,
        image_key=image_keys(pixels) if "image_key" in needs else None,
        grid=patch_grid(model, projected.shape[1]),
    )

    def keep_of(selection: Selection, newline: str) -> list[tuple[Tensor, Tensor]]:
        kept = project_kept(selection, tokens, base.multi_modal_projector)
        return [(selection.of(image), kept[image]) for image in range(len(kept))]

    return Encoded(output, tokens, [projected.shape[1]] * len(projected), keep_of)


def feature_attention(model: nn.Module) -> nn.Module:
    """Return the self-attention of the vision layer whose output enters the projector.

    Raises:
        PruningError: if the tower has no [CLS] token.
    """
    config: Any = model.config
    tower_type = config.vision_config.model_type
    if tower_type not in TOWERS_WITH_CLS:
        raise PruningError(
            f"this pruner reads [CLS] attention, but the vision tower {tower_type!r} has no [CLS] token; "
            "divprune, random and downsample work there"
        )
    layer = config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    base: Any = model.base_model
    layers = base.vision_tower.encoder.layers
    # hidden_states[0] is the embedding: the output of layers[i] is hidden_states[i + 1]; from the end both count alike.
    return layers[layer if layer < 0 else layer - 1].self_attn


def patch_grid(model: nn.Module, count: int) -> tuple[int, int] | None:
    """Return the patch rows and columns if they make up exactly ``count`` tokens."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    side = vision.image_size // vision.patch_size
    return (side, side) if side * side == count else None


def blank(model: nn.Module) -> dict[str, Tensor]:
    """Return one black image for the vision tower."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    parameter = next(model.parameters())
    return {
        "pixel_values": torch.zeros(
            1, 3, vision.image_size, vision.image_size, device=parameter.device, dtype=parameter.dtype
        )
    }


LLAVA = register_family(
    Family(
        name="llava",
        model_types=("llava",),
        projectors=("multi_modal_projector",),
        language_model="language_model",
        drop=("pixel_values", "image_sizes"),
        item="image",
        encode=encode,
        blank=blank,
    )
)
