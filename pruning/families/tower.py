"""The vision tower of CLIP-like families: which signals it offers, and reading them while the model encodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from prunetune.pruning.errors import PruningError
from prunetune.pruning.families.stock import CLIPAttention, clip_attention
from prunetune.pruning.hooks import (
    LinearCall,
    record_input,
    record_keywords,
    record_linear,
    record_output,
    record_weight,
)
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.signals import Attention, Signal, layer_of, of_source, registered_signals, signal_of
from prunetune.pruning.types import VisualTokens


@dataclass(frozen=True)
class Kind:
    """How towers of one model type are built.

    Attributes:
        layers: the path of the layers below the tower.
        attention: the path of the attention below a layer.
        has_cls: whether sequences begin with [CLS].
        norm: the path of a norm below the tower that its last layer's output goes through to become features.
    """

    layers: str = "encoder.layers"
    attention: str = "self_attn"
    has_cls: bool = False
    norm: str | None = None


KINDS = {
    "clip_vision_model": Kind(has_cls=True),
    "siglip_vision_model": Kind(),
    "idefics3_vision": Kind(),
    "smolvlm_vision": Kind(),
    "internvl_vision": Kind("encoder.layer", "attention", has_cls=True, norm="layernorm"),
}
"""The towers whose attention can be read, by ``config.vision_config.model_type``."""

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
        with_cls_token: whether [CLS] enters the projector as one of the tokens that a pruner sees.
        attention: the path of the attention below a layer.
        path: the path of the layers below the model, for messages.
        projector: the path of the projector, for messages.
        norm: what the last layer's output goes through to become features; None for nothing.
    """

    module: nn.Module
    layers: nn.ModuleList
    feature: int
    has_cls: bool
    known: bool
    with_cls_token: bool
    attention: str = "self_attn"
    path: str = "vision_tower.encoder.layers"
    projector: str = "multi_modal_projector"
    norm: nn.Module | None = None

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

    def attention_of(self, index: int) -> CLIPAttention:
        """Return the attention of a layer."""
        return clip_attention(self.layers[index], self.attention)

    def output_of(self, index: int) -> nn.Module:
        """Return the module whose output are the hidden states after a layer."""
        is_last = index == len(self.layers) - 1
        return self.norm if self.norm is not None and is_last else self.layers[index]


def tower_of(model: nn.Module, path: str = "vision_tower", projector: str = "multi_modal_projector") -> Tower:
    """Return the tower of a model, which lies at ``path`` below the part without the head."""
    config: Any = model.config
    base: Any = model.base_model
    module = base.get_submodule(path)
    kind = KINDS.get(config.vision_config.model_type)
    layer = getattr(config, "vision_feature_layer", -1)  # families that name none take the last
    if not isinstance(layer, int):  # several layers side by side: the last named counts
        layer = layer[-1]
    if kind is None:
        none = nn.ModuleList()
        return Tower(module, none, layer, has_cls=False, known=False, with_cls_token=False, projector=projector)
    layers: Any = module.get_submodule(kind.layers)
    # hidden_states[0] is the embedding: the output of layers[i] is hidden_states[i + 1]; from the end both count alike.
    feature = len(layers) + layer if layer < 0 else layer - 1
    return Tower(
        module=module,
        layers=layers,
        feature=feature,
        has_cls=kind.has_cls,
        known=0 <= feature < len(layers),
        with_cls_token=kind.has_cls and config.vision_feature_select_strategy == "full",
        attention=kind.attention,
        path=f"{path}.{kind.layers}",
        projector=projector,
        norm=module.get_submodule(kind.norm) if kind.norm and layer == -1 else None,
    )


@contextmanager
def record_signals(model: nn.Module, needs: frozenset[str], tower: Tower | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the vision signals in ``needs`` while the model encodes its images; they are there as the context closes.

    Args:
        model: the stock model.
        needs: what the pruner asked for.
        tower: the tower that runs; None is the model's only one.

    Raises:
        PruningError: if the tower has no such layer.
    """
    tower = tower_of(model) if tower is None else tower
    signals: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        pixels = hooks.enter_context(record_input(tower.module))
        keywords = hooks.enter_context(record_keywords(tower.module))
        layers = {need: tower.index_of(need) for need in of_source(needs, "attention", "reader", "output")}
        recorded, outputs = {}, {}
        # Several signals of one layer share one recording of it.
        for index in {layers[need] for need in of_source(needs, "attention", "reader")}:
            recorded[index] = hooks.enter_context(_record_attention(tower, index))
        for index in {layers[need] for need in of_source(needs, "output")}:
            outputs[index] = hooks.enter_context(record_output(tower.output_of(index)))
        yield signals

    # Only now, when the hooks are removed: an error here must not leave the model with them.
    for need in of_source(needs, "attention", "reader"):
        attention = recorded[layers[need]].attention(keywords[0].get(PATCH_MASK))
        with exact_float32(attention.hidden.device):
            signals[signal_of(need).name] = _read(need, attention)
    for need in of_source(needs, "output"):
        hidden = outputs[layers[need]][0]
        if not isinstance(hidden, Tensor):  # layers return a tuple in some releases of transformers
            hidden = hidden[0]
        signals[signal_of(need).name] = _read(need, hidden)
    for need in of_source(needs, "pixels"):
        signals[signal_of(need).name] = _read(need, pixels[0])


@dataclass(frozen=True)
class _Recorded:
    """What was seen of one attention: the first call is the tower's run."""

    module: CLIPAttention
    skip: int
    queries: list[LinearCall]
    keys: list[LinearCall]
    norms: dict[str, list[Tensor]]

    def attention(self, patch_mask: Bool[Tensor, "B rows columns"] | None) -> Attention:
        """Return the layer's attention; ``patch_mask`` is false for padding, in towers that have it."""
        query, key = self.queries[0], self.keys[0]
        return Attention(
            hidden=key.hidden,
            query_weight=query.weight,
            query_bias=query.bias,
            key_weight=key.weight,
            key_bias=key.bias,
            heads=self.module.num_heads,
            scale=self.module.scale,
            skip=self.skip,
            query_norm=self._norm("q_norm"),
            key_norm=self._norm("k_norm"),
            visible=None if patch_mask is None else patch_mask.flatten(1),
        )

    def _norm(self, name: str) -> RMSNorm | None:
        if name not in self.norms:
            return None
        norm: Any = self.module
        return RMSNorm(self.norms[name][0], getattr(norm, name).variance_epsilon)


@dataclass(frozen=True)
class RMSNorm:
    """Divides by the root of the mean square over the last axis, in float64."""

    weight: Float[Tensor, " C"]
    epsilon: float

    def __call__(self, values: Float[Tensor, "*axes C"]) -> Float[Tensor, "*axes C"]:
        """Return ``values`` normed, float64."""
        values = values.double()
        square = values.square().mean(dim=-1, keepdim=True)
        return values * (square + self.epsilon).rsqrt() * self.weight.double()


@contextmanager
def _record_attention(tower: Tower, index: int) -> Iterator[_Recorded]:
    """Collect what enters the attention of one layer, and its weights."""
    module = tower.attention_of(index)
    with ExitStack() as hooks:
        norms = {}
        for name in ("q_norm", "k_norm"):
            norm = getattr(module, name, None)
            if norm is not None and not isinstance(norm, nn.Identity):
                norms[name] = hooks.enter_context(record_weight(norm))
        yield _Recorded(
            module=module,
            skip=int(tower.has_cls),
            queries=hooks.enter_context(record_linear(module.q_proj)),
            keys=hooks.enter_context(record_linear(module.k_proj)),
            norms=norms,
        )


def _read(need: str, source: Attention | Tensor) -> Tensor:
    read = signal_of(need).read
    assert read is not None  # only text has none
    return read(source)


def per_llm_token(
    signals: Mapping[str, Tensor],
    merge: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return signals of patches as signals of LLM tokens; those of an item as a whole stay as they are.

    Args:
        signals: as they were read of the tower, (B, H, N), (B, N, C), (B, N) and others.
        merge: makes (B, N, C) of patches to (B, T, C) of tokens, as the model merges patches.
    """
    merged = {}
    for name, values in signals.items():
        axes = signal_of(name).axes
        if not signal_of(name).per_token:
            merged[name] = values
            continue
        if axes == "B H N":
            values = values.transpose(1, 2)
        elif axes == "B N":
            values = values[..., None]
        # In float64, and rounded once: a mean has the same bits whatever the order of its sum is.
        values = merge(values.double()).float()
        if axes == "B H N":
            values = values.transpose(1, 2)
        elif axes == "B N":
            values = values[..., 0]
        merged[name] = values
    return merged


def signal_layers(model: nn.Module, needs: frozenset[str], tower: Tower | None = None) -> dict[str, str]:
    """Return the module path that features, projected features and each needed signal are read from."""
    tower = tower_of(model) if tower is None else tower
    paths = {"projected": tower.projector}
    if not tower.known:
        return paths
    indices = {"features": tower.feature}
    for need in of_source(needs, "attention", "reader", "output"):
        indices[signal_of(need).name] = tower.index_of(need)
    return paths | {name: f"{tower.path}.{index}" for name, index in indices.items()}


def patch_grid(model: nn.Module, count: int) -> tuple[int, int] | None:
    """Return the patch rows and columns if they make up exactly ``count`` tokens."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    sides = tower_sides(model)
    patch = vision.patch_size
    rows, columns = (side // (patch if isinstance(patch, int) else patch[axis]) for axis, side in enumerate(sides))
    return (rows, columns) if rows * columns == count else None


def tower_sides(model: nn.Module) -> tuple[int, int]:
    """Return height and width of the pixels that the tower takes."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def visual_tokens(
    model: nn.Module,
    needs: frozenset[str],
    features: Float[Tensor, "B N C"],
    projected: Float[Tensor, "B N D"],
    signals: Mapping[str, Tensor],
    tower: Tower | None = None,
    grid: tuple[int, int] | None = None,
) -> VisualTokens:
    """Return the items (B, N) with their signals, grid and the layers they were read from.

    Without a ``grid`` it is that of the tower's patches, if there are as many tokens.
    """
    return VisualTokens(
        features=features,
        projected=projected,
        signals=signals,
        grid=patch_grid(model, projected.shape[1]) if grid is None else grid,
        layers=signal_layers(model, needs, tower),
    )


def blank_image(model: nn.Module) -> Float[Tensor, "1 3 H W"]:
    """Return one black image (1, 3, H, W) for the vision tower."""
    return next(model.parameters()).new_zeros(1, 3, *tower_sides(model))
