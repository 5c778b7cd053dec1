"""LlavaNextVideo: images as LlavaNext has them; the frames of videos are pooled, two by two patches to a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.clips import check_clips, numbers_of, of_clips
from prunetune.pruning.families.llava_next import LlavaNext
from prunetune.pruning.families.tower import per_llm_token, record_signals, visual_tokens
from prunetune.pruning.hooks import record_input
from prunetune.pruning.vision import Vision


class LlavaNextVideo(LlavaNext):
    """The items are the crops of images and the frames of videos.

    A frame is pooled before it enters the projector, so a token's feature is the pooled one; its scores are means over
    the patches that were pooled.
    """

    name = "llava_next_video"
    model_types = ("llava_next_video",)
    projects_tokens = False
    pixels: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    item = "crop or frame"

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode crops as LlavaNext does, or ``pixel_values_videos`` (videos, F, 3, H, W)."""
        if modality == "image":
            return super().encode(model, inputs, modality, needs)
        base: Any = model.base_model
        pixels = inputs["pixel_values_videos"]
        check_clips(pixels)
        with record_input(base.multi_modal_projector) as features, record_signals(model, needs) as signals:
            output = base.get_video_features(pixel_values_videos=pixels, return_dict=True)
        slots = output.pooler_output  # (videos, F * N, D)
        config: Any = model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        stride: int = config.spatial_pool_stride

        def pooled(patches: Tensor) -> Tensor:
            """Return (B, P, C) as (B, N, C); whatever the pooling mode is, a score is the mean."""
            image = patches.transpose(1, 2).unflatten(2, (side, side))
            return avg_pool2d(image, stride, stride).flatten(2).transpose(1, 2)

        tokens = visual_tokens(
            model,
            needs,
            features[0],
            slots.unflatten(1, (pixels.shape[1], -1)).flatten(0, 1),
            per_llm_token(signals, pooled),
            grid=(side // stride, side // stride),
        )
        return of_clips(tokens, slots, numbers_of(tokens, len(slots)).flatten(1))


register_family(LlavaNextVideo())
