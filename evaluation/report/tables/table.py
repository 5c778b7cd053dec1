"""A table as data: what layouts draw, and what ``table.json`` holds. Nothing is computed from it but its looks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Projector = Literal["training-free", "tuned", "elastic", "other"]
"""Whose projector a row ran with: the base's, one tuned for the row's setting, one for many, or any other."""


class Part(BaseModel):
    """Base of the table's parts: no unknown fields, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Column(Part):
    """A benchmark's native metric.

    Attributes:
        task: the benchmark's name.
        metric: the metric's name.
        unit: "%", "points" or "score".
        about: one line on metric, protocol and prompt.
        items: how many questions.
        headline: whether papers print this one of the benchmark's metrics; it alone enters the relative average.
        higher: whether more is better.
    """

    task: str
    metric: str
    unit: Literal["%", "points", "score"]
    about: str
    items: int
    headline: bool = True
    higher: bool = True

    @property
    def key(self) -> str:
        """Names the column: ``pope/f1``."""
        return f"{self.task}/{self.metric}"


class Value(Part):
    """A number with its 95 % interval.

    Attributes:
        value: None where there is none, and ``note`` says why.
        interval: of this very metric; None where it has none (only a whole set has a score, say).
        note: such as "hidden answers: vqav2_upload.json".
        seeds: over how many trainings it is a mean.
        between: standard deviation over trainings, in the value's unit; None of one training. The interval is over
            images alone.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    note: str = ""
    seeds: int = 1
    between: float | None = None


class Difference(Part):
    """A row's value minus another's, paired.

    Attributes:
        value: in the column's unit.
        interval: 95 %, both rows' answers to one image drawn together.
        p: of the test that nothing differs; None where there is no test.
        adjusted: p after Holm's correction over all differences of the table.
        test: "McNemar, exact" or "paired permutation".
    """

    value: float
    interval: tuple[float, float] | None = None
    p: float | None = None
    adjusted: float | None = None
    test: str = ""


class Row(Part):
    """One arm, or the mean of the same arm over several trainings.

    Attributes:
        id: unique in the table.
        label: method, options that are set, and which projector; tells any two rows apart.
        model: which model.
        method: the pruner's name, "dense" without pruning.
        budget: as it was asked for: "64", "11.1%"; empty without pruning.
        kept: mean number of visual tokens that reached the LLM.
        per_layer: mean number of those that a layer of the LLM processed, where stages drop some between its layers;
            None where every layer processed all.
        projector: whose.
        twin: id of the training-free row that differs in the projector alone; None of such rows.
        values: by column key.
        gains: against the twin, by column key.
        relative: mean over benchmarks of headline metric / the dense row's, in percent, with its interval.
        relative_gain: of ``relative``, against the twin.
        pooled: accuracy over the items of all benchmarks that score items one by one, in percent.
        pooled_gain: of ``pooled``, against the twin.
        by_type: by column key, then by kind of question.
        hard: accuracy in percent over the items that the down-sampling baseline gets wrong, by benchmark: each item
            for itself, whatever metric the benchmark has. Only of benchmarks that score items one by one.
        costs: measured or computed, by name with unit: "TFLOPs", "prefill ms"; empty where unknown.
        facts: what a reader needs to know of how the row came about.
        folders: evaluations it was made of, relative to the table's own folder.
    """

    id: str
    label: str
    model: str
    method: str
    budget: str
    kept: float
    per_layer: float | None = Field(None, exclude_if=lambda per_layer: per_layer is None)
    projector: Projector
    twin: str | None = None
    values: dict[str, Value]
    gains: dict[str, Difference] = {}
    relative: Value | None = None
    relative_gain: Difference | None = None
    pooled: Value | None = None
    pooled_gain: Difference | None = None
    by_type: dict[str, dict[str, Value]] = {}
    hard: dict[str, Value] = {}
    costs: dict[str, Value] = {}
    facts: dict[str, str | int | float | None] = {}
    folders: list[str] = []

    @property
    def tokens(self) -> float:
        """The visual tokens that the LLM pays for: those of its mean layer."""
        return self.kept if self.per_layer is None else self.per_layer


class QuotedRow(Part):
    """A row of a paper's table; nothing is computed from it but the difference to the row it stands beside.

    Attributes:
        label: what was measured there.
        model: on which model.
        method: the pruner, by our name where there is one.
        budget: visual tokens.
        cite: paper and table number.
        values: by column key: under the very metric that the paper prints.
        relative: the paper's own relative average in percent, as it defines it.
        beside: id of our row for the same model, method, budget and projector, if there is one.
        differences: that row's value minus the quoted one, by column key.
    """

    label: str
    model: str
    method: str
    budget: float
    cite: str
    values: dict[str, float]
    relative: float | None = None
    beside: str | None = None
    differences: dict[str, float] = {}


class Table(Part):
    """All of it.

    Attributes:
        title: of the table.
        columns: in the order of the YAML or of the manifests.
        rows: dense first, then by method and budget, tuned below its twin.
        quoted: rows from papers, apart from the measured ones.
        footnotes: what a reader must know of all rows: which differences between arms were allowed, how intervals and
            tests are made, failed arms.
    """

    format: Literal[1] = 1
    title: str
    columns: list[Column]
    rows: list[Row]
    quoted: list[QuotedRow] = []
    footnotes: list[str] = []

    def row(self, name: str) -> Row:
        """Return the row of an id."""
        return next(row for row in self.rows if row.id == name)
