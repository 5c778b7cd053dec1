"""An objective: the weighted sum of terms that a configuration asks for, made of what was read of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunetune.configs.schema import ObjectiveConfig
from prunetune.train.engine.head import Scores
from prunetune.train.engine.reading import Reading, Reads
from prunetune.train.objectives import terms

UNITS = ("answers", "text", "images", "update")
"""What sums are divided by: supervised tokens; text positions behind an image; rows with images; 1 an update."""


class TaughtScores(Protocol):
    """The teacher's distributions at some positions."""

    def kl(self, logits: Float[Tensor, "m V"], piece: slice, temperature: float) -> Float[Tensor, ""]:
        """Return the summed KL of the teacher's distributions to those of logits (m, V) at a piece of the positions."""
        ...


@dataclass(frozen=True)
class Taught:
    """What the teacher says of one batch, position by position as :class:`Reading` has it; None of what is not asked.

    Attributes:
        answers: at supervised positions.
        text: at text positions.
        hidden: (t, D) hidden states at text positions.
        features: (r, D) mean of all visual tokens of each row with images.
    """

    answers: TaughtScores | None = None
    text: TaughtScores | None = None
    hidden: Float[Tensor, "t D"] | None = None
    features: Float[Tensor, "r width"] | None = None


@dataclass(frozen=True)
class Losses:
    """What a batch adds to the loss.

    Attributes:
        units: by unit the weighted sum of its terms, with a graph; what is divided by the number of the unit.
        terms: by term its own sum, neither weighted nor with a graph.
    """

    units: dict[str, Float[Tensor, ""]]
    terms: dict[str, Float[Tensor, ""]]


class Objective:
    """What a run trains towards.

    Args:
        config: the terms with their weights.

    Attributes:
        weights: of the terms that count.
        reads: what is read of the model.
        teacher_reads: what is read of the teacher; None where nobody asks one.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.weights: dict[str, float] = {name: weight for name, weight in config.terms.items() if weight > 0}
        at_answers = [name for name in self.weights if self.unit_of(name) == "answers"]
        kl, hidden, feature = (name in self.weights for name in ("kl", "hidden", "feature"))
        self.reads = Reads(
            answers=bool(at_answers),
            text=kl and config.kl_at == "text",
            hidden=hidden,
            layer=config.hidden_layer if hidden else None,
            features=feature,
        )
        of_teacher = replace(self.reads, answers=kl and config.kl_at == "answers")
        self.teacher_reads = of_teacher if kl or hidden or feature else None

    @property
    def reads_answers(self) -> bool:
        """Whether any term is made of supervised tokens, so that samples without answers say nothing."""
        return self.reads.answers

    @property
    def labelled(self) -> bool:
        """Whether the answers themselves are what it trains towards, by ce or gce."""
        return "ce" in self.weights or "gce" in self.weights

    @property
    def units(self) -> tuple[str, ...]:
        """The units of its terms, in the order of ``UNITS``."""
        used = {self.unit_of(name) for name in self.weights}
        return tuple(unit for unit in UNITS if unit in used)

    def unit_of(self, term: str) -> str:
        """Return the unit of a term."""
        if term == "kl":
            return self.config.kl_at
        return {"hidden": "text", "feature": "images", "anchor": "update"}.get(term, "answers")

    def told(self) -> str:
        """Return the terms with their weights for people: ``ce + 0.5 hidden``."""
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in self.weights.items())

    def losses(self, read: Reading, taught: Taught, anchor: Callable[[], Float[Tensor, ""]] | None = None) -> Losses:
        """Return the losses of a batch.

        Args:
            read: of the model.
            taught: of the teacher, by the same batch.
            anchor: returns the distance of the weights, where that is a term.
        """
        parts: dict[str, list[Tensor]] = {}
        sums: dict[str, Tensor] = {}

        def add(term: str, loss: Tensor) -> None:
            parts.setdefault(self.unit_of(term), []).append(_weighted(loss, self.weights[term]))
            sums[term] = loss.detach()

        for unit, scores, teacher in (("answers", read.answers, taught.answers), ("text", read.text, taught.text)):
            names = [name for name in ("ce", "gce", "kl") if name in self.weights and self.unit_of(name) == unit]
            if names == ["ce"]:
                assert scores is not None
                add("ce", scores.cross_entropy(read.targets))
            elif names:
                assert scores is not None
                weights = [self.weights[name] for name in names]
                total, own = self._scored(names, weights, scores, read.targets, teacher)
                parts.setdefault(unit, []).append(total)
                sums |= dict(zip(names, own, strict=True))
        if "hidden" in self.weights:
            assert read.hidden is not None and taught.hidden is not None
            add("hidden", terms.hidden(read.hidden, taught.hidden))
        if "feature" in self.weights:
            assert read.features is not None and taught.features is not None
            add("feature", terms.feature(read.features, taught.features))
        if "anchor" in self.weights:
            assert anchor is not None
            add("anchor", anchor())
        units = {unit: torch.stack(own).sum() if len(own) > 1 else own[0] for unit, own in parts.items()}
        return Losses(units, {name: sums[name] for name in self.weights})

    def _scored(
        self, names: Sequence[str], weights: list[float], scores: Scores, targets: Tensor, teacher: TaughtScores | None
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the terms that are made of logits, and each term's own sum."""

        def made(logits: Tensor, piece: slice) -> Tensor:
            found = []
            for name in names:
                if name == "ce":
                    found.append(terms.ce(logits, targets[piece]))
                elif name == "gce":
                    found.append(terms.gce(logits, targets[piece], self.config.gce_q))
                else:
                    assert teacher is not None
                    found.append(teacher.kl(logits, piece, self.config.temperature))
            return torch.stack(found)

        dtype = torch.float64 if scores.values.dtype == torch.float64 else torch.float32
        return scores.summed(made, torch.tensor(weights, dtype=dtype, device=scores.values.device))


def mean_of(units: Mapping[str, float], counts: Mapping[str, float]) -> float:
    """Return the loss of weighted sums and of how many units they are of; a unit that there is none of adds nothing."""
    return sum(total / counts[unit] for unit, total in units.items() if counts.get(unit))


def _weighted(loss: Tensor, weight: float) -> Tensor:
    return loss if weight == 1 else loss * weight
