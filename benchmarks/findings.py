"""One projector for many pruners and budgets: the study behind docs/findings.md, on the bundled tiny VLM.

    OMP_NUM_THREADS=1 python benchmarks/findings.py [--only GROUP ...] [--seeds 3] [--list] [--report]

Every finished training and every score is stored at once, one line of benchmarks/findings_study/rows/GROUP.jsonl under
the hash of all it depends on, so a run that was killed goes on where it was; features, choices, the teacher's states
and trained weights lie in --work. The groups run in the order of their importance. At the end, or with --report alone,
docs/findings.md and its pictures are written from the rows that are there; what is missing is named in them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from findings_study.plan import CHOSEN, Group, groups
from findings_study.running import Runner
from findings_study.store import Store
from findings_study.tries import filled
from findings_study.world import World

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).parent / "findings_study" / "rows"


def listed(plan: list[Group], runner: Runner) -> str:
    """Return what there is to do and what it will cost."""
    from findings_study.costs import scoring_seconds, training_seconds

    rows = list(runner.store.rows.values())
    lines = [
        "| group | asks | trainings to run | scores to make | busy minutes of one core, about |",
        "|---|---|---:|---:|---:|",
    ]
    known: set = set()
    for group in plan:
        recipes = [recipe for recipe in runner.untrained(group) if recipe not in known]
        known.update(recipes)
        missing = runner.missing(group)
        cost = sum(training_seconds(recipe, rows) for recipe in recipes) + sum(map(scoring_seconds, missing))
        lines.append(f"| {group.name} | {group.asks} | {len(recipes)} | {len(missing)} | {cost / 60:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="these groups alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="say what is missing and what it will cost, and stop")
    parser.add_argument("--report", action="store_true", help="write the page from the rows that are there, and stop")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "findings", help="folder of all that can be redone"
    )
    options = parser.parse_args()
    plan = groups(options.seeds)
    names = [group.name for group in plan]
    for name in options.only or ():
        if name not in names:
            parser.error(f"no group {name!r}; there are {', '.join(names)}")
    torch.set_num_threads(1)  # small products gain nothing from a second core, and one thread repeats to the bit
    world = World(options.work / "arrays")
    runner = Runner(world, Store(ROWS, options.work / "weights"), say)
    chosen = [group for group in filled(plan, runner) if not options.only or group.name in options.only]
    if options.list:
        print(listed(chosen, runner))
        return
    if not options.report:
        for group in chosen:
            runner.run(filled(plan, runner)[names.index(group.name)] if group.name in CHOSEN else group)
    from findings_study.page import write_page  # it draws, which training does not need

    write_page(ROOT / "docs", runner, options.seeds)


def say(line: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
