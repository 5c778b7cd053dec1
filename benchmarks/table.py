"""Twenty arms as one table, and as twenty separate evaluations: how long either takes, and whether results agree.

    OMP_NUM_THREADS=2 python benchmarks/table.py [--limit 800] [--pairs 1]

Both run here one after the other, nothing else running: `prunetune table` on the bundled tiny VLM, and
`prunetune evaluate` once for each of the same arms, from pixels, a process each, as one would without it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

METHODS = ("fastervlm", "vispruner", "prismprune", "divprune", "fps")
BUDGETS = (72, 36, 16)
MORE = ("random", "visionzip", "tome", "hiprune")
"""At 16 tokens alone: with dense they make it twenty."""


def table(output: Path, limit: int) -> dict:
    """Return the table's YAML."""
    hiprune = {"pruner": "hiprune", "options": {"object_layer": 2, "alpha": 0.5}, "budgets": [16]}
    more = [hiprune if name == "hiprune" else {"pruner": name, "budgets": [16]} for name in MORE]
    return {
        "models": [{"name": "tiny", "model": {"path": "assets/tiny_vlm", "dtype": "float32"}}],
        "methods": [*METHODS, *more],
        "budgets": list(BUDGETS),
        "tasks": ["tiny_world"],
        "limit": limit,
        "batch_size": 80,
        "max_new_tokens": 6,
        "layouts": ["markdown"],
        "examples": 0,
        "output": str(output),
    }


def run(*arguments: str) -> float:
    """Run a prunetune command and return the seconds that it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "prunetune", *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def separate(whole: Path, apart: Path) -> float:
    """Evaluate every arm of a finished table in a process of its own, from pixels; return the seconds of all."""
    seconds = 0.0
    for file in sorted(whole.rglob("arms/*/*/*/config.yaml")):
        own = apart / file.parent.relative_to(whole)
        values = yaml.safe_load(file.read_text()) | {"output": str(own)}
        values.pop("features")
        written = apart / "config.yaml"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(values))
        seconds += run("evaluate", "--config", str(written))
    return seconds


def main() -> None:
    """Time both, as often as asked, and say how many results are the same files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=800, help="questions an arm")
    parser.add_argument("--pairs", type=int, default=1, help="how often both are timed")
    options = parser.parse_args()
    for pair in range(options.pairs):
        folder = Path(tempfile.mkdtemp(prefix="prunetune-table-"))
        whole, apart = folder / "table", folder / "apart"
        (folder / "table.yaml").write_text(json.dumps(table(whole, options.limit)))
        together = run("table", "--config", str(folder / "table.yaml"))
        alone = separate(whole, apart)
        results = sorted(whole.rglob("results.jsonl"))
        same = sum(one.read_bytes() == (apart / one.relative_to(whole)).read_bytes() for one in results)
        print(
            f"pair {pair + 1}: {len(results)} arms of {options.limit} questions: table {together:.0f} s, separate "
            f"{alone:.0f} s, ratio {together / alone:.3f}; {same} of {len(results)} results.jsonl are identical"
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
