"""What ``prunetune list`` prints.

Methods, stages, families and signals are written in files that import torch and transformers, which takes seconds.
Their tables are therefore kept in ``listed.json``, with a hash of those files: while it is true and no plug-in from
outside is there, the table is read; otherwise the files are imported. ``python -m prunetune.scripts.listing`` writes it
anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from prunetune.plugins import GROUP, load_installed, loaded_plugins, plugin_records

Rows = list[list[str]]
_KEPT = Path(__file__).parent / "listed.json"
_PRUNING = Path(__file__).resolve().parents[1] / "pruning"
_SERVABLE = _PRUNING.parent / "serving" / "servable.py"


def listed(what: str) -> str:
    """Return the table of one kind of thing that a configuration can name."""
    kept = _kept_rows() if what in SLOW else {}
    return table(kept.get(what) or ROWS[what]())


def pruner_rows() -> Rows:
    """Return a row per method: paper, signals, whether training goes through, how faithful it is, whether it serves."""
    from prunetune.pruning import registered_methods
    from prunetune.serving.servable import method_servable

    rows = [["name", "paper", "needs", "trainable through", "status", "golden-checked", "for", "servable"]]
    for method in registered_methods().values():
        rows.append(
            [
                method.name,
                method.paper,
                ", ".join(sorted(method.needs)) or "-",
                "yes, merges" if method.merges else "yes",
                "exact" if method.exact else "reconstruction",
                "yes" if method.golden else "no",
                "videos" if method.video else "images",
                ", ".join(method_servable(method)) or "-",
            ]
        )
    return rows


def family_rows() -> Rows:
    """Return a row per model family."""
    from prunetune.pruning import registered_families
    from prunetune.serving.servable import embeds_servable

    rows = [["name", "model types", "projector", "budget per", "servable"]]
    for family in registered_families().values():
        served = "embeds" if embeds_servable(family) else "-"
        rows.append([family.name, ", ".join(family.model_types), ", ".join(family.projectors), family.item, served])
    generic = ["generic", "any other that takes mm_encoder_outputs", "guessed, or model.projector", "image", "-"]
    return [*rows, generic]


def signal_rows() -> Rows:
    """Return a row per signal that a pruner may need."""
    from prunetune.pruning import registered_signals

    rows = [["name", "axes", "source", "about"]]
    return rows + [[signal.name, signal.axes, signal.source, signal.about] for signal in registered_signals().values()]


def stage_rows() -> Rows:
    """Return a row per stage inside the LLM: paper, where and how much by default, what it reads of the layers."""
    from prunetune.pruning import registered_stages

    rows = [["name", "paper", "boundaries", "keep", "reads", "positions", "merges"]]
    for method in registered_stages().values():
        stage = method.stage()
        rows.append(
            [
                method.name,
                method.paper,
                ", ".join(map(str, stage.boundaries)) or "-",
                ", ".join(map(str, stage.keeps)) or "-",
                ", ".join(sorted(stage.wants)) or "-",
                "numbered anew" if stage.dense else "original",
                "yes" if stage.merges else "no",
            ]
        )
    return rows


def recipe_rows() -> Rows:
    """Return a row per data recipe with the first comment line of each."""
    from prunetune.data_recipes.recipe import recipe_file, recipe_names

    rows = [["name", "about"]]
    for name in recipe_names():
        rows.append([name, recipe_file(name).read_text().splitlines()[0].lstrip("# ")])
    return rows


def format_rows() -> Rows:
    """Return a row per recipe format."""
    from prunetune.data_recipes.formats import registered_formats

    rows = [["name", "about"]]
    for name, recipe in registered_formats().items():
        rows.append([name, (recipe.__doc__ or "").splitlines()[0]])
    return rows


def task_rows() -> Rows:
    """Return a row per benchmark."""
    from prunetune.evaluation.tasks import tasks

    rows = [["name", "protocol", "about"]]
    for task in tasks().values():
        # Its own first; the others are named behind an @, as in vqav2@official.
        rows.append([task.name, ", ".join((task.protocol, *task.others)), task.about])
    return rows


def template_rows() -> Rows:
    """Return a row per chat template."""
    from prunetune.data_recipes.chat_templates import registered_templates

    rows = [["name", "file"], ["model", "the model's own"]]
    return rows + [[name, path.name] for name, path in registered_templates().items()]


def plugin_rows() -> Rows:
    """Return a row per plug-in that is installed, or named on the command line."""
    load_installed()
    rows = [["name", "version", "source"]]
    return rows + [[plugin.name, plugin.version or "-", plugin.sha256[:12]] for plugin in loaded_plugins()]


ROWS: dict[str, Callable[[], Rows]] = {
    "families": family_rows,
    "formats": format_rows,
    "plugins": plugin_rows,
    "pruners": pruner_rows,
    "recipes": recipe_rows,
    "signals": signal_rows,
    "stages": stage_rows,
    "tasks": task_rows,
    "templates": template_rows,
}
SLOW = ("families", "pruners", "signals", "stages")
"""Those whose files import torch."""


def table(rows: Rows) -> str:
    """Return rows as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _kept_rows() -> dict[str, Rows]:
    """Return the tables that were written, or nothing where they may not be true."""
    from_outside = [point for point in metadata.entry_points(group=GROUP) if not point.value.startswith("prunetune.")]
    if from_outside or plugin_records() or not _KEPT.is_file():
        return {}
    kept = json.loads(_KEPT.read_text())
    return kept["rows"] if kept["source"] == _source_hash() else {}


def _source_hash() -> str:
    """Return a SHA-256 of the files that the slow tables say something of."""
    digest = hashlib.sha256()
    folders = ("methods", "families", "stages/methods")
    files = [path for folder in folders for path in _PRUNING.glob(f"{folder}/*.py")]
    for path in sorted([*files, _PRUNING / "signals.py", _SERVABLE]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def write_kept_rows() -> None:
    """Write ``listed.json``."""
    rows = {what: ROWS[what]() for what in SLOW}
    _KEPT.write_text(json.dumps({"source": _source_hash(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    write_kept_rows()
