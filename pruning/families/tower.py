"""The vision tower of CLIP-like families: which signals it offers, and reading them while the model encodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.hooks import LinearCall, record_input, record_linear, record_output
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.signals import Attention, Signal, layer_of, of_source, registered_signals, signal_of
from prunetune.pruning.types import VisualTokens

TOWERS_WITH_CLS = ("clip_vision_model",)
TOWERS = (*TOWERS_WITH_CLS, "siglip_vision_model")


@dataclass(frozen=True)
class Tower:
    """A model's vision layers, seen from the one whose output enters the projector."""

    module: nn.Module
    layers: nn.ModuleList
    feature: int
    has_cls: bool
    known: bool
    with_cls_token: bool

    def signals(self) -> frozenset[str]:
        """Return the vision signals this tower offers."""
        return frozenset(name for name, signal in registered_signals().items() if self._offers(signal))

    def _offers(self, signal: Signal) -> bool:
        if signal.source == "text":
            return False
        if signal.source == "pixels":
            return True
        if not self.known or self.with_cls_token or (signal.cls and not self.has_cls):
            return False
        return signal.source != "reader" or self.feature + 1 < len(self.layers)

    def index_of(self, need: str) -> int:
        """Return the index of the layer that a signal is read from.

        Raises:
            PruningError: if the tower has no such layer.
        """
        signal, number = signal_of(need), layer_of(need)
        if signal.source == "reader":
            return self.feature + 1
        if number is None:
            return self.feature
        if not 1 <= number <= len(self.layers):
            raise PruningError(
                f"`{signal.name}` of vision layer {number} was asked for, but the tower has layers 1 to "
                f"{len(self.layers)}; set the method's layer option"
            )
        return number - 1


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
    inside = known and 0 <= feature < len(layers)
    return Tower(base.vision_tower, layers, feature, kind in TOWERS_WITH_CLS, inside, full)


@contextmanager
def record_signals(model: nn.Module, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the vision signals in ``needs`` while the model encodes its images; they are there as the context closes.

    Raises:
        PruningError: if the tower has no such layer.
    """
    tower = tower_of(model)
    signals: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        pixels = hooks.enter_context(record_input(tower.module))
        layers = {need: tower.index_of(need) for need in of_source(needs, "attention", "reader", "output")}
        attentions = {}
        for index in {layers[need] for need in of_source(needs, "attention", "reader")}:
            module: Any = tower.layers[index]
            linears = module.self_attn.q_proj, module.self_attn.k_proj
            attentions[index] = [hooks.enter_context(record_linear(linear)) for linear in linears]
        outputs = {}
        for index in {layers[need] for need in of_source(needs, "output")}:
            outputs[index] = hooks.enter_context(record_output(tower.layers[index]))
        yield signals

    for need in of_source(needs, "attention", "reader"):
        query, key = (calls[0] for calls in attentions[layers[need]])
        attention = _attention(tower, layers[need], query, key)
        with exact_float32(query.hidden.device):
            signals[signal_of(need).name] = _read(need, attention)
    for need in of_source(needs, "output"):
        hidden = outputs[layers[need]][0]
        signals[signal_of(need).name] = _read(need, hidden if isinstance(hidden, Tensor) else hidden[0])
    for need in of_source(needs, "pixels"):
        signals[signal_of(need).name] = _read(need, pixels[0])


def _attention(tower: Tower, index: int, query: LinearCall, key: LinearCall) -> Attention:
    module: Any = tower.layers[index]
    return Attention(
        hidden=key.hidden,
        query_weight=query.weight,
        query_bias=query.bias,
        key_weight=key.weight,
        key_bias=key.bias,
        heads=module.self_attn.num_heads,
        scale=module.self_attn.scale,
        skip=int(tower.has_cls),
    )


def _read(need: str, source: Any) -> Tensor:
    read = signal_of(need).read
    assert read is not None  # only text has none
    return read(source)


def signal_layers(model: nn.Module, needs: frozenset[str]) -> dict[str, str]:
    """Return the module path that features, projected features and each needed signal are read from."""
    tower = tower_of(model)
    paths = {"projected": "multi_modal_projector"}
    if not tower.known:
        return paths
    indices = {"features": tower.feature}
    for need in of_source(needs, "attention", "reader", "output"):
        indices[signal_of(need).name] = tower.index_of(need)
    return paths | {name: f"vision_tower.encoder.layers.{index}" for name, index in indices.items()}


def patch_grid(model: nn.Module, count: int) -> tuple[int, int] | None:
    """Return the patch rows and columns if they make up exactly ``count`` tokens."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    side = vision.image_size // vision.patch_size
    return (side, side) if side * side == count else None


def visual_tokens(
    model: nn.Module, needs: frozenset[str], features: Tensor, projected: Tensor, signals: dict[str, Tensor]
) -> VisualTokens:
    """Return the items (B, N) with their signals, grid and the layers they were read from."""
    return VisualTokens(
        features=features,
        projected=projected,
        signals=signals,
        grid=patch_grid(model, projected.shape[1]),
        layers=signal_layers(model, needs),
    )


def blank_image(model: nn.Module) -> Tensor:
    """Return one black image (1, 3, H, W) for the vision tower."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    parameter = next(model.parameters())
    size = vision.image_size
    return parameter.new_zeros(1, 3, size, size)
