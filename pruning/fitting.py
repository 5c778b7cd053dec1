"""What of a method is fitted to a model: a method's file declares it, and ``prunetune calibrate`` does it.

A published default is one model's: whether CLIP's patches point towards or away from matching text, how complex images
are on average, or which layer looks at objects is a property of the tower, not of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.types import Pruner, Selection, VisualTokens


def always(pruner: Any) -> bool:
    """Return True: the option counts whatever the other options are."""
    return True


@dataclass(frozen=True)
class Fit:
    """An option that belongs to the model.

    Attributes:
        option: its name.
        counts: whether it decides anything under a pruner's other options; text of weight 0 has no sign.
    """

    option: str
    counts: Callable[[Any], bool] = always


@dataclass(frozen=True)
class Mean(Fit):
    """An option that holds the mean of a measure over a sample of data.

    Attributes:
        measure: returns one number per item (B,) of what a pruner chooses from.
    """

    measure: Callable[[VisualTokens], Float[Tensor, " B"]] | None = None


@dataclass(frozen=True)
class Choice(Fit):
    """An option with few values, of which the one with the best answers is taken.

    Attributes:
        values: all of them.
    """

    values: Sequence[Any] = ()


@dataclass(frozen=True)
class Layer(Fit):
    """An option that names a vision layer by its number from 1: a choice whose values the model has."""


@dataclass(frozen=True)
class Report:
    """Something about a method's choices that its users should know, and that no option holds.

    Attributes:
        name: what it is called in tables.
        measure: returns one number per item (B,) of the pruner, what it chose from, and what it kept; None where its
            options leave nothing to tell.
    """

    name: str
    measure: Callable[[Any, VisualTokens, Selection], Shaped[Tensor, " B"] | None]


def check_fits(name: str, pruner: type, fits: Sequence[Fit]) -> None:
    """Check that what a method declares are options of its own.

    Raises:
        PruningError: if one is not, or a mean has no measure, or a choice no values.
    """
    options = {field.name for field in fields(pruner)}
    for fit in fits:
        if fit.option not in options:
            raise PruningError(f"{name} declares a fit of {fit.option!r}, which is no field of {pruner.__name__}")
        if isinstance(fit, Mean) and fit.measure is None:
            raise PruningError(f"{name} declares {fit.option!r} as a mean of nothing; give it a measure")
        if isinstance(fit, Choice) and len(fit.values) < 2:
            raise PruningError(f"{name} declares {fit.option!r} as a choice of {len(fit.values)} values; give it two")


def unfitted(fits: Sequence[Fit], pruner: Pruner, options: Mapping[str, Any]) -> list[str]:
    """Return the options that count, belong to the model, and were set by nobody.

    Args:
        fits: what the method declares.
        pruner: the method with its options.
        options: those of them that were set, by a configuration or a profile.
    """
    return [fit.option for fit in fits if fit.option not in options and fit.counts(pruner)]
