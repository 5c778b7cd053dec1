"""Dense, training-free and tuned arms side by side, with paired intervals; refuses arms that can't be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.quoted import Quote
from prunetune.evaluation.report.tables.assemble import assemble
from prunetune.evaluation.report.tables.table import Table


def compare(
    folders: Sequence[str | Path],
    seed: int = 0,
    hard_for: str | Path | None = None,
    quoted: Sequence[Quote] = (),
    allow: Sequence[str] = (),
    rescore: bool = False,
    output: Path | None = None,
) -> Table:
    """Return the table of arms of one model: dense first, then by budget and method, tuned below its twin.

    Args:
        folders: finished arms.
        seed: seed of the bootstrap, which resamples images, since questions about one image hang together.
        hard_for: an arm of the ``downsample`` baseline; what it gets wrong is the hard part, which has columns of its
            own.
        quoted: rows from papers.
        allow: fields of the manifests that may differ.
        rescore: whether today's scorers count where they say something else than when an arm was evaluated.
        output: folder that the table will lie in.

    Raises:
        TaskError: if the arms can't be compared, or ``hard_for`` answers everything.
    """
    table = assemble(folders, baseline=hard_for, quoted=quoted, allow=allow, rescore=rescore, output=output, seed=seed)
    if hard_for is not None and not any(row.hard for row in table.rows):
        raise TaskError(f"{hard_for} answers everything, so no item is hard; use a smaller budget")
    return table
