"""Where ``evaluation``'s results meet ``train``'s tracking."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from prunetune.configs import EvaluateConfig, TrackingConfig
from prunetune.evaluation.compare import Row, compare, to_csv, to_markdown
from prunetune.evaluation.evaluate import evaluate
from prunetune.evaluation.pictures import plot_rows
from prunetune.evaluation.quoted import Quoted
from prunetune.evaluation.results import read_results
from prunetune.models import Arm
from prunetune.models.ranks import launched_ranks
from prunetune.train.tracking import Tracker


def tracked_evaluate(config: EvaluateConfig, arm: Arm | None = None) -> Path:
    """Run one arm, or one that is loaded already; its accuracy per source and overall goes to the log and to W&B."""
    tracker = Tracker(config.tracking, Path(config.output), config.model_dump()) if launched_ranks().is_zero else None
    folder = evaluate(config, arm)
    if tracker is None:
        return folder
    scores: dict[str, list[float]] = {"overall": []}
    for row in read_results(folder):
        if row["score"] is None:  # the benchmark hides its answers
            continue
        scores["overall"].append(row["score"])
        scores.setdefault(f"{row['task']}/{row['source']}", []).append(row["score"])
    tracker.log({name: round(100 * sum(values) / len(values), 4) for name, values in scores.items() if values})
    tracker.close()
    return folder


def tracked_compare(
    runs: list[Path],
    output: Path,
    tracking: TrackingConfig,
    hard_for: Path | None = None,
    quoted: Sequence[Quoted] = (),
) -> list[Row]:
    """Write table.md, table.csv and plot.png to ``output``, send them to W&B when asked, and return the rows.

    Quoted rows stand in the tables only.
    """
    rows = compare([*runs], hard_for=hard_for)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(to_markdown(rows, quoted))
    (output / "table.csv").write_text(to_csv(rows, quoted))
    plot_rows(rows, output / "plot.png")
    if tracking.wandb != "off":
        tracker = Tracker(tracking, output, {"runs": [str(run) for run in runs]})
        header, *body = csv.reader(to_csv(rows).splitlines())
        tracker.log_table("comparison", header, body)
        tracker.log_image("plot", output / "plot.png")
        tracker.close()
    return rows
