"""vLLM's LLaVA with a pruner; imported by vLLM alone, in its own environment. Written for vLLM 0.32.

Tests run it where ``PRUNETUNE_VLLM_PYTHON`` names an interpreter that has vLLM, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from prunetune.pruning.errors import PruningError
from prunetune.pruning.registry import build_pruner, method_of
from prunetune.pruning.types import VisualTokens

SETTINGS = "prunetune"
"""The entry of the model's configuration: ``pruner``, ``keep``, and ``options`` where the method has any; or
``pruning`` with these, as exports have it."""


def settings_of(config: Any) -> Mapping[str, Any]:
    """Return what a model's configuration says of pruning.

    Raises:
        PruningError: if it says nothing, the number of tokens is none, or the method can't run inside an engine.
    """
    settings = getattr(config, SETTINGS, None)
    if isinstance(settings, Mapping):
        settings = settings.get("pruning", settings)  # of an export, which names what it was tuned for
    if not isinstance(settings, Mapping) or not {"pruner", "keep"} <= settings.keys():
        raise PruningError("--hf-overrides lacks prunetune: {pruner: NAME, keep: NUMBER}, which this class reads")
    method = method_of(settings["pruner"])
    if method.needs or method.merges or method.video or not method.servable:
        raise PruningError(f"{method.name} can't run inside vLLM: it reads or gives more than kept features")
    if not isinstance(settings["keep"], int) or settings["keep"] < 1:
        raise PruningError(f"keep is a number of tokens, at least 1, got {settings['keep']!r}")
    return settings


class Info(LlavaProcessingInfo):
    """Sizes placeholders, and memory, by the number of kept tokens."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Return how many tokens of an image reach the LLM, whatever its size."""
        every = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return min(settings_of(self.get_hf_config())["keep"], every)


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class PrunedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose images are pruned behind the projector."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = settings_of(vllm_config.model_config.hf_config)
        self.pruner = build_pruner(settings["pruner"], settings.get("options"))
        self.keep: int = settings["keep"]

    def _process_image_input(self, image_input: Any) -> Any:
        """Return the kept, projected features of each image, (K, D) each; features that are given pass through."""
        if image_input["type"] == "image_embeds":
            return super()._process_image_input(image_input)
        features = self._process_image_pixels(image_input)  # (B, N, C), without [CLS]
        if not isinstance(features, Tensor):
            features = torch.stack(list(features))
        projected = self.multi_modal_projector(features)  # (B, N, D)
        if self.keep >= projected.shape[1]:
            return tuple(projected)
        kept = []
        for own, tokens in zip(features, projected, strict=True):  # each for itself, as everywhere
            chosen = self.pruner(visual_tokens(own, tokens), self.keep)
            kept.append(tokens[chosen.indices[0]])
        return tuple(kept)


def visual_tokens(features: Tensor, projected: Tensor) -> VisualTokens:
    """Return one image as methods read it: features (N, C) and what the projector made of them (N, D)."""
    side = round(len(features) ** 0.5)
    return VisualTokens(features[None], projected=projected[None], grid=(side, side))
