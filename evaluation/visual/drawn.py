"""What is drawn of one question, as data: nothing here knows of models, or of how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prunetune.evaluation.visual.maps import TokenMap
from prunetune.evaluation.visual.states import States
from prunetune.evaluation.visual.views import Sheet
from prunetune.pruning.budget import Budget


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        text: what the model said.
        score: from 0 to 1; None where nobody knows the right answer.
    """

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        states: what became of every token.
        said: the arm's answer.
        kept: placeholders that reach the LLM, row ends among them, as evaluations count.
        layers: with stages, how many visual tokens each layer of the LLM processed.
        notes: what the method noted.
    """

    states: States
    said: Said
    kept: int
    layers: Sequence[int] = ()
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A row of the grid.

    Attributes:
        label: the method's.
        about: what else tells it apart: options, projector.
        cells: by the number of the column.
    """

    label: str
    about: str
    cells: Mapping[int, Cell]


@dataclass(frozen=True)
class Drawing:
    """A question about an image or a video, with what is drawn of it.

    Attributes:
        name: of its files, without suffix.
        id: of the question.
        source: the benchmark, or the user's file.
        question: as it was asked.
        answer: the right one; None where nobody knows.
        sheet: the pictures that the tower saw.
        tokens: how many visual tokens there are.
        dense: the answer with all of them.
        columns: the budgets.
        lines: the rows.
        maps: what methods go by.
        video: whether it is a video.
    """

    name: str
    id: str
    source: str
    question: str
    answer: str | None
    sheet: Sheet
    tokens: int
    dense: Said
    columns: Sequence[Budget]
    lines: Sequence[Line]
    maps: Sequence[TokenMap] = ()
    video: bool = False

    @property
    def about(self) -> str:
        """What the picture is called."""
        return "video" if self.video else "image"


def told_budget(budget: Budget) -> str:
    """Return a budget as a heading: ``16 tokens``, ``11.1 %``, ``0.111 of all``."""
    if isinstance(budget, str):
        return budget.replace("%", " %")
    return f"{budget} tokens" if isinstance(budget, int) else f"{budget:g} of all"


def told_counts(cell: Cell, tokens: int) -> str:
    """Return what became of the tokens, in words."""
    counts = cell.states.counts()
    told = f"{cell.states.reaching} of {tokens} kept"
    if counts["merged"]:
        told += f", {counts['merged']} merged"
    if not cell.states.traced:
        told += ", others merged (into which is unknown)"
    if cell.layers:
        told += f"; {cell.layers[-1]} behind the last layer"
    return told


def mark_of(said: Said) -> str:
    """Return a tick or a cross, so that nothing hangs on a colour; nothing where nobody knows."""
    if said.score is None:
        return ""
    return "\u2713 " if said.score >= 0.5 else "\u2717 "
