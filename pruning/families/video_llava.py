"""VideoLlava: a tower for images and one for videos behind one projector; each frame brings its [CLS] to the LLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family, register_family
from prunetune.pruning.families.clips import check_clips, numbers_of, of_clips, with_cls_first
from prunetune.pruning.families.tower import Tower, blank_image, record_signals, tower_of, visual_tokens
from prunetune.pruning.hooks import record_input
from prunetune.pruning.vision import Vision

TOWERS = {"image": "image_tower", "video": "video_tower"}


class VideoLlava(Family):
    """The items are images, and the frames of videos; a pruner sees their patches.

    The model sends the [CLS] of every frame to the LLM. It is no patch, so no pruner ranks it: it is handled as a row
    end of its frame (``pruning.newline``), and stays by default while a patch of its frame stays.
    """

    name = "video_llava"
    model_types = ("video_llava",)
    pixels: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    former_names: ClassVar[Mapping[str, str]] = {"pixel_values_images": "pixel_values"}
    replaced = ()
    unread = ("token_type_ids", "mm_token_type_ids")
    one_tensor = ("image", "video")
    item = "frame"

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the towers offer; both are of one kind."""
        return self._tower(model, "image").signals()

    def frozen_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return both towers."""
        return tuple(model.base_model.get_submodule(path) for path in TOWERS.values())  # type: ignore[union-attr]

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, 3, H, W) or ``pixel_values_videos`` (videos, F, 3, H, W)."""
        base: Any = model.base_model
        name = self.pixels[modality]
        pixels = inputs[name]
        if modality == "video":
            check_clips(pixels)
        elif pixels.ndim != 4:
            raise PruningError(f"`pixel_values` must be (images, 3, height, width), got {tuple(pixels.shape)}")
        tower = self._tower(model, modality)
        encode = getattr(base, f"get_{modality}_features")
        with record_input(base.multi_modal_projector) as features, record_signals(model, needs, tower) as signals:
            output = encode(**{name: pixels}, return_dict=True)
        hidden = features[0]  # (items, N, C), or (items, 1 + N, C)
        slots = output.pooler_output
        has_cls = hidden.shape[1] != self._patches(model)
        tokens = visual_tokens(model, needs, hidden[:, has_cls:], slots[:, has_cls:], signals, tower)
        numbers = numbers_of(tokens, len(pixels))
        slots = slots.unflatten(0, (len(pixels), -1)).flatten(1, 2)
        if not has_cls:
            return of_clips(tokens, slots, numbers.flatten(1), modality=modality)
        vision = of_clips(tokens, slots, *with_cls_first(numbers), modality=modality)
        return replace(vision, sources={"cls": hidden[:, :1]})

    def reproject(self, model: nn.Module, vision: Vision) -> Vision:
        """Return stored images as the projector of now sees them: [CLS] goes through it like the patches."""
        if "cls" not in vision.sources:
            return super().reproject(model, vision)
        (tokens,) = vision.groups
        projected = self.project(model, torch.cat([vision.sources["cls"], tokens.features], dim=1))
        slots = projected.unflatten(0, (len(vision.slots), -1)).flatten(1, 2)
        return replace(vision, groups=(replace(tokens, projected=projected[:, 1:]),), slots=tuple(slots))

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image."""
        return {"pixel_values": blank_image(model)}

    def blank_of(self, model: nn.Module, modality: str) -> dict[str, Tensor]:
        """Return one black image, or a clip of one black frame."""
        blank = super().blank_of(model, modality)
        if modality == "video":
            return {name: pixels[:, None] for name, pixels in blank.items()}
        return blank

    def _tower(self, model: nn.Module, modality: str) -> Tower:
        # Whether or not [CLS] enters the projector: what a pruner sees are patches.
        return replace(tower_of(model, TOWERS[modality]), with_cls_token=False)

    def _patches(self, model: nn.Module) -> int:
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        return (vision.image_size // vision.patch_size) ** 2


register_family(VideoLlava())
