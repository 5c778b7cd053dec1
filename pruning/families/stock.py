"""What the families use of the stock models, as protocols: the models themselves are not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn


class EncodedImages(Protocol):
    """What a stock model's own encoder returns: the projected features of every image."""

    pooler_output: Tensor | list[Tensor] | tuple[Tensor, ...]


class LlavaModel(Protocol):
    """The part of LLaVA models below the head."""

    vision_tower: nn.Module
    multi_modal_projector: nn.Module

    def get_image_features(self, *, pixel_values: Tensor, return_dict: bool) -> EncodedImages:
        """Encode images (B, 3, H, W)."""
        ...


class LlavaNextModel(Protocol):
    """The part of LLaVA-1.6 models below the head."""

    vision_tower: nn.Module
    multi_modal_projector: nn.Module

    def get_image_features(self, *, pixel_values: Tensor, image_sizes: Tensor, return_dict: bool) -> EncodedImages:
        """Encode crops (B, crops, 3, H, W)."""
        ...

    def pack_image_features(
        self,
        image_features: Sequence[Tensor],
        image_sizes: Tensor,
        vision_feature_select_strategy: str,
        image_newline: Tensor,
    ) -> tuple[list[Tensor], Any]:
        """Merge the crops of every image into one sequence (L, D)."""
        ...


class QwenVisual(Protocol):
    """The vision side of Qwen-VL models: windows are those of Qwen2.5, deepstack mergers those of Qwen3."""

    blocks: nn.ModuleList
    merger: nn.Module
    deepstack_merger_list: nn.ModuleList
    fullatt_block_indexes: Sequence[int]
    spatial_merge_size: int
    window_size: int
    patch_size: int


class QwenAttention(Protocol):
    """The attention of one of its vision blocks."""

    qkv: nn.Linear
    num_heads: int
    scaling: float


class IdeficsModel(Protocol):
    """The part of Idefics3 and SmolVLM below the head."""

    vision_model: nn.Module
    connector: Any  # a module with pixel_shuffle(x, scale_factor) and modality_projection

    def get_image_features(
        self, *, pixel_values: Tensor, pixel_attention_mask: Tensor = ..., return_dict: bool
    ) -> EncodedImages:
        """Encode tiles (samples, tiles, 3, H, W)."""
        ...


class CLIPAttention(Protocol):
    """The attention of one layer of a CLIP, SigLIP or InternViT tower."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    num_heads: int
    scale: float


# A cast and no check: tests run every family on the real classes, and a copy of their checks would only grow old.


def llava_model(model: nn.Module) -> LlavaModel:
    """Return the part below the head."""
    return cast(LlavaModel, model.base_model)


def llava_next_model(model: nn.Module) -> LlavaNextModel:
    """Return the part below the head."""
    return cast(LlavaNextModel, model.base_model)


def idefics_model(model: nn.Module) -> IdeficsModel:
    """Return the part below the head."""
    return cast(IdeficsModel, model.base_model)


def qwen_visual(model: nn.Module) -> QwenVisual:
    """Return the vision side."""
    return cast(QwenVisual, model.base_model.visual)  # type: ignore[union-attr]


def qwen_attention(block: nn.Module) -> QwenAttention:
    """Return the attention of a vision block."""
    return cast(QwenAttention, block.get_submodule("attn"))


def clip_attention(layer: nn.Module, path: str = "self_attn") -> CLIPAttention:
    """Return the attention of a tower's layer."""
    return cast(CLIPAttention, layer.get_submodule(path))
