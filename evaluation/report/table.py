"""Rows of a comparison as Markdown for people and as CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from prunetune.evaluation.report.compare import Row
from prunetune.evaluation.report.quoted import Quoted

_INTERVALS = ("overall_low", "overall_high")
_AGAINST_OTHERS = ("relative_to_dense", "tuned_minus_training_free", "gain_low", "gain_high")


def to_markdown(rows: list[Row], quoted: Sequence[Quoted] = ()) -> str:
    """Return the table as Markdown, quoted rows at its end."""
    # All rows have the same sources: arms of other questions are not compared.
    sources = list(rows[0].per_source)
    header = ["arm", "visual tokens", *sources, "overall", "95 % interval", "of dense", "tuned - training-free"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for row in rows:
        lines.append(_measured_cells(row, sources))
    # Quoted rows last, whatever their budget: the order of the others means something, and theirs does not.
    for quote in quoted:
        lines.append(_quoted_cells(quote, sources))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _measured_cells(row: Row, sources: list[str]) -> list[str]:
    cells = [row.label, f"{row.kept:g}"]
    for source in sources:
        cells.append(f"{row.per_source[source]:.1f}")
    cells.append(f"{row.overall:.1f}")
    cells.append(f"[{row.interval[0]:.1f}, {row.interval[1]:.1f}]")
    # Empty and not 0 where there is nothing to compare with: a zero would be read as "no difference".
    cells.append("" if row.relative is None else f"{row.relative:.1f} %")
    if row.gain is None or row.gain_interval is None:
        cells.append("")
    else:
        low, high = row.gain_interval
        cells.append(f"**{row.gain:+.1f}** [{low:+.1f}, {high:+.1f}]")
    return cells


def _quoted_cells(quote: Quoted, sources: list[str]) -> list[str]:
    cells = [quote.label, f"{quote.kept:g}"]
    for name in (*sources, "overall"):
        cells.append(f"{quote.values[name]:g}" if name in quote.values else "")
    # No interval, no share of our dense arm, no gain: nothing is computed from a number that was not measured here.
    return [*cells, "", "", ""]


def to_csv(rows: list[Row], quoted: Sequence[Quoted] = ()) -> str:
    """Return the table as CSV with plain numbers and every fact of a row; quoted rows say where they are from."""
    sources = list(rows[0].per_source)
    facts = list(rows[0].facts)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["arm", "kept_tokens", *sources, "overall", *_INTERVALS, *_AGAINST_OTHERS, *facts, "quoted"])
    for row in rows:
        writer.writerow([row.label, *_numbers(row, sources), *row.facts.values(), ""])
    for quote in quoted:
        # As the paper prints them: digits that it does not give are not ours to add.
        values: list[Any] = []
        for name in (*sources, "overall"):
            values.append(quote.values.get(name, ""))
        empty = [""] * (len(_INTERVALS) + len(_AGAINST_OTHERS) + len(facts))
        writer.writerow([quote.arm, quote.kept, *values, *empty, quote.cite])
    return text.getvalue()


# Four digits, where the Markdown has one: finer than one question of 20,000, which is 0.005 points.
def _numbers(row: Row, sources: list[str]) -> list[str]:
    """Return the numbers of a row with four digits, empty where there is none."""
    values: list[float | None] = [row.kept]
    for source in sources:
        values.append(row.per_source[source])
    values += [row.overall, *row.interval, row.relative, row.gain]
    values += row.gain_interval or (None, None)
    cells = []
    for value in values:
        cells.append("" if value is None else f"{value:.4f}")
    return cells
