"""docs/findings.md from the stored rows: tables, sentences that name their rows, and what is missing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from findings_study import ablations, bars, carrying, pictures, tables, tries
from findings_study.plan import groups
from findings_study.results import Results
from findings_study.running import Runner

WIDTH = 120
BEGIN = """# Findings: one projector for every budget

Written by `python benchmarks/findings.py`, a resumable command that stores every training and every score as one
line below `benchmarks/findings_study/rows/` and makes this page of them. All of it is on the bundled tiny VLM (144
visual tokens, a projector of 33,000 weights, float32), so it says what is worth testing on a real model, and not
what happens there: the [last section](#what-carries-over-to-real-models) has the lines that would test it.

## What was run

* Training: scenes of the split `recalibration`, 16 pictures with 8 questions each an update, AdamW, 3 % warm-up,
  cosine, clipped at 1; the projector alone trains. *Specialist*: cross entropy, 2,000 scenes, 125 updates, learning
  rate 5e-3, one pruner at one budget: a *cell*. *Elastic*: 6,000 scenes, 1,000 updates; of every update each
  quarter draws a cell of its own: all tokens with probability 1/4, else 8, 16, 36 or 72 tokens and FasterVLM,
  VisPruner, PrismPrune or DivPrune with weights 1, 1.5, 1 and 3. Its loss is generalised cross entropy (q 0.7) plus
  the relative error of the last hidden states at text positions against the same model with all tokens and its
  original projector.
* Evaluation: 300 scenes of the split `test`, 2,400 questions, which no recipe was chosen on: settings come from a
  pilot on the split `validation`. A question is right if every token of the greedy answer is.
* Seeds: {seeds} of everything that trains, unless a row says otherwise (`n`). A seed decides the scenes, their
  order and all draws.
* Intervals: 95 %, from {draws:,} draws of seeds and pictures together; differences are taken picture by picture.
  Three seeds are few: where trainings differ more than pictures do, an interval is somewhat narrow. Read
  differences whose interval holds 0 as ties.
* Pruners choose by the projector that is being tuned where they read its output (DivPrune, FPS), in training and in
  evaluation, unless a row says otherwise.
* The training and scoring of the study are checked against `PrunedModel` in tests/test_findings.py: the same loss,
  the same gradient, and the same right answers as greedy generation.
"""

AGAIN = """## To do it again

```
# needs: days of a CPU core
OMP_NUM_THREADS=1 python benchmarks/findings.py --list      # what is missing, and what it will cost
OMP_NUM_THREADS=1 python benchmarks/findings.py             # goes on where it was, then writes this page
python benchmarks/findings.py --report                      # this page from the rows that are there
```

Rows are found by a hash of all that they depend on: settings, seed, scenes, the model's weights and the study's
version. Delete `benchmarks/findings_study/rows` and `build/findings` to begin anew.
"""


def write_page(docs: Path, runner: Runner, seeds: int) -> None:
    """Write the page and its pictures."""
    results = Results(runner, seeds)
    drawn = pictures.draw(results, docs / "images")
    (docs / "findings.md").write_text(page(results, drawn), encoding="utf-8")


def page(results: Results, drawn: list[str]) -> str:
    """Return the page."""
    from findings_study.intervals import DRAWS

    parts = [BEGIN.format(seeds=results.seeds, draws=DRAWS), missing(results)]
    sections: list[Callable[[Results], Iterator[str]]] = [
        bars.section, tables.grid, tables.unseen, tables.transfer, tables.choices, ablations.objectives,
        ablations.data, ablations.sampling, ablations.weights, tries.section, ablations.costs, carrying.section,
    ]  # fmt: skip
    for section in sections:
        lines = list(section(results))
        if lines:
            parts.append("\n".join(wrapped(lines)) + "\n")
    text = "\n".join([*(part for part in parts if part), AGAIN])
    for name in ("elastic", "transfer", "objectives"):
        if f"findings_{name}.png" not in drawn:  # a link to a picture that is not there leads nowhere
            text = text.replace(f"![{tables.PICTURES[name]}](images/findings_{name}.png)\n\n", "")
    return text


def wrapped(lines: list[str]) -> Iterator[str]:
    """Yield sentences in lines of the page's width; tables, code, headings and pictures stay as they are."""
    code = False
    for line in lines:
        code ^= line.strip().startswith("```")
        if code or line.startswith(("|", "#", "!", " ")) or "\n" in line:
            yield line
            continue
        indent = ""
        if line.startswith("* "):
            indent = "  "
        elif line.partition(". ")[0].isdigit():
            indent = "   "
        yield textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def missing(results: Results) -> str:
    """Return what is not there yet, by group."""
    lines = []
    for group in tries.filled(groups(results.seeds), results.runner):
        left = len(results.runner.missing(group))
        if left:
            lines.append(f"| {group.name} | {left} of {len(group.scores)} |")
    if not lines:
        return ""
    head = (
        "Rows that are not there yet; a table then shows the seeds that are, or a dash:\n\n| group | scores missing |"
    )
    return "\n".join([head, "|---|---:|", *lines, ""])
