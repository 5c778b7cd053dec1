"""Gemma 3: patches are pooled to 256 tokens an image, which see each other both ways in the LLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunetune.pruning.families.base import Family, register_family
from prunetune.pruning.families.tower import blank_image, per_llm_token, record_signals, signal_layers, tower_of
from prunetune.pruning.hooks import record_input
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import Vision, of_equal_images


class Gemma3(Family):
    """Features are the pooled patches, before the projector's norm and weight.

    ``token_type_ids`` say which tokens are an image's and see each other both ways; they are cut with the sequence. The
    crops of pan-and-scan are images like any other.

    Layers with a sliding window count tokens and not positions: after pruning, a window reaches back over more text.
    In a sequence longer than the window a pruned run therefore sees more than the full run with the dropped tokens
    hidden does, under either position policy.
    """

    name = "gemma3"
    model_types = ("gemma3",)
    aligned: ClassVar[Mapping[str, int]] = {"token_type_ids": 0}
    unread = ("mm_token_type_ids",)
    replaced = ("num_crops",)
    one_tensor = ("image",)
    sees_both_ways = True

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers."""
        return tower_of(model).signals()

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, 3, H, W)."""
        base: Any = model.base_model
        with record_input(base.multi_modal_projector) as patches, record_signals(model, needs) as signals:
            output = base.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        side = _side(model)

        def pool(values: Float[Tensor, "B P C"]) -> Float[Tensor, "B N C"]:
            return _pooled(values, side)

        tokens = VisualTokens(
            features=pool(patches[0]),
            projected=output.pooler_output,
            signals=per_llm_token(signals, pool),
            grid=(side, side),
            layers=signal_layers(model, needs),
        )
        return of_equal_images(tokens)

    def project(
        self,
        model: nn.Module,
        features: Float[Tensor, "K C"],
    ) -> Float[Tensor, "K D"]:
        """Return pooled features (K, C) in LLM space (K, D), by the projector's own forward.

        Its weights belong to no layer of their own: under ZeRO-3 they are whole only while the module is called, and
        the module pools. So each token is given to it as a block of patches whose mean it is.
        """
        base: Any = model.base_model
        config: Any = model.config
        patches = config.vision_config.image_size // config.vision_config.patch_size  # a side of the image
        side = _side(model)
        block = patches // side
        # In whole images, at least one: of no token at all the projector is called as well.
        images = max(1, math.ceil(len(features) / side**2))
        tokens = features.new_zeros(images * side**2, features.shape[-1])
        tokens[: len(features)] = features
        # One patch of a block holds the token block * block times and the others nothing: powers of two, and a sum of
        # zeros, so the mean has the token's bits. The mean of equal patches might be rounded.
        image = features.new_zeros(images, patches, patches, features.shape[-1])
        image[:, ::block, ::block] = tokens.unflatten(0, (images, side, side)) * block**2
        return base.multi_modal_projector(image.flatten(1, 2)).flatten(0, 1)[: len(features)]

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image."""
        return {"pixel_values": blank_image(model)}


def _side(model: nn.Module) -> int:
    """Return the rows, and columns, of an image's tokens."""
    config: Any = model.config
    return math.isqrt(config.mm_tokens_per_image)


def _pooled(
    values: Float[Tensor, "B P C"],
    side: int,
) -> Float[Tensor, "B N C"]:
    """Return the mean of every block of patches, as the projector pools them: N = side * side blocks."""
    patches = math.isqrt(values.shape[1])
    images = values.transpose(1, 2).unflatten(2, (patches, patches)).contiguous()  # (B, C, rows, columns)
    pooled = torch.nn.functional.avg_pool2d(images, patches // side, patches // side)
    return pooled.flatten(2).transpose(1, 2)


register_family(Gemma3())
