"""Llava (LLaVA-1.5 and its kin): one run of equally many visual tokens per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning.families.base import Encoded, Family, project_kept, register_family, stack_projected
from pruning.families.tower import record_signals, vision_signals, visual_tokens
from pruning.signals import record_input
from pruning.types import Selection


def encode(model: nn.Module, inputs: Mapping[str, Any], needs: frozenset[str]) -> Encoded:
    """Encode ``pixel_values`` (images, 3, H, W) with the model's own function and read the signals in ``needs``."""
    base: Any = model.base_model
    with record_input(base.multi_modal_projector) as features, record_signals(model, needs) as signals:
        output = base.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    projected = stack_projected(output.pooler_output)
    tokens = visual_tokens(model, needs, features[0], projected, signals)
    images, count, _ = projected.shape

    def keep_of(selection: Selection, newline: str) -> list[tuple[Tensor, Tensor]]:
        kept = project_kept(selection, tokens, base.multi_modal_projector)
        return [(selection.of(image), kept[image]) for image in range(images)]

    def pools() -> list[Tensor]:
        return list(torch.arange(images * count, device=projected.device).view(images, count))

    return Encoded(output, tokens, [count] * images, list(range(images)), keep_of, pools)


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
        signals=vision_signals,
        encode=encode,
        blank=blank,
    )
)
