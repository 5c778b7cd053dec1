"""What the Qwen-VL families have in common: native resolution, patches joined to tokens, positions in three parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family, three_parts
from prunetune.pruning.families.frames import of_frames
from prunetune.pruning.families.qwen_tower import QwenTower
from prunetune.pruning.families.stock import qwen_visual
from prunetune.pruning.hooks import record_input
from prunetune.pruning.signals import signal_of
from prunetune.pruning.vision import Vision

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
KINDS = {"image": 1, "video": 2}
"""The codes of transformers' processors in ``mm_token_type_ids``; text is 0."""


class QwenVL(Family):
    """The items are images, and the frames of videos; frames of one size are pruned together.

    The defaults are those of Qwen2-VL: every block of the tower sees a whole image or frame, tokens are in raster
    order, and the four patches of a token follow one another.
    """

    pixels: ClassVar[Mapping[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    replaced = (*GRIDS.values(), "mm_token_type_ids", "second_per_grid_ts")
    unread = ("token_type_ids",)
    projectors: ClassVar[tuple[str, ...]] = ("visual.merger",)
    item = "frame"
    position_policies = ("original",)
    counts_rows_and_columns = True

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the vision blocks offer."""
        return self.tower(model).signals()

    def frozen_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the tower."""
        base: Any = model.base_model
        return (base.visual,)

    def tower(self, model: nn.Module) -> QwenTower:
        """Return the vision blocks, and the one that attention is read from."""
        visual = qwen_visual(model)
        return QwenTower(visual.blocks, len(visual.blocks) - 1, visual.spatial_merge_size**2)

    def raster_order(
        self,
        model: nn.Module,
        grids: Int[Tensor, "images 3"],
    ) -> Int[Tensor, " T"] | None:
        """Return for each token in raster order its index in the tower's order, (T,); None where the two are one."""
        return None

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode patches (P, values) of ``image_grid_thw`` or ``video_grid_thw`` (images, 3)."""
        base: Any = model.base_model
        visual = qwen_visual(model)
        pixels = inputs[self.pixels[modality]]
        grids: Any = inputs.get(GRIDS[modality])
        merge = visual.spatial_merge_size
        sizes = self._sizes(modality, pixels, grids, merge)
        encode = getattr(base, f"get_{modality}_features")
        with record_input(visual.merger) as patches, self.tower(model).record(needs) as flat:
            output = encode(**{self.pixels[modality]: pixels, GRIDS[modality]: grids}, return_dict=True)

        # Images come back in raster order, what was read on the way is in the tower's.
        raster = self.raster_order(model, grids)  # (T,)
        features = patches[0].reshape(-1, merge * merge * patches[0].shape[-1])  # (T, 4 * C)
        signals = dict(flat)
        if raster is not None:
            features = features[raster]
            for name, values in flat.items():
                signals[name] = values[:, raster] if signal_of(name).axes == "B H N" else values[raster]
        # The processor writes the pixels of a token one after another, tokens in raster order already.
        pixel_rows = pixels.reshape(len(features), -1)
        return of_frames(modality, sizes, features, output.pooler_output, signals, pixel_rows, needs)

    def _sizes(
        self,
        modality: str,
        pixels: Tensor,
        grids: Int[Tensor, "images 3"] | None,
        merge: int,
    ) -> list[tuple[int, int, int]]:
        """Return frames, and rows and columns of tokens, of every image or video.

        Raises:
            PruningError: if grids are missing, or do not add up to the patches.
        """
        if grids is None:
            raise PruningError(f"{self.pixels[modality]} came without {GRIDS[modality]}; the processor returns both")
        sizes = []
        for frames, rows, columns in grids.tolist():
            sizes.append((frames, rows // merge, columns // merge))
        patches = merge**2 * sum(math.prod(size) for size in sizes)
        if patches != len(pixels):
            raise PruningError(
                f"{GRIDS[modality]} names {len(grids)} {modality}s of {patches} patches in all, but "
                f"{self.pixels[modality]} holds {len(pixels)}; give both as the processor returned them"
            )
        return sizes

    def positions(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the model's own positions (3, B, L) of the full sequence: of time, row and column.

        Raises:
            PruningError: if placeholders do not stand in the runs that the model counts by.
        """
        given_positions = inputs.get("position_ids")
        if given_positions is not None:
            return three_parts(given_positions)
        base: Any = model.base_model
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:
            kinds = torch.zeros_like(inputs["input_ids"], dtype=torch.int)
            for modality, kind in KINDS.items():
                kinds = kinds + kind * (inputs["input_ids"] == self.token_id(model, modality)).int()
        self._check_runs(model, inputs, kinds)
        names = (*GRIDS.values(), "second_per_grid_ts", "attention_mask")
        given = {name: inputs.get(name) for name in names}
        return base.get_rope_index(inputs["input_ids"], mm_token_type_ids=kinds, **given)[0]

    def runs(self, modality: str, grid: tuple[int, int, int]) -> list[int]:
        """Return the runs of placeholders of one image or video, in tokens, of its frames, rows and columns of them."""
        frames, rows, columns = grid
        return [frames * rows * columns]

    def _check_runs(self, model: nn.Module, inputs: Mapping[str, Any], kinds: Int[Tensor, "B L"]) -> None:
        """Check that every run of placeholders is an image's: the model counts rows and columns run by run."""
        merge = qwen_visual(model).spatial_merge_size
        # A column of text behind every row, so that no run goes on into the next.
        rows_apart = torch.nn.functional.pad(kinds * inputs["attention_mask"].bool(), (0, 1)).flatten()
        codes, lengths = torch.unique_consecutive(rows_apart, return_counts=True)
        runs = list(zip(codes.tolist(), lengths.tolist(), strict=True))
        for modality, kind in KINDS.items():
            grids = inputs.get(GRIDS[modality])
            expected = []
            for frames, rows, columns in [] if grids is None else grids.tolist():
                expected += self.runs(modality, (frames, rows // merge, columns // merge))
            found = [length for code, length in runs if code == kind]
            if found != expected:
                raise PruningError(
                    f"{modality} placeholders stand in runs of {found} tokens, but the {modality}s of the batch "
                    f"need runs of {expected}, with text between them; write the prompt as the processor does"
                )

    def project(
        self,
        model: nn.Module,
        features: Float[Tensor, "K C4"],
    ) -> Float[Tensor, "K D"]:
        """Return blocks of four patches (K, 4 * C) in LLM space (K, D)."""
        visual = qwen_visual(model)
        # The merger takes patches one by one and joins them itself.
        return visual.merger(self._patches(model, features))

    def _patches(
        self,
        model: nn.Module,
        features: Float[Tensor, "K C4"],
    ) -> Float[Tensor, "P C"]:
        """Return the patches of blocks (K, 4 * C) one by one."""
        patches = qwen_visual(model).spatial_merge_size ** 2
        return features.reshape(-1, features.shape[-1] // patches)

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one black image of two by two tokens."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        parameter = next(model.parameters())
        side = 2 * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]], device=parameter.device)
        return {"pixel_values": parameter.new_zeros(side * side, values), "image_grid_thw": grid}
