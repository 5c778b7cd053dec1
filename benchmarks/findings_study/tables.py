"""The tables of docs/findings.md and the sentences about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from findings_study.intervals import Estimate
from findings_study.pictures import transfer_rows
from findings_study.plan import (
    AT_16,
    DIV_16,
    FPS_16,
    GRID,
    UNSEEN,
    soup,
    tuned_on_dense,
    tuned_on_random,
)
from findings_study.results import (
    NONE,
    BySeed,
    Results,
    brief,
    full,
    gap,
    mean_of,
    said,
    short,
    special,
    special_long,
    trained,
    untrained,
)
from findings_study.world import DENSE, Cell

PICTURES = {
    "elastic": "One elastic projector against sixteen specialists",
    "transfer": "What was tuned for what, and what it scores where",
    "objectives": "What each objective does for pruned and for whole pictures",
}


def row(*cells: str) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def head(*names: str) -> str:
    """Return the head of a table whose first column is text."""
    return row(*names) + "\n|---|" + "---:|" * (len(names) - 1)


def seeds_of(estimate: Estimate | None) -> str:
    """Return how many trainings a number is the mean of."""
    return NONE if estimate is None else str(estimate.seeds)


def grid(results: Results) -> Iterator[str]:
    """Yield table 1: every cell of the grid."""
    yield "## Table 1: one elastic projector against sixteen specialists"
    yield ""
    yield f"![{PICTURES['elastic']}](images/findings_elastic.png)"
    yield ""
    yield head(
        "cell", "no training", "specialist, 125", "without pruning", "elastic", "elastic - specialist",
        "specialist, 1,000", "n", "elastic - that",
    )  # fmt: skip
    for cell in GRID:
        own, long = results.accuracy(special(cell), cell), results.accuracy(special_long(cell), cell)
        yield row(
            str(cell),
            said(results.accuracy(untrained, cell)),
            said(own),
            short(results.accuracy(special(cell), DENSE)),
            said(results.accuracy(full(), cell)),
            said(results.above(full(), special(cell), cell), True),
            said(long),
            seeds_of(long),
            said(results.above(full(), special_long(cell), cell), True),
        )
    mine, each, longer = results.right(full(), GRID), results.each_own(), results.each_own(special_long)
    yield row(
        "**mean of 16**",
        said(results.accuracy(untrained, GRID)),
        said(mean_of(each)),
        short(_mean_dense(results)),
        said(results.accuracy(full(), GRID)),
        said(gap(mine, each), True),
        said(mean_of(longer)),
        seeds_of(mean_of(longer)),
        said(gap(mine, longer), True),
    )
    yield row(
        "**dense**", said(results.accuracy(untrained, DENSE)), "", "", said(results.accuracy(full(), DENSE)),
        "", "", "", "",
    )  # fmt: skip
    yield ""
    yield (
        "The numbers behind a column's name are updates; *without pruning* is what the specialist of 125 updates "
        "scores "
        "on whole pictures."
    )
    yield from _about_grid(results)


def _mean_dense(results: Results) -> Estimate | None:
    """Return what the specialists score without pruning, in the mean."""
    return mean_of(results.each_own(without_pruning=True))


def _about_grid(results: Results) -> Iterator[str]:
    base, mine = results.accuracy(untrained, GRID), results.accuracy(full(), GRID)
    own = mean_of(results.each_own())
    if base and mine and own:
        yield ""
        yield (
            f"* Row *mean of 16*: {base.value:.1f} without training, {own.value:.1f} with sixteen specialists of "
            "125 updates "
            f"(2,000 updates together), {mine.value:.1f} with one elastic projector of 1,000 updates."
        )
    dense, lost = results.above(full(), untrained, DENSE), _mean_dense(results)
    if dense and lost:
        yield (
            "* Row *dense* and column *without pruning*: used without pruning, specialists score "
            f"{lost.value:.1f} in the "
            f"mean; the elastic projector is {dense.signed()} points from no training."
        )
    better, worse = [], []
    for cell in GRID:
        above = results.above(full(), special(cell), cell)
        if above and above.low > 0:
            better.append(str(cell))
        if above and above.high < 0:
            worse.append(str(cell))
    if better or worse:
        yield (
            "* Column *elastic - specialist*: the whole interval is above 0 for "
            f"{', '.join(better) or 'no cell'}, and below 0 "
            f"for {', '.join(worse) or 'no cell'}. A likely reason for the first, which nothing here tests alone: "
            "where "
            "a pruner drops the object that is asked for, cross entropy on the right answer teaches guessing, and "
            "generalised cross entropy gives up on such questions."
        )


def unseen(results: Results) -> Iterator[str]:
    """Yield table 2: pruners that no update saw."""
    yield "## Table 2: pruners that the elastic projector never saw"
    yield ""
    yield head("cell", "no training", "elastic", "gain")
    for cell in UNSEEN:
        yield row(
            str(cell),
            said(results.accuracy(untrained, cell)),
            said(results.accuracy(full(), cell)),
            said(results.above(full(), untrained, cell), True),
        )
    for pruner in ("fps", "random"):
        cells = [cell for cell in UNSEEN if cell.pruner == pruner]
        gained = results.above(full(), untrained, cells)
        if gained:
            yield ""
            yield (
                f"Rows *{pruner}*: {gained.signed()} points in the mean of the four budgets, without one update on it."
            )


def transfer(results: Results) -> Iterator[str]:
    """Yield table 3: every projector everywhere, with the controls."""
    yield "## Table 3: transfer and controls"
    yield ""
    yield f"![{PICTURES['transfer']}](images/findings_transfer.png)"
    yield ""
    yield head("tuned for", "mean of 16 cells", "gain", "mean of the four cells at 16", "dense", "n")
    for name, made in transfer_rows():
        mean = results.accuracy(made, GRID)
        yield row(
            name,
            said(mean),
            "" if made is untrained else said(results.above(made, untrained, GRID), True),
            said(results.accuracy(made, AT_16)),
            said(results.accuracy(made, DENSE)),
            seeds_of(mean),
        )
    yield row("each cell's own, 125 updates", said(mean_of(results.each_own())),
              said(gap(results.each_own(), results.right(untrained, GRID)), True),
              said(mean_of(results.each_own(special, AT_16))), "", "")  # fmt: skip
    yield ""
    yield from _about_controls(results)


def _about_controls(results: Results) -> Iterator[str]:
    dense = results.above(trained(tuned_on_dense), untrained, GRID)
    if dense:
        yield (
            "* Row *dense pictures*: a projector that saw the same questions about whole pictures scores "
            f"{dense.signed()} points "
            "against no training in the mean of the 16 cells. Having seen the questions does not explain the gain."
        )
    drawn = results.above(trained(tuned_on_random), untrained, GRID)
    own = gap(results.each_own(), results.right(untrained, GRID))
    if drawn and own:
        yield (
            f"* Rows *fresh random positions* and *each cell's own*: {drawn.signed()} against {own.signed()} "
            "points, so "
            f"{100 * drawn.value / own.value:.0f} % of a specialist's gain is about having few tokens, whichever "
            "they are."
        )
    for cell in AT_16:
        lost = results.above(special(cell), untrained, DENSE)
        others = {}
        for other in AT_16:
            above = results.above(special(other), special(cell), cell)
            if other != cell and above and above.low > 0:
                others[str(other)] = above.signed()
        if others:
            told = ", ".join(f"{name} by {value}" for name, value in others.items())
            yield (
                f"* Column {cell} of the picture: its own specialist is not the best there, ahead are those of {told}."
            )
        if lost:
            yield f"* Row *{cell}*: {lost.signed()} points where all visual tokens are kept."
    mixed = results.above(soup, full(), GRID)
    if mixed:
        yield (
            f"* Row *mean of these four weights*, which took no training of its own: {mixed.signed()} points "
            "against the elastic "
            "projector in the mean of the 16 cells."
        )


def choices(results: Results) -> Iterator[str]:
    """Yield table 4: who chooses."""
    yield "## Table 4: who chooses, the tuned projector or the original one"
    yield ""
    yield (
        "DivPrune and FPS read the projector's output, so a tuned projector keeps other tokens than the original "
        "one. "
        "`pruning.choose_with` says which of the two chooses. *Trained* is the choice in training."
    )
    yield ""
    yield head("cell", "trained", "projection of", "choice of", "accuracy", "gain")
    for cell in (DIV_16, FPS_16):
        yield row(str(cell), NONE, "original", "original", said(results.accuracy(untrained, cell)), "")
        for way in ("tuned", "original"):
            for projection, chooser in _crossed(cell, way):
                names = ["original" if made is untrained else "tuned" for made in (projection, chooser)]
                found = _scored(results, projection, chooser, cell)
                yield row(str(cell), way, *names, said(mean_of(found)),
                          said(gap(found, results.right(untrained, cell)), True))  # fmt: skip
    yield ""
    for cell in (DIV_16, FPS_16):
        tuned = _scored(results, *_crossed(cell, "tuned")[0], cell)
        frozen = _scored(results, *_crossed(cell, "original")[1], cell)
        above = gap(frozen, tuned)
        if above:
            yield (
                f"* Rows *{cell}*: trained and evaluated with the original choice, a specialist is "
                f"{above.signed()} points from one "
                "that is trained and evaluated with its own. What must not be is to train with one and evaluate "
                "with the other."
            )
    for cell in (Cell("divprune", 8), DIV_16):
        kept = results.right(brief(choose_with="original"), cell, chooser=untrained)
        above = gap(kept, results.right(brief(), cell))
        if above:
            yield (
                "* An elastic projector of 125 updates whose pruners choose by the original one throughout is "
                f"{above.signed()} "
                f"points from the one that chooses by itself, at {cell}."
            )


def _crossed(cell: Cell, way: str) -> list[tuple[BySeed, BySeed]]:
    """Return projection and choice of the rows for one way to train."""
    made = special(cell, choose_with=way)
    return [(made, made), (made, untrained), (untrained, made)]


def _scored(results: Results, projection: BySeed, chooser: BySeed, cell: Cell) -> Any:
    return results.right(projection, cell, chooser=None if projection is chooser else chooser)
