"""LlavaOnevision: images as a base view and crops, and videos; the model may interpolate both behind its projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.anyres import check_crops, crops_of
from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.clips import check_clips, numbers_of, of_clips, with_end
from prunetune.pruning.families.llava_next import LlavaNext
from prunetune.pruning.families.resized import Layout, Packing, of_crops
from prunetune.pruning.families.tower import patch_grid, per_llm_token, record_signals, visual_tokens
from prunetune.pruning.hooks import record_input, record_output
from prunetune.pruning.vision import Vision


class LlavaOnevision(LlavaNext):
    """The items are the crops of images, the frames of videos, and images whose merged grid the model interpolates.

    Frames, and the grids of very large images (``anyres_max_9``), are interpolated behind the projector: one token is
    made of several projected patches. A pruner sees such tokens, with features and scores that are interpolated in the
    same way; those of the base view and of the grid are one item, which forms no patch grid: methods that need one
    (``hiprune``, ``gridprune``, ``downsample``, ``vscan``) refuse such an image when they meet it. Kept tokens are the
    model's own bit for bit, and are interpolated anew when the projector changes. Merged ones are not what the model
    would make of the same patches: a pruner merges features before the projector, so they were interpolated before it,
    too.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    projects_tokens = False
    pixels: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    replaced = ("image_sizes", "image_sizes_videos", "batch_num_images")
    one_tensor = ("video",)
    item = "crop or frame"

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (images, crops, 3, H, W) or ``pixel_values_videos`` (videos, F, 3, H, W).

        Images come with ``image_sizes`` (images, 2), and with ``batch_num_images`` (rows,) where some rows may have
        several: those images are not cut up.
        """
        if modality == "video":
            return self._encode_videos(model, inputs["pixel_values_videos"], needs)
        base: Any = model.base_model
        pixels, sizes, per_row = inputs["pixel_values"], inputs["image_sizes"], inputs.get("batch_num_images")
        crops = _crops(model, sizes, per_row)
        check_crops(pixels, crops)
        with (
            record_input(base.multi_modal_projector) as features,
            record_output(base.multi_modal_projector) as outputs,
            record_signals(model, needs) as signals,
        ):
            output = base.get_image_features(
                pixel_values=pixels, image_sizes=sizes, batch_num_images=per_row, return_dict=True
            )
        tokens = visual_tokens(model, needs, features[0], outputs[0], signals)
        return of_crops(Packing(model, tuple(crops), sizes), tokens, output.pooler_output)

    def crops(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
        """Return how many crops each image has; those of rows with several are not cut up."""
        return _crops(model, inputs["image_sizes"], inputs.get("batch_num_images"))

    def reproject(self, model: nn.Module, vision: Vision) -> Vision:
        """Return stored images as the projector of now sees them: what is interpolated is interpolated anew."""
        if not vision.sources:  # nothing is
            return super().reproject(model, vision)
        base: Any = model.base_model
        projected = self.project(model, vision.sources["patches"])
        slots: Sequence[Tensor]
        if vision.modality == "video":
            pooled = base.apply_pooling(projected)  # (frames of all videos, N, D)
            clips = pooled.reshape(len(vision.slots), -1, pooled.shape[-1])
            slots = torch.cat([clips, base.image_newline.expand(len(clips), 1, -1)], dim=1).unbind()
            groups = [pooled]
        else:
            packing = Packing(model, tuple(vision.sources["crops"].tolist()), vision.sources["sizes"])
            slots = packing.pack(projected.split(packing.crops), base.image_newline)
            groups = Layout.of(packing, projected).projected(packing, projected, slots)
        changed = []
        for tokens, own in zip(vision.groups, groups, strict=True):
            changed.append(replace(tokens, projected=own))
        return replace(vision, groups=tuple(changed), slots=tuple(slots))

    def _encode_videos(self, model: nn.Module, pixels: Tensor, needs: frozenset[str]) -> Vision:
        base: Any = model.base_model
        check_clips(pixels)
        with record_input(base.multi_modal_projector) as features, record_signals(model, needs) as signals:
            output = base.get_video_features(pixel_values_videos=pixels, return_dict=True)
        patches = features[0]  # (frames of all videos, P, C)
        slots = output.pooler_output  # (videos, F * N + 1, D), a newline at the end
        rows, columns = patch_grid(model, patches.shape[1]) or (0, 0)

        def pooled(values: Tensor) -> Tensor:
            return base.apply_pooling(values.contiguous())

        tokens = visual_tokens(
            model,
            needs,
            pooled(patches),
            slots[:, :-1].unflatten(1, (pixels.shape[1], -1)).flatten(0, 1),
            per_llm_token(signals, pooled),
            grid=((rows + 1) // 2, (columns + 1) // 2),
        )
        vision = of_clips(tokens, slots, *with_end(numbers_of(tokens, len(slots))))
        return replace(vision, sources={"patches": patches})


def _crops(model: nn.Module, sizes: Int[Tensor, "images 2"], per_row: Sequence[int] | Tensor | None) -> list[int]:
    """Return how many crops each image has; those of rows with several images are a base view alone.

    Raises:
        PruningError: if there are not as many images as the rows ask for.
    """
    crops = crops_of(model, sizes)
    if per_row is None:
        return crops
    counts = per_row.tolist() if isinstance(per_row, Tensor) else list(per_row)
    if sum(counts) != len(crops):
        raise PruningError(
            f"`batch_num_images` {counts} are {sum(counts)} images, but `image_sizes` hold {len(crops)}; pass both as "
            "the processor returned them"
        )
    is_alone = []
    for number in counts:
        is_alone += [number == 1] * number
    return [own if alone else 1 for own, alone in zip(crops, is_alone, strict=True)]


register_family(LlavaOnevision())
