"""What a model's costs depend on: sizes read from its modules, of which no weight is looked at.

A model on the meta device is enough. Linear layers are counted by their number of weights: one token costs two FLOP a
weight. Embeddings are looked up and cost none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunetune.pruning.families import Family, family_of


@dataclass(frozen=True)
class LanguageShape:
    """The LLM.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        linear: weights of all linear layers of all decoder layers.
        last_linear: those of each layer's last one, if recomputation stops before it: a frozen linear layer saves
            nothing for the backward pass but its weight, and in most models nothing asks for its output.
        query: heads x their width.
        key: key and value heads x their width.
        heads: attention heads.
        feed_forward: width of the feed-forward part.
        gated: whether its activation is multiplied with a second product.
        norms: elements that the norms of one layer normalise, per token.
        vocabulary: rows of the output layer.
        windows: for each layer the tokens that its attention reaches back; None is all of them.
    """

    hidden: int
    layers: int
    linear: int
    last_linear: int
    query: int
    key: int
    heads: int
    feed_forward: int
    gated: bool
    norms: int
    vocabulary: int
    windows: tuple[int | None, ...]

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class TowerShape:
    """The vision tower.

    Attributes:
        width: of its residual stream.
        layers: how many run: all there are.
        needed: how many lie before what enters the projector.
        linear: weights of the linear layers of one layer.
        feed_forward: width of the feed-forward part.
        embedding: weights that make one patch of pixels.
        whole: layers whose attention sees the whole image; None is all.
        window: patches that the other layers see.
    """

    width: int
    layers: int
    needed: int
    linear: int
    feed_forward: int
    embedding: int
    whole: int | None = None
    window: int = 0

    def whole_of(self, layers: int) -> int:
        """Return how many of the first layers see the whole image."""
        return layers if self.whole is None else min(self.whole, layers)


@dataclass(frozen=True)
class ProjectorShape:
    """What trains.

    Attributes:
        parameters: all of it.
        linear: weights of its linear layers, applied once per LLM token.
        width: elements per LLM token that its backward pass needs, inputs and activations.
    """

    parameters: int
    linear: int
    width: int


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        family: the family's name.
        parameters: all there are, the projector's included, tied ones once.
        language: the LLM.
        tower: the vision tower; None where a family from outside has one that can't be counted.
        projector: what trains.
    """

    family: str
    parameters: int
    language: LanguageShape
    tower: TowerShape | None
    projector: ProjectorShape


def shape_of(model: nn.Module) -> ModelShape:
    """Return a model's sizes; it may lie on the meta device, be quantised, or be wrapped by PEFT.

    Raises:
        PruningError: if no family covers the model.
    """
    family = family_of(model)
    base: Any = model.base_model
    projectors = [base.get_submodule(path) for path in family.projectors]
    return ModelShape(
        family=family.name,
        parameters=_parameters(model),
        language=_language(model, family.llm(model)),
        tower=_tower(model, family, projectors),
        projector=_projector(projectors),
    )


def _weights(module: nn.Module) -> int:
    """Return the weights of a linear layer; those of a quantised one are packed into fewer numbers."""
    return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, of whatever precision."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _linears(module: nn.Module) -> list[nn.Module]:
    return [part for name, part in module.named_modules() if is_linear(part) and "original_module" not in name]


def _parameters(model: nn.Module) -> int:
    """Return how many parameters there are; PEFT's originals beside the trained copies are not counted."""
    linear = {id(part.weight) for part in model.modules() if is_linear(part)}
    total, seen = 0, set()
    for name, part in model.named_modules():
        if "original_module" in name:
            continue
        if is_linear(part) and id(part.weight) not in seen:
            seen.add(id(part.weight))
            total += _weights(part)
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in seen and id(parameter) not in linear:
                seen.add(id(parameter))
                # Under ZeRO-3 a parameter is in pieces, and DeepSpeed notes how large it is.
                total += getattr(parameter, "ds_numel", None) or parameter.numel()
    return total


def _layers(module: nn.Module, leave_out: Collection[int] = ()) -> nn.ModuleList:
    """Return the module list with most weights below a module, its layers; what is left out has an id named here."""

    def weights(part: nn.Module) -> int:
        return sum(_weights(linear) for linear in _linears(part) if id(linear) not in leave_out)

    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=weights, default=nn.ModuleList())


def _language(model: nn.Module, language_model: nn.Module) -> LanguageShape:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = _layers(language_model)
    first, hidden, heads = layers[0], config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    key = getattr(config, "num_key_value_heads", None) or heads
    last = [part for part in _linears(first) if part.out_features == hidden][-1]
    # A norm behind it, as Gemma's layers have, needs its output.
    behind = hasattr(first, "post_feedforward_layernorm")
    spread = [part for part in _linears(first) if part.out_features == config.intermediate_size]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return LanguageShape(
        hidden=hidden,
        layers=len(layers),
        linear=sum(_weights(part) for part in _linears(layers)),
        last_linear=0 if behind else _weights(last) * len(layers),
        query=heads * width,
        key=key * width,
        heads=heads,
        feed_forward=config.intermediate_size,
        gated=len(spread) > 1,
        norms=_normalised(first, width, heads, key),
        vocabulary=int(head.out_features),
        windows=_windows(config, len(layers)),
    )


def _normalised(layer: nn.Module, width: int, heads: int, key: int) -> int:
    """Return how many elements of a token the norms of a layer normalise; norms of queries and keys work head-wise."""
    total = 0
    for name, part in layer.named_modules():
        weight = getattr(part, "weight", None)
        if weight is None or is_linear(part) or getattr(weight, "ndim", 0) != 1:
            continue
        size = getattr(weight, "ds_numel", None) or weight.numel()
        if size == width and name.endswith(("q_norm", "k_norm")):
            size *= heads if name.endswith("q_norm") else key
        total += size
    return total


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """Return how far each layer's attention reaches back."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds or window is None:
        return (None,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])


def _tower(model: nn.Module, family: Family, projectors: list[nn.Module]) -> TowerShape | None:
    parts = family.frozen_parts(model)
    config: Any = getattr(model.config, "vision_config", None)  # type: ignore[union-attr]
    if not parts or config is None:
        return None
    tower = parts[0]
    within = {id(part) for projector in projectors for part in projector.modules()}
    layers = _layers(tower, within)  # deepstack's mergers are a list as well
    linears = [part for part in _linears(layers) if id(part) not in within]
    if not linears:
        return None
    convolutions = [part for part in tower.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
    whole, window = None, 0
    if getattr(config, "fullatt_block_indexes", None) and getattr(config, "window_size", None):
        whole = len(config.fullatt_block_indexes)
        window = (config.window_size // config.patch_size) ** 2
    return TowerShape(
        width=_width(layers[0]),
        layers=len(layers),
        needed=min(family.vision_layers(model), len(layers)),
        linear=sum(_weights(part) for part in linears) // len(layers),
        feed_forward=max(int(part.out_features) for part in _linears(layers[0])),  # type: ignore[arg-type]
        embedding=sum(part.weight.numel() for part in convolutions),
        whole=whole,
        window=window,
    )


def _width(layer: nn.Module) -> int:
    return min(int(part.in_features) for part in _linears(layer))  # type: ignore[arg-type]


def _projector(projectors: list[nn.Module]) -> ProjectorShape:
    parameters = linear = width = 0
    for projector in projectors:
        parameters += _parameters(projector)
        for name, parameter in projector.named_parameters():
            size = getattr(parameter, "ds_shape", None) or parameter.shape
            # By parameters and not by modules: Gemma 3's projector is a bare matrix.
            if len(size) == 2 and "original_module" not in name:
                linear += size[0] * size[1]
                width += size[0] + size[1]
    return ProjectorShape(parameters, linear, width)
