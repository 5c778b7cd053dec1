"""The vision tower of CLIP-like families: which signals it offers, and reading them while the model encodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.stock import clip_attention
from prunetune.pruning.hooks import LinearCall, record_input, record_keywords, record_linear, record_output
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.signals import Attention, Signal, layer_of, of_source, registered_signals, signal_of
from prunetune.pruning.types import VisualTokens

TOWERS_WITH_CLS = ("clip_vision_model",)
TOWERS = (*TOWERS_WITH_CLS, "siglip_vision_model", "idefics3_vision", "smolvlm_vision")

PATCH_MASK = "patch_attention_mask"
"""The tower's input (B, rows, columns) that says which patches are no padding, in families that have it."""


@dataclass(frozen=True)
class Tower:
    """A model's vision layers, seen from the one whose output enters the projector.

    Attributes:
        module: the tower.
        layers: its layers; empty for a tower of another kind.
        feature: the index of the layer whose output enters the projector.
        has_cls: whether its sequences begin with [CLS].
        known: whether it is one whose attention can be read, with the feature layer among its layers.
        with_cls_token: whether [CLS] enters the projector.
        path: of the tower, below the conditional-generation model.
        projector: path of the projector.
    """

    module: nn.Module
    layers: nn.ModuleList
    feature: int
    has_cls: bool
    known: bool
    with_cls_token: bool
    path: str
    projector: str

    def signals(self) -> frozenset[str]:
        """Return the vision signals this tower offers."""
        return frozenset(name for name, signal in registered_signals().items() if self._offers(signal))

    def _offers(self, signal: Signal) -> bool:
        if signal.source in ("text", "head"):
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
    layer = getattr(config, "vision_feature_layer", -1)  # families that name none take the last
    if not isinstance(layer, int):  # several layers side by side: the last named counts
        layer = layer[-1]
    path, projector = "vision_tower", "multi_modal_projector"
    if not hasattr(base, path):  # Idefics and its kin
        path, projector = "vision_model", "connector"
    module = base.get_submodule(path)
    layers = nn.ModuleList()
    if kind in TOWERS:
        layers = module.encoder.layers
    # hidden_states[0] is the embedding: the output of layers[i] is hidden_states[i + 1]; from the end both count alike.
    feature = len(layers) + layer if layer < 0 else layer - 1
    has_cls = kind in TOWERS_WITH_CLS
    return Tower(
        module=module,
        layers=layers,
        feature=feature,
        has_cls=has_cls,
        known=kind in TOWERS and 0 <= feature < len(layers),
        with_cls_token=has_cls and config.vision_feature_select_strategy == "full",
        path=path,
        projector=projector,
    )


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
        keywords = hooks.enter_context(record_keywords(tower.module))
        layers = {need: tower.index_of(need) for need in of_source(needs, "attention", "reader", "output")}
        queries, keys, outputs = {}, {}, {}
        # Several signals of one layer share one recording of it.
        for index in {layers[need] for need in of_source(needs, "attention", "reader")}:
            module = clip_attention(tower.layers[index])
            queries[index] = hooks.enter_context(record_linear(module.q_proj))
            keys[index] = hooks.enter_context(record_linear(module.k_proj))
        for index in {layers[need] for need in of_source(needs, "output")}:
            outputs[index] = hooks.enter_context(record_output(tower.layers[index]))
        yield signals

    # Only now, when the hooks are removed: an error here must not leave the model with them.
    for need in of_source(needs, "attention", "reader"):
        index = layers[need]
        attention = _attention(tower, index, queries[index][0], keys[index][0], keywords[0].get(PATCH_MASK))
        with exact_float32(attention.hidden.device):
            signals[signal_of(need).name] = _read(need, attention)
    for need in of_source(needs, "output"):
        hidden = outputs[layers[need]][0]
        if not isinstance(hidden, Tensor):  # layers return a tuple in some releases of transformers
            hidden = hidden[0]
        signals[signal_of(need).name] = _read(need, hidden)
    for need in of_source(needs, "pixels"):
        signals[signal_of(need).name] = _read(need, pixels[0])


def _attention(
    tower: Tower,
    index: int,
    query: LinearCall,
    key: LinearCall,
    patch_mask: Bool[Tensor, "B rows columns"] | None,
) -> Attention:
    module = clip_attention(tower.layers[index])
    return Attention(
        hidden=key.hidden,
        query_weight=query.weight,
        query_bias=query.bias,
        key_weight=key.weight,
        key_bias=key.bias,
        heads=module.num_heads,
        scale=module.scale,
        skip=int(tower.has_cls),
        visible=None if patch_mask is None else patch_mask.flatten(1),
    )


def _read(need: str, source: Attention | Tensor) -> Tensor:
    read = signal_of(need).read
    assert read is not None  # only text has none
    return read(source)


def signal_layers(model: nn.Module, needs: frozenset[str]) -> dict[str, str]:
    """Return the module path that features, projected features and each needed signal are read from."""
    tower = tower_of(model)
    paths = {"projected": tower.projector}
    if not tower.known:
        return paths
    indices = {"features": tower.feature}
    for need in of_source(needs, "attention", "reader", "output"):
        indices[signal_of(need).name] = tower.index_of(need)
    return paths | {name: f"{tower.path}.encoder.layers.{index}" for name, index in indices.items()}


def patch_grid(model: nn.Module, count: int) -> tuple[int, int] | None:
    """Return the patch rows and columns if they make up exactly ``count`` tokens."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    side = vision.image_size // vision.patch_size
    return (side, side) if side * side == count else None


def visual_tokens(
    model: nn.Module,
    needs: frozenset[str],
    features: Float[Tensor, "B N C"],
    projected: Float[Tensor, "B N D"],
    signals: dict[str, Tensor],
) -> VisualTokens:
    """Return the items (B, N) with their signals, grid and the layers they were read from."""
    return VisualTokens(
        features=features,
        projected=projected,
        signals=signals,
        grid=patch_grid(model, projected.shape[1]),
        layers=signal_layers(model, needs),
    )


def blank_image(model: nn.Module) -> Float[Tensor, "1 3 H W"]:
    """Return one black image (1, 3, H, W) for the vision tower."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    parameter = next(model.parameters())
    size = vision.image_size
    return parameter.new_zeros(1, 3, size, size)


def per_llm_token(
    signals: dict[str, Tensor],
    merge: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return signals of patches as signals of the LLM tokens that the model makes of several patches each.

    Args:
        signals: by name, of P patches per item.
        merge: from (B, P, C) to (B, N, C), patches put together as the model does.
    """
    merged = {}
    for name, values in signals.items():
        axes = signal_of(name).axes
        if axes == "B H N":
            values = merge(values.transpose(1, 2)).transpose(1, 2)
        elif axes == "B N":
            values = merge(values[..., None])[..., 0]
        elif axes == "B N C":
            values = merge(values)
        merged[name] = values
    return merged
