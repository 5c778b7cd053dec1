"""Model cards of adapters and exports: what they were tuned for, and how they are loaded so that they work."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prunetune.models.errors import CheckpointError
from prunetune.models.record import read_record, told_pruning, told_stages
from prunetune.models.seal import short
from prunetune.outputs import write_text

CARD = "README.md"
_MARK = "<!-- written by prunetune, sha256 {} -->\n"
_MARKED = re.compile(r"<!-- written by prunetune, sha256 ([0-9a-f]{64}) -->\n\Z")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TAGS = ("prunetune", "visual-token-pruning")

INSIDE = (
    " The stages that drop visual tokens between layers of the LLM are no part of any file here: they run where "
    "`prunetune.load` loads it, on the stock model's own code, and nowhere else."
)


def adapter_card(record: Mapping[str, Any], rows: str | None = None) -> str:
    """Return the README.md of an adapter.

    Args:
        record: its ``prunetune.json``.
        rows: measured rows of a comparison, as a Markdown table.
    """
    header = {"library_name": "peft", "base_model_relation": "adapter"}
    what = "A recalibrated projector, as a PEFT adapter of"
    unpruned = "Stock PEFT loads this folder as well, and then nothing prunes: use that for inspection only."
    return _card(record, header, what, unpruned, rows)


def export_card(record: Mapping[str, Any], rows: str | None = None) -> str:
    """Return the README.md of a merged export; its record and rows as those of an adapter."""
    header = {"library_name": "transformers", "base_model_relation": "finetune"}
    what = "A full checkpoint with a recalibrated projector, made of"
    unpruned = (
        "Stock transformers loads this folder as well, and then nothing prunes: use that for inspection, or with a "
        "program that prunes in the same way."
    )
    return _card(record, header, what, unpruned, rows)


def _card(record: Mapping[str, Any], header: dict[str, str], what: str, unpruned: str, rows: str | None) -> str:
    pruning = record.get("pruning") or {}
    pruner, keep = pruning.get("pruner", "?"), pruning.get("keep", "?")
    base = record.get("base_model") or "?"
    aim, methods = f"{pruner} at {keep} visual tokens", f"the visual-token pruner `{pruner}`"
    inside = told_stages(pruning)
    if inside:
        names = [stage["name"] for stage in pruning["stages"] if isinstance(stage, Mapping) and "name" in stage]
        before = "" if pruner == "identity" else f"{methods} and "
        aim, methods = told_pruning(pruning), f"{before}{', '.join(f'`{name}`' for name in names)} inside the LLM"
    if record.get("elastic"):
        aim, methods = "several pruners and budgets", "several visual-token pruners and budgets"
    parts = [
        _header(record, header),
        f"# {base} tuned for {aim}\n",
        f"{what} `{base}`: only the projector differs, recalibrated with prunetune for {methods}.\n",
        f"> **{_unpruned(record)}** {unpruned}{INSIDE if inside else ''}\n",
        "## How to load it, pruned\n",
        _loading(record),
        "## What it was tuned for\n",
        _facts(record, pruning),
    ]
    if rows:
        parts += ["## Measured\n", rows.rstrip() + "\n"]
    parts += ["## Seals\n", _seals(record)]
    text = "\n".join(parts) + "\n"
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def _unpruned(record: Mapping[str, Any]) -> str:
    """Return what is to be expected of the projector where nothing is pruned."""
    if (record.get("elastic") or {}).get("dense"):
        return "It was trained on unpruned images too; measure what it costs there before you use it without pruning."
    return "Without that pruning it answers worse than the untouched base."


def _header(record: Mapping[str, Any], fields: dict[str, str]) -> str:
    values: dict[str, Any] = {}
    base = str(record.get("base_model") or "")
    # The hub refuses a card whose base is no id of its own; the text names any other.
    if _HUB_ID.fullmatch(base):
        values["base_model"] = base
    else:
        fields = {name: value for name, value in fields.items() if name != "base_model_relation"}
    if record.get("license"):
        values["license"] = record["license"]
    values |= fields
    values |= {"pipeline_tag": "image-text-to-text", "tags": list(TAGS)}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _loading(record: Mapping[str, Any]) -> str:
    told = ""
    names = [plugin["name"] for plugin in record.get("plugins") or []]
    if names:
        told = f"It needs the plug-ins {', '.join(names)}; load them first with `prunetune.plugins.load_plugins`.\n"
    return (
        "```python\nimport prunetune\n\n"
        'arm = prunetune.load("FOLDER_OR_HUB_ID")  # of this card; checks every hash\n'
        'inputs = arm.place(arm.processor(images=image, text=prompt, return_tensors="pt"))\n'
        "print(arm.processor.batch_decode(arm.pruned.generate(**inputs, max_new_tokens=32).tokens))\n```\n" + told
    )


def _facts(record: Mapping[str, Any], pruning: Mapping[str, Any]) -> str:
    """Return a list of what the record says of pruner, data and training; what it does not say is left out."""
    lines = [
        f"- pruner: `{pruning.get('pruner', '?')}`, keep {pruning.get('keep', '?')} per {pruning.get('scope', '?')}"
    ]
    lines += [f"- inside the LLM: {stage}" for stage in told_stages(pruning)]
    lines += _layer_tokens(record)
    lines += _elastic(record, pruning)
    if pruning.get("choose_with"):
        lines.append(f"- tokens are chosen by the {pruning['choose_with']} projector's output")
    if pruning.get("options"):
        lines.append(f"- options: `{json.dumps(pruning['options'])}`")
    if pruning.get("text_tower"):
        lines.append(f"- text tower: `{pruning['text_tower']}`")
    data = record.get("data") or {}
    if data:
        counts = ", ".join(f"{name} {count:,}" for name, count in (data.get("counts") or {}).items())
        lines.append(f"- data: recipe `{data.get('recipe')}`, {data.get('samples', 0):,} samples ({counts})")
    if record.get("step") is not None:
        lines.append(f"- steps: {record['step']:,}")
    if record.get("strength") is not None:
        lines.append(f"- strength {record['strength']:g} of the projector {short(record.get('from'))}; 0 is the base's")
    model = record.get("model") or {}
    if model.get("dtype"):
        lines.append(f"- dtype of the run: {model['dtype']}")
    for source in record.get("soup") or []:
        tuned = source.get("pruning") or {}
        lines.append(
            f"- {source.get('weight', 0):.1%} of it is the projector {short(source.get('projector_hash'))}, tuned for "
            f"`{tuned.get('pruner', '?')}`, keep {tuned.get('keep', '?')}"
        )
    return "\n".join(lines) + "\n"


def _elastic(record: Mapping[str, Any], pruning: Mapping[str, Any]) -> list[str]:
    """Return a line with the settings of a projector for several."""
    elastic = record.get("elastic")
    if not elastic:
        return []
    names = [mixed["pruner"] for mixed in elastic.get("pruners") or []] or [pruning.get("pruner", "?")]
    if names == ["identity"] and pruning.get("stages"):
        names = [stage.get("name", "?") for stage in pruning["stages"]]
    told = [str(budget) for budget in elastic.get("budgets") or []]
    told += [f"{average:g} a layer" for average in elastic.get("averages") or []]
    return [
        f"- elastic: one projector for {', '.join(f'`{name}`' for name in names)} at {', '.join(told)}, and for "
        f"{elastic.get('dense', 0):.0%} of the samples without pruning; it is loaded with the pruner above"
    ]


def _layer_tokens(record: Mapping[str, Any]) -> list[str]:
    """Return a line with what the layers of the LLM saw in training, of a projector that was trained with stages."""
    tokens = record.get("llm_tokens")
    if not tokens:
        return []
    by_layer = ", ".join(f"{count:g}" for count in tokens["layers"])
    return [
        f"- visual tokens of a sample in training, means: {tokens['entering']:.1f} entered the LLM, "
        f"{tokens['average']:.1f} a layer, {tokens['final']:.1f} in the last; by layer {by_layer}"
    ]


def _seals(record: Mapping[str, Any]) -> str:
    lines = []
    for name in ("frozen_hash", "original_projector_hash", "text_tower_hash", "projector_hash"):
        if record.get(name):
            lines.append(f"- `{name}` {short(record[name])}")
    lines.append("\nThe whole hashes are in `prunetune.json`; `prunetune verify FOLDER` checks them.\n")
    return "\n".join(lines)


def license_of(folder: Path) -> str | None:
    """Return the licence that a checkpoint's own card names; None if it has no card, or the card names none."""
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (IndexError, UnicodeDecodeError, yaml.YAMLError):
        return None  # somebody else's card, which decides nothing here
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def check_untouched(folder: Path) -> None:
    """Check that a folder's card may be written: there is none, or it is as prunetune wrote it.

    Raises:
        CheckpointError: if somebody else wrote or edited it.
    """
    path = folder / CARD
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    marked = _MARKED.search(text)
    if marked is None or hashlib.sha256(text[: marked.start()].encode()).hexdigest() != marked[1]:
        raise CheckpointError(f"{path} was written or edited by somebody else; move it away to have a new one written")


def measured_rows(table: Path, record: Mapping[str, Any]) -> str:
    """Return the rows of a comparison as Markdown for a card.

    Args:
        table: a comparison's table.csv, or its folder.
        record: of the adapter that the card is of.

    Raises:
        CheckpointError: if the file is no such table, is of another base, or has no row of this projector.
    """
    path = table / "table.csv" if table.is_dir() else table
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the table.csv of prunetune compare")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path} is no table of prunetune compare: {error}") from None
    lacking = [name for name in ("arm", "kept", "frozen_hash", "adapter_hash") if not rows or name not in rows[0]]
    if lacking:
        raise CheckpointError(f"{path} is no table of this version's prunetune compare: it lacks {', '.join(lacking)}")
    own = False
    for row in rows:
        if not row.get("quoted") and row["frozen_hash"] != str(record.get("frozen_hash"))[:16]:
            raise CheckpointError(
                f"{path}: {row['arm']} ran on frozen weights {row['frozen_hash']}, the projector is for "
                f"{str(record.get('frozen_hash'))[:16]}; give a comparison of the same base"
            )
        own = own or str(record.get("projector_hash"))[:16] in row["adapter_hash"].split()
    if not own:
        raise CheckpointError(
            f"{path} has no row of the projector {str(record.get('projector_hash'))[:16]}; compare an arm with this "
            "adapter"
        )
    titles = _titles(list(rows[0]))
    lines = [["arm", "visual tokens", *titles.values()], ["---", *["---:"] * (1 + len(titles))]]
    lines += [_row(row, list(titles)) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _titles(names: list[str]) -> dict[str, str]:
    """Return which of the table's columns a card shows, and what it calls them."""
    metrics = [name for name in names if "/" in name and " " not in name]
    titles = {name: name.replace("/", " ") for name in metrics}
    # Of a single metric what it gains, of several what their average does.
    gains = ["relative gain"] if len(metrics) > 1 else [f"{name} gain" for name in metrics]
    for name, title in (("relative", "of dense"), *((gain, "tuned - training-free") for gain in gains)):
        if name in names:
            titles[name] = title
    return titles


def _row(row: Mapping[str, str], names: list[str]) -> list[str]:
    quoted = row.get("quoted")
    cells = [f"{row['arm']} (quoted: {quoted})" if quoted else row["arm"]]
    # What entered the LLM says little where its layers process fewer.
    inside = f", {float(row['per_layer']):g} a layer" if row.get("per_layer") else ""
    cells.append(f"{float(row['kept']):g}{inside}" if row["kept"] else "")
    for name in names:
        cells.append(f"{float(row[name]):.1f}" if row[name] else "")
    return cells


def write_card(folder: Path, table: Path | None = None) -> Path:
    """Write the card of an adapter or an export anew.

    Args:
        folder: the artefact's.
        table: a comparison's table.csv, whose rows are shown; None shows none.

    Raises:
        CheckpointError: if the folder holds no artefact, its card was edited, or the table is of another projector.
    """
    record = read_record(folder)
    check_untouched(folder)
    rows = None if table is None else measured_rows(table, record)
    make = export_card if "export" in record else adapter_card
    path = folder / CARD
    write_text(path, make(record, rows))
    return path
