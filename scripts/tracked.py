"""Where ``evaluation``'s results meet ``train``'s tracking."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetune.configs import EvaluateConfig, TrackingConfig
from prunetune.evaluation.metrics.averages import average
from prunetune.evaluation.records import Manifest, read_manifest, read_results
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.comparison import LAYOUTS, write_comparison
from prunetune.evaluation.report.plot import plot_table
from prunetune.evaluation.report.quoted import Quote
from prunetune.evaluation.report.tables.layouts.csv import to_csv
from prunetune.evaluation.report.tables.layouts.files import write_layouts
from prunetune.evaluation.report.tables.table import Table
from prunetune.outputs import COMPARISON, OutputFolder
from prunetune.train.tracking import Tracker

if TYPE_CHECKING:
    from prunetune.models import Arm


def tracked_evaluate(config: EvaluateConfig, arm: Arm | None = None, bar: bool = True) -> Path:
    """Run one arm, or one that is loaded already; its accuracy per source and overall goes to the log and to W&B."""
    # Here and not above: comparing arms, below, needs no torch.
    from prunetune.evaluation.run.evaluate import evaluate, output_folder
    from prunetune.models.ranks import join_ranks

    ranks = join_ranks()
    with ranks.open_output(output_folder(config)):
        tracker = Tracker(config.tracking, Path(config.output), config.model_dump()) if ranks.is_zero else None
        try:
            folder = evaluate(config, arm, bar=bar)
            if tracker is not None:
                _track(tracker, folder)
        except BaseException:
            if tracker is not None:
                tracker.close(failed=True)
            raise
    return folder


def _track(tracker: Tracker, folder: Path) -> None:
    rows = read_results(folder)
    tracker.note({"hashes": _hashes(read_manifest(folder))})
    mean = average([row.score for row in rows], [f"{row.task}/{row.source}" for row in rows])
    if mean.overall is None:  # every benchmark hides its answers
        tracker.log({})
    else:
        accuracy = {"overall": mean.overall, **mean.by_source}
        tracker.log({name: round(value, 4) for name, value in accuracy.items()})
    tracker.close()


def _hashes(manifest: Manifest) -> dict[str, Any]:
    """Return what an arm's numbers hang on."""
    return {
        "frozen": manifest.frozen_hash,
        "projector": manifest.projector.hash,
        "adapter": manifest.projector.stored_hash,
        "settings": manifest.settings_hash,
        "template": manifest.template_hash,
        "questions": {name: task.hash for name, task in manifest.tasks.items()},
        "results": manifest.results_hash,
    }


def tracked_compare(
    runs: list[Path],
    output: Path,
    tracking: TrackingConfig,
    hard_for: Path | None = None,
    quoted: Sequence[Quote] = (),
    overwrite: bool = False,
    allow: Sequence[str] = (),
    rescore: bool = False,
) -> Table:
    """Write the table, its plot and comparison.json to ``output``, send them to W&B when asked, and return the table.

    Quoted rows stand in the tables only.

    Raises:
        OutputError: if the folder holds something else, or can't be written.
        TaskError: for arms that can't be compared.
    """
    table = compare([*runs], hard_for=hard_for, quoted=quoted, allow=allow, rescore=rescore, output=output)
    with OutputFolder(output, COMPARISON, overwrite, reads=(*runs, hard_for)) as folder:
        with folder.staged() as new:
            files = write_layouts(table, new, LAYOUTS)
            write_comparison(new, files, runs, hard_for, allow, rescore, final=output)
            plot_table(table, new / "plot.png")
        _send(table, runs, output, tracking)
    return table


def _send(table: Table, runs: list[Path], output: Path, tracking: TrackingConfig) -> None:
    """Send a comparison to W&B, when asked."""
    if tracking.wandb != "off":
        tracker = Tracker(tracking, output, {"runs": [str(run) for run in runs]})
        send_table(tracker, "comparison", table, output / "plot.png")
        tracker.close()


def send_table(tracker: Tracker, name: str, table: Table, plot: Path) -> None:
    """Send a table's measured rows and its plot to W&B."""
    header, *body = csv.reader(to_csv(table.model_copy(update={"quoted": []})).splitlines())
    tracker.log_table(name, header, body)
    tracker.log_image("plot", plot)
