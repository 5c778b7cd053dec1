"""What Idefics3 and SmolVLM have in common: tiles of one size, whose patches are shuffled together to tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.base import Family
from prunetune.pruning.families.stock import idefics_model
from prunetune.pruning.families.tiling import Tiling, written_tilings
from prunetune.pruning.families.tower import Tower, blank_image, per_llm_token, record_signals, signal_layers, tower_of
from prunetune.pruning.hooks import record_input, record_output
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import Vision, of_equal_images


class Idefics(Family):
    """An item is a tile: an image, a tile of one, its global view, or a frame of a video.

    The processor cuts an image into tiles and writes a run of placeholders for each, and the model is not told which
    tiles are one image's. So every tile counts as an image, and budgets are per tile whatever the scope is.

    What the padding of a tile hides gives and receives no attention; its tokens are in the sequence like any other.
    """

    replaced = ("pixel_attention_mask",)
    unread = ("token_type_ids", "mm_token_type_ids")
    projectors: ClassVar[tuple[str, ...]] = ("connector.modality_projection",)
    language_model = "text_model"
    item = "crop"

    def signals(self, model: nn.Module) -> frozenset[str]:
        """Return what the tower offers."""
        return _tower(model).signals()

    def frozen_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the tower."""
        return (idefics_model(model).vision_model,)

    def encode(self, model: nn.Module, inputs: Mapping[str, Any], modality: str, needs: frozenset[str]) -> Vision:
        """Encode ``pixel_values`` (samples, tiles, 3, H, W), where samples with fewer tiles are filled up with zeros.

        Raises:
            PruningError: if no tile is anything but zeros, which the model takes for padding.
        """
        stock = idefics_model(model)
        names = ("pixel_values", "pixel_attention_mask")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if not bool(given["pixel_values"].any()):
            raise PruningError(
                "pixel_values holds zeros alone, which the model takes for the padding of samples with fewer images; "
                "leave it out of a batch of text"
            )
        connector, tower = stock.connector, _tower(model)
        # Tiles are read around the connector: what the model returns is cut by samples.
        with (
            record_input(connector) as patches,
            record_output(connector) as projected,
            record_signals(model, needs, tower) as signals,
        ):
            stock.get_image_features(**given, return_dict=True)

        def shuffle(values: Float[Tensor, "B P C"]) -> Float[Tensor, "B N C"]:
            blocks = connector.pixel_shuffle(values.contiguous(), connector.scale_factor)  # (B, N, patches * C)
            return blocks.unflatten(-1, (-1, values.shape[-1])).mean(dim=-2)

        side = math.isqrt(projected[0].shape[1])
        tokens = VisualTokens(
            features=connector.pixel_shuffle(patches[0], connector.scale_factor),
            projected=projected[0],
            signals=per_llm_token(signals, shuffle),
            grid=(side, side),
            layers=signal_layers(model, needs, tower),
        )
        return of_equal_images(tokens)

    def tilings(
        self, model: nn.Module, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
    ) -> list[Tiling] | None:
        """Return the tiles of each picture, as the prompt (1, L) names them."""
        (ids,) = inputs["input_ids"]
        return written_tilings(ids, self.token_id(model, "image"), processor.tokenizer)

    def blank(self, model: nn.Module) -> dict[str, Tensor]:
        """Return one white tile: the model takes black ones for padding."""
        return {"pixel_values": blank_image(model)[None] + 1}


def _tower(model: nn.Module) -> Tower:
    return tower_of(model, path="vision_model", projector="connector")
