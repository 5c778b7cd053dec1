"""The bars that were set before the study was run, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterator

from findings_study.intervals import Estimate
from findings_study.plan import AT_16, GRID
from findings_study.results import BySeed, Results, full, gap, said, special, special_long, untrained
from findings_study.world import DENSE, Cell

NEAR = 1.0
"""Points that count as the same."""
LEAST_NEAR, LEAST_NEAR_LONG = 14, 10
"""Cells of 16 that are to be near the specialists of 125 updates, and those of the elastic run's length."""
LEAST_DENSE = -0.5
"""Points that may be lost without pruning."""


def against(results: Results, made: BySeed, long: bool) -> dict[Cell, Estimate]:
    """Return how far a projector is above each cell's specialist, for the cells that are there."""
    found = {}
    for cell in GRID:
        own = special_long(cell) if long else special(cell)
        above = results.above(made, own, cell)
        if above is not None:
            found[cell] = above
    return found


def recovered(results: Results, made: BySeed, cell: Cell) -> float | None:
    """Return the share of what pruning loses that a projector brings back."""
    base, dense = results.accuracy(untrained, cell), results.accuracy(untrained, DENSE)
    own = results.accuracy(made, cell)
    if base is None or dense is None or own is None:
        return None
    return (own.value - base.value) / (dense.value - base.value)


def section(results: Results) -> Iterator[str]:
    """Yield the bars with what was measured."""
    yield "## The bars"
    yield ""
    yield "Set before anything was scored on these test scenes; of the elastic projector in table 1."
    yield ""
    yield from table(results, full())


def table(results: Results, made: BySeed) -> Iterator[str]:
    """Yield the table of bars for one way to train an elastic projector."""
    yield "| bar | measured | met |"
    yield "|---|---|---|"
    yield _within(results, made, "specialist of 125 updates", LEAST_NEAR, long=False)
    yield _within(results, made, "specialist of 1,000 updates", LEAST_NEAR_LONG, long=True)
    mean = gap(results.right(made, GRID), results.each_own())
    met = _met(None if mean is None else mean.value >= 0)
    yield f"| mean of the 16 cells at or above the specialists' (125 updates) | {said(mean, True)} points | {met} |"
    dense = results.above(made, untrained, DENSE)
    met = _met(None if dense is None else dense.value >= LEAST_DENSE)
    yield f"| without pruning at most 0.5 points below no training | {said(dense, True)} points | {met} |"
    for cell in AT_16:
        own = recovered(results, special(cell), cell)
        mine = recovered(results, made, cell)
        if own is None or mine is None:
            yield f"| recovery at 16 tokens at least the specialist's: {cell.pruner} | not there yet | |"
            continue
        measured = f"{100 * mine:.0f} % of the loss, specialist {100 * own:.0f} %"
        yield f"| recovery at 16 tokens at least the specialist's: {cell.pruner} | {measured} | {_met(mine >= own)} |"


def _within(results: Results, made: BySeed, whose: str, least: int, long: bool) -> str:
    found = against(results, made, long)
    bar = f"within {NEAR:.0f} point of the {whose} in at least {least} of 16 cells"
    if not found:
        return f"| {bar} | not there yet | |"
    near = [cell for cell, above in found.items() if above.value >= -NEAR]
    sure = [cell for cell, above in found.items() if above.low >= -NEAR]
    text = f"{len(near)} of {len(found)} cells ({len(sure)} of them with their whole interval)"
    far = {cell: above for cell, above in found.items() if above.value < -NEAR}
    if far:
        told = ", ".join(
            f"{cell} {above.signed()}" for cell, above in sorted(far.items(), key=lambda item: item[1].value)
        )
        text += f"; further below: {told}"
    met = len(near) >= least if len(found) == len(GRID) or len(near) >= least else None
    return f"| {bar} | {text} | {_met(met)} |"


def _met(met: bool | None) -> str:
    if met is None:
        return "not there yet"
    return "**met**" if met else "**missed**"
