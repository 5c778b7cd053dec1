"""The vision tower of CLIP-like families: which signals it offers, and reading them while the model encodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruning.signals import image_keys, record_attention, record_input, record_output
from pruning.types import PruningError, VisualTokens, signal_name

TOWERS_WITH_CLS = ("clip_vision_model",)
TOWERS = (*TOWERS_WITH_CLS, "siglip_vision_model")


@dataclass(frozen=True)
class Tower:
    """A model's vision layers, seen from the one whose output enters the projector."""

    layers: nn.ModuleList
    feature: int
    has_cls: bool
    known: bool
    with_cls_token: bool

    def signals(self) -> frozenset[str]:
        """Return the vision signals this tower offers."""
        offered = {"image_key"}
        if self.known and not self.with_cls_token:
            offered |= {"received_attention", "object_attention", "keys"}
            if self.has_cls:
                offered |= {"cls_attention", "cls_feature"}
                if self.feature + 1 < len(self.layers):
                    offered |= {"reader_attention", "reader_keys"}
        return frozenset(offered)

    def layer_of(self, need: str) -> int:
        """Return the index of the layer that a signal is read from.

        Raises:
            PruningError: if the tower has no such layer.
        """
        name, _, number = need.partition("@")
        if name.startswith("reader_"):
            return self.feature + 1
        if not number:
            return self.feature
        if not 1 <= int(number) <= len(self.layers):
            raise PruningError(
                f"`{name}` of vision layer {number} was asked for, but the tower has layers 1 to {len(self.layers)}; "
                "set the method's layer option"
            )
        return int(number) - 1


def tower_of(model: nn.Module) -> Tower:
    """Return the tower of a Llava-like model."""
    base: Any = model.base_model
    config: Any = model.config
    kind = config.vision_config.model_type
    layer = config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    known = kind in TOWERS
    layers = base.vision_tower.encoder.layers if known else nn.ModuleList()
    # hidden_states[0] is the embedding: the output of layers[i] is hidden_states[i + 1]; from the end both count alike.
    feature = len(layers) + layer if layer < 0 else layer - 1
    full = kind in TOWERS_WITH_CLS and config.vision_feature_select_strategy == "full"
    return Tower(layers, feature, kind in TOWERS_WITH_CLS, known and 0 <= feature < len(layers), full)


def vision_signals(model: nn.Module) -> frozenset[str]:
    """Return the vision signals a Llava-like model offers."""
    return tower_of(model).signals()


@contextmanager
def record_signals(model: nn.Module, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the vision signals in ``needs`` while the model encodes its images, by name.

    Raises:
        PruningError: if the tower has no such layer.
    """
    tower = tower_of(model)
    base: Any = model.base_model
    wanted = {signal_name(need): tower.layer_of(need) for need in _attention_needs(needs)}
    modules: dict[str, nn.Module] = {name: _attention(tower.layers[index]) for name, index in wanted.items()}
    watched = tower.layers[tower.feature] if "cls_feature" in needs else nn.Identity()
    with (
        record_input(base.vision_tower) as pixels,
        record_output(watched) as hidden,
        record_attention(modules, tower.has_cls) as seen,
    ):
        signals: dict[str, Tensor] = {}
        yield signals
    signals.update(seen)
    if hidden:
        signals["cls_feature"] = (hidden[0] if isinstance(hidden[0], Tensor) else hidden[0][0])[:, 0]
    if "image_key" in needs:
        signals["image_key"] = image_keys(pixels[0])


def signal_layers(model: nn.Module, needs: frozenset[str]) -> Mapping[str, str]:
    """Return the module path that features, projected features and each needed signal are read from."""
    tower = tower_of(model)
    if not tower.known:
        return {"projected": "multi_modal_projector"}
    places = {"features": tower.feature, "cls_feature": tower.feature}
    places |= {signal_name(need): tower.layer_of(need) for need in _attention_needs(needs)}
    paths = {name: f"vision_tower.encoder.layers.{index}" for name, index in places.items()}
    return paths | {"projected": "multi_modal_projector"}


def patch_grid(model: nn.Module, count: int) -> tuple[int, int] | None:
    """Return the patch rows and columns if they make up exactly ``count`` tokens."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    side = vision.image_size // vision.patch_size
    return (side, side) if side * side == count else None


def visual_tokens(
    model: nn.Module, needs: frozenset[str], features: Tensor, projected: Tensor, signals: Mapping[str, Tensor]
) -> VisualTokens:
    """Return the items (B, N) with their signals, grid and the layers they were read from."""
    return VisualTokens(
        features=features,
        projected=projected,
        grid=patch_grid(model, projected.shape[1]),
        layers=signal_layers(model, needs),
        **signals,  # type: ignore[arg-type]
    )


def _attention_needs(needs: frozenset[str]) -> frozenset[str]:
    return frozenset(need for need in needs if signal_name(need).endswith(("_attention", "keys")))


def _attention(layer: Any) -> nn.Module:
    return layer.self_attn
