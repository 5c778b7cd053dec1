"""Reading a stock model while it runs: hooks on single modules, removed when the context closes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@contextmanager
def record_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first positional input of every call of ``module`` while the context is open."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        # Families call their projector by position or by keyword, and so may the next release of transformers.
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def record_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of ``module`` while the context is open."""
    seen: list[Tensor] = []
    # append() returns None, which leaves the output as it is.
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def record_keywords(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Collect the keyword arguments of every call of ``module`` while the context is open."""
    seen: list[dict[str, Any]] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(dict(kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear layer: its input and its weights."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@contextmanager
def record_linear(module: nn.Module) -> Iterator[list[LinearCall]]:
    """Collect input and weights of every call of a linear layer while the context is open.

    The weights are taken as the call begins: under ZeRO-3 they are whole only while their own layer runs, and
    ``detach`` keeps the whole ones alive after it.
    """
    seen: list[LinearCall] = []

    def hook(layer: nn.Linear, args: tuple) -> None:
        bias = None if layer.bias is None else layer.bias.detach()
        seen.append(LinearCall(args[0].detach(), layer.weight.detach(), bias))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether DeepSpeed's ZeRO-3 holds some of the weights in pieces."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def stood_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, a call of ``module`` runs ``forward`` instead; its hooks and weights stay where they are."""
    own = module.__dict__.get("forward")  # there is one where somebody else stands in already
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def record_weight(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the ``weight`` of a module, such as a norm, at every call while the context is open.

    Taken as the call begins, for the same reason as in :func:`record_linear`.
    """
    seen: list[Tensor] = []

    def hook(called: nn.Module, _: tuple) -> None:
        seen.append(called.get_parameter("weight").detach())

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def frozen_parts_at_rest(*parts: nn.Module) -> Iterator[None]:
    """Run frozen modules in eval mode while the context is open: a trainer's ``model.train()`` reaches them as well.

    Dropout or stochastic depth in a tower would give an image other features, and so other kept tokens, in training
    than in inference.
    """
    with ExitStack() as undo:
        for part in parts:
            for module in part.modules():
                # Module by module and not by eval(): a part may hold modules that were at rest before.
                if module.training:
                    module.training = False
                    undo.callback(setattr, module, "training", True)
        yield
