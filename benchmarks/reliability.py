"""What happens to prunetune when things go wrong: bad inputs, fuzzed files, killed runs, full disks.

    python benchmarks/reliability.py --bad-inputs --fuzz 2000 --kills 4 --disk /mnt/small --output reliability.md

Writes a Markdown table. Needs no GPU and no network: everything is the bundled tiny VLM.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def bad_inputs(world: object, folder: Path, show: bool) -> list[str]:
    """Try every bad input and return the lines of the report."""
    from bad_inputs import World, cases, try_case

    assert isinstance(world, World)
    found: Counter[str] = Counter()
    wrong = []
    for number, case in enumerate(cases(world)):
        outcome = try_case(case, folder / f"bad{number}")
        found[outcome.verdict] += 1
        if show:
            print(f"{outcome.verdict:<15} {case.name}: {outcome.text}")
        if not outcome.readable:
            wrong.append(f"{outcome.verdict}: {case.name}\n{outcome.text}")
    print("\n".join(wrong))
    rows = [f"| bad inputs | {sum(found.values())} | {_told(found)} |"]
    return rows


def _told(found: Counter[str]) -> str:
    return ", ".join(f"{number} {verdict}" for verdict, number in sorted(found.items()))


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad-inputs", action="store_true", help="every bad input")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="N mutated files")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="N random SIGKILLs of a small run")
    parser.add_argument("--disk", type=Path, help="folder on a small disk of its own, which runs fill up")
    parser.add_argument("--points", type=int, default=10, metavar="N", help="of --disk: N different amounts of room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print what every bad input is answered")
    parser.add_argument("--output", type=Path, help="Markdown file; None prints alone")
    options = parser.parse_args()
    began = time.monotonic()
    lines = ["| what | tried | outcome |", "| --- | ---: | --- |"]
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        if options.bad_inputs or options.fuzz:
            from bad_inputs import World

            world = World(folder / "world")
            if options.bad_inputs:
                lines += bad_inputs(world, folder, options.show)
            if options.fuzz:
                from fuzzing import fuzz

                lines += fuzz(world, folder, options.fuzz, options.seed)
        if options.kills:
            from kills import kills

            lines += kills(folder, options.kills, options.seed)
        if options.disk is not None:
            from kills import full_disks

            lines += full_disks(options.disk, options.points)
    lines.append(f"\n{time.monotonic() - began:.0f} s on {os.cpu_count()} CPU cores")
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(1 if any("TRACEBACK" in line or "accepted" in line or "DIFFERS" in line for line in lines) else 0)


if __name__ == "__main__":
    main()
