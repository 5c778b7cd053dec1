"""``prunetune verify``: every link of the chain of seals, what holds, what does not, and what can't be checked here.

Reading files is enough for nearly all of it: torch is imported only to hash a text tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prunetune.assets import shipped
from prunetune.errors import PrunetuneError
from prunetune.evaluation.analysis.record import RECORD as ANALYSIS
from prunetune.evaluation.analysis.record import read_analysis
from prunetune.evaluation.files import file_hash
from prunetune.evaluation.records import MANIFEST, Manifest, Result, read_manifest, read_results
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.comparison import COMPARISON, TABLE, read_comparison, read_recipe, read_table
from prunetune.evaluation.report.rows import check_results_hash, check_rows, check_scores
from prunetune.evaluation.report.tables.layouts.files import LAYOUTS
from prunetune.evaluation.visual.record import RECORD as DRAWN
from prunetune.evaluation.visual.record import read_drawn
from prunetune.models.code import code_record, told
from prunetune.models.dial import DIAL, read_dial
from prunetune.models.errors import CheckpointError
from prunetune.models.profile import read_profile
from prunetune.models.record import (
    ENTRY,
    RECORD,
    base_of,
    check_base,
    check_projector,
    config_entry,
    parsed_record,
    read_record,
    required,
)
from prunetune.models.seal import CHAIN, short
from prunetune.models.stored import TENSORS, BaseHashes, base_hashes, not_finite, settings_hash, stored_projector_hash
from prunetune.plugins import load_installed, plugin_records
from prunetune.pruning.errors import PruningError


class _CantTell(Exception):
    """A link that can't be checked on this machine; the message says why."""


@dataclass(frozen=True)
class Check:
    """One link of the chain.

    Attributes:
        link: its name, of records and manifests where it has one there.
        holds: whether it holds; None where that can't be told here.
        told: what was found.
    """

    link: str
    holds: bool | None
    told: str


def verify(path: Path, base: str | None = None) -> list[Check]:
    """Return every check of what prunetune wrote: an adapter, an arm, a comparison, an analysis, a drawing, a profile.

    Args:
        path: its folder; of a profile the file.
        base: folder or cached hub id of the base; None is the one that the record or the manifest names.

    Raises:
        CheckpointError: if it is none of them.
    """
    if path.is_file():
        return _profile(path, base)
    if (path / MANIFEST).is_file():
        return _arm(path, base)
    if (path / COMPARISON).is_file():
        return _comparison(path)
    if (path / DIAL).is_file():
        return _dial(path, base)
    if (path / ANALYSIS).is_file():
        return _analysis(path, base)
    if (path / DRAWN).is_file():
        return _drawn(path, base)
    if not (path / RECORD).is_file() and (path / "adapter" / RECORD).is_file():
        path = path / "adapter"  # the output of a recalibration
    if (path / RECORD).is_file():
        return _artefact(path, base)
    raise CheckpointError(
        f"{path} is no adapter, recalibration, arm, comparison or export: it holds neither {RECORD} nor {MANIFEST} nor "
        f"{COMPARISON}; name the folder that prunetune wrote"
    )


def to_text(checks: list[Check]) -> str:
    """Return the checks as a table, the broken ones said once more in its last line."""
    words = {True: "holds", False: "BROKEN", None: "not checked"}
    width = max(len(check.link) for check in checks)
    lines = [f"{check.link:<{width}}  {words[check.holds]:<11}  {check.told}" for check in checks]
    broken = [check.link for check in checks if check.holds is False]
    lines.append(f"\nbroken: {', '.join(broken)}" if broken else "\nnothing is broken")
    return "\n".join(lines)


def _check(link: str, find: Callable[[], str]) -> Check:
    """Return a check of what ``find`` says; it raises where the link does not hold."""
    try:
        return Check(link, True, find())
    except _CantTell as reason:
        return Check(link, None, str(reason))
    except (PrunetuneError, OSError) as error:
        return Check(link, False, str(error))
    # What was edited may hold anything; a record or a manifest whose seal holds is as it was written.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return Check(link, False, f"it can't be read: {type(error).__name__} {error}")


# ---- adapters and exports --------------------------------------------------------------------------------------


def _artefact(folder: Path, base: str | None) -> list[Check]:
    checks = [_check("seal", lambda: _record_seal(folder))]
    try:
        record = parsed_record(folder)
    except CheckpointError:
        return checks  # broken as a whole; the check above says how
    if "export" in record:
        checks += [_check("export", lambda: _export(folder, record)), _check(ENTRY, lambda: _entry(folder, record))]
    else:
        checks.append(_check("projector_hash", lambda: _projector(folder, record)))
    where = base_of(folder, record, base) if record.get("base_model") else base
    revision = record.get("base_revision")
    checks += _base(record, where, revision, folder)
    checks.append(_check("text_tower_hash", lambda: _text_tower(record, where, revision)))
    checks += _code(record.get("prunetune"), record.get("plugins") or [])
    checks.append(Check("data", None, _data(record)))
    return checks


def _data(record: Mapping[str, Any]) -> str:
    if record.get("soup"):
        sources = ", ".join(short(source["projector_hash"]) for source in record["soup"])
        return f"the sources' records name it: projectors {sources}"
    return f"{short((record.get('data') or {}).get('hash'))} is recorded; data is not read"


def _dial(folder: Path, base: str | None) -> list[Check]:
    """Return the checks of a dial, and of the adapter of the strength that was chosen by it."""
    checks = [_check(DIAL, lambda: f"as it was written: {len(read_dial(folder)['points'])} strengths")]
    if (folder / "adapter" / RECORD).is_file():
        checks.append(_check("strength", lambda: _chosen(folder)))
        checks += _artefact(folder / "adapter", base)
    return checks


def _chosen(folder: Path) -> str:
    dial, record = read_dial(folder), read_record(folder / "adapter")
    for name, expected, found in (
        ("strength", dial["chosen"], record.get("strength")),
        ("from", dial["projector_hash"], record.get("from")),
    ):
        if expected != found:
            raise CheckpointError(f"the adapter's {name} is {short(found)}, the dial's {short(expected)}")
    return f"the adapter is strength {record['strength']:g} of the projector {short(record['from'])}, as it was chosen"


def _record_seal(folder: Path) -> str:
    record = read_record(folder)
    if record["format"] == 1:
        raise _CantTell("format 1 has none: an earlier version wrote it")
    return f"{RECORD} is as it was written, {short(record['seal'])}"


def _projector(folder: Path, record: Mapping[str, Any]) -> str:
    found = stored_projector_hash(folder / TENSORS)
    check_projector(record, folder, found)
    broken = not_finite(folder / TENSORS)
    if broken:
        raise CheckpointError(f"{folder / TENSORS}: {', '.join(broken)} holds NaN or infinity")
    return f"{TENSORS} is {short(found)} and finite"


def _export(folder: Path, record: Mapping[str, Any]) -> str:
    written = record["export"]
    found = base_hashes(folder, tuple(written["projectors"])).record()
    for name in ("frozen_hash", "original_projector_hash"):
        if found[name] != written.get(name):
            what = "the projector" if name.startswith("original") else "a weight that is not the projector's"
            raise CheckpointError(
                f"{what} was changed after it was written: {short(found[name])}, expected {short(written.get(name))}"
            )
    broken = [name for file in sorted(folder.glob("*.safetensors")) for name in not_finite(file)]
    if broken:
        raise CheckpointError(f"{broken[0]} holds NaN or infinity")
    return "the weights are those that were written, and finite"


def _entry(folder: Path, record: Mapping[str, Any]) -> str:
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"config.json is broken: {error}") from None
    if not isinstance(config, dict) or config.get(ENTRY) != config_entry(record):
        raise CheckpointError(f"config.json has another entry {ENTRY!r} than the record, or none")
    return "config.json says what the projector is for"


def _profile(file: Path, base: str | None) -> list[Check]:
    """Return the checks of a profile against the model that it was fitted to."""
    checks = [_check("seal", lambda: f"{file.name} is as it was written: {read_profile(file).fitted}")]
    try:
        profile = read_profile(file)
    except PruningError:
        return checks  # broken as a whole; the check above says how
    model = profile.model.model_dump()
    where, revision = base or profile.model.path, profile.model.revision
    checks += _base(model, where, revision, None)
    values = {"text_tower_hash": profile.model.text_tower_hash, "pruning": profile.pruning}
    checks.append(_check("text_tower_hash", lambda: _text_tower(values, where, revision)))
    checks += _code(profile.prunetune, profile.plugins)
    checks.append(Check("data", None, f"{short(profile.data.hash)} is recorded; data is not read"))
    return checks


# ---- the base, the text tower and the code ---------------------------------------------------------------------


def _base(values: Mapping[str, Any], where: str | None, revision: str | None, folder: Path | None) -> list[Check]:
    """Return the checks of the base against a record (of a folder) or a manifest (None)."""
    found: list[BaseHashes] = []

    def hashes() -> BaseHashes:
        projectors = values.get("projectors")
        if not projectors:
            raise _CantTell("format 1 does not name the projector's modules")
        if not found:
            found.append(base_hashes(_local(where, revision), tuple(projectors)))
        return found[0]

    def link(name: str) -> Callable[[], str]:
        def find() -> str:
            own = hashes()
            if folder is not None:
                check_base(values, folder, own)
            _same(name, values.get(name), getattr(own, name), where)
            return f"{CHAIN[name]}: {short(getattr(own, name))}"

        return find

    def settings() -> str:
        if values.get("settings_hash") is None:
            raise _CantTell("the record does not hold it")
        own = settings_hash(_local(where, revision))
        _same("settings_hash", values["settings_hash"], own, where)
        return f"{CHAIN['settings_hash']}: {short(own)}"

    checks = [_check(name, link(name)) for name in ("frozen_hash", "original_projector_hash")]
    return [*checks, _check("settings_hash", settings)]


def _same(name: str, expected: object, found: object, where: str | None) -> None:
    if expected != found:
        raise CheckpointError(f"{CHAIN[name]}: {where} has {short(found)}, expected {short(expected)}")


def _local(where: str | None, revision: str | None) -> Path:
    """Return the folder of a checkpoint that is on this machine; nothing is downloaded."""
    if where is None:
        raise _CantTell("the base is not named")
    folder = Path(shipped(where))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, revision=revision, local_files_only=True))
    # Not in the cache, or no hub id at all; either way it is not here.
    except Exception:
        raise _CantTell(f"{where!r} is not on this machine; name its folder with --base") from None


def _text_tower(values: Mapping[str, Any], base: str | None, revision: str | None) -> str:
    expected = values.get("text_tower_hash")
    if expected is None:
        return "the pruner reads none"
    tower = str(_local((values.get("pruning") or {}).get("text_tower"), None))
    from prunetune.models.hashes import stored_text_tower_hash

    _same("text_tower_hash", expected, stored_text_tower_hash(tower, _local(base, revision)), tower)
    return f"{tower} is {short(expected)}"


def _code(code: dict[str, Any] | None, plugins: list[dict[str, Any]]) -> list[Check]:
    """Return whether the code that made it is the code that is here: another is no damage, only not the same."""
    own = code_record()
    if code is None:
        checks = [Check("prunetune", None, "not recorded: an earlier version wrote it")]
    else:
        checks = [_check("prunetune", partial(_source, code, own))]
    load_installed()
    here = {plugin["name"]: plugin for plugin in plugin_records()}
    for plugin in plugins:
        name, source = f"plug-in {plugin['name']}", plugin.get("sha256")
        if plugin["name"] not in here:
            checks.append(Check(name, None, f"not loaded here; load it with --plugins {plugin['name']}"))
        elif here[plugin["name"]]["sha256"] == source:
            checks.append(Check(name, True, f"the same source, {short(source)}"))
        else:
            checks.append(Check(name, None, f"made by source {short(source)}; another one is loaded here"))
    return checks


def _source(code: dict[str, Any], own: dict[str, Any]) -> str:
    if code["sha256"] != own["sha256"]:
        raise _CantTell(f"made by {told(code)}; here is {told(own)}")
    return f"made by the source that is here, {told(code)}"


# ---- arms and comparisons --------------------------------------------------------------------------------------


def _arm(folder: Path, base: str | None) -> list[Check]:
    checks = [_check("seal", lambda: _manifest_seal(folder))]
    try:
        manifest = read_manifest(folder)
    except PrunetuneError:
        return checks
    rows: list[Result] = []

    def questions() -> str:
        rows.extend(read_results(folder))
        check_rows(folder, manifest, rows)
        return f"{len(rows)} rows of the manifest's questions, in order"

    def scores() -> str:
        check_scores(folder, manifest, rows)
        return "every prediction gets the score that is stored"

    checks += [
        _check("questions", questions),
        _check("scores", scores),
        _check("results_hash", lambda: _results(folder, manifest)),
    ]
    values = manifest.model_dump()
    where, revision = base or manifest.model.path, manifest.model.revision
    checks += _base(values, where, revision, None)
    checks.append(_check("projector_hash", lambda: _arms_projector(manifest)))
    checks.append(_check("text_tower_hash", lambda: _text_tower(values, where, revision)))
    checks += _code(values["prunetune"], values["plugins"])
    return checks


def _manifest_seal(folder: Path) -> str:
    if read_manifest(folder).format == 1:
        raise _CantTell("format 1 has none: an earlier version wrote it")
    return f"{MANIFEST} is as it was written"


def _results(folder: Path, manifest: Manifest) -> str:
    if manifest.results_hash is None:
        raise _CantTell("format 1 has none")
    check_results_hash(folder, manifest)
    return f"results.jsonl is {short(manifest.results_hash)}"


def _arms_projector(manifest: Manifest) -> str:
    projector = manifest.projector
    if projector.adapter is None:
        return "the base's own" if projector.tuned_for is None else "part of the export"
    folder = Path(projector.adapter)
    if projector.stored_hash is None:
        raise _CantTell("format 1 does not hold the adapter's")
    if not (folder / RECORD).is_file():
        raise _CantTell(f"the adapter {folder} is not here")
    if required(read_record(folder), "projector_hash", folder) != projector.stored_hash:
        raise CheckpointError(f"{folder} holds another adapter now than the arm ran with")
    check_projector({"projector_hash": projector.stored_hash}, folder, stored_projector_hash(folder / TENSORS))
    return f"{folder} is the adapter that the arm ran with, {short(projector.stored_hash)}"


def _comparison(folder: Path) -> list[Check]:
    values, checks = _sealed(folder, COMPARISON, read_comparison, "tables")
    if values is None:
        return checks
    arms = [*values["arms"], *([values["hard_for"]] if values["hard_for"] else [])]
    for arm in arms:
        place = Path(arm["folder"])
        # Those of a table lie in its own folder, where every arm has folders of the same names.
        name = place.name if ".." in place.parts else place.as_posix()
        checks.append(_check(f"arm {name}", partial(_compared, folder, arm)))
    checks.append(_check("numbers", lambda: _numbers(folder, values)))
    return [*checks, *_code(values["prunetune"], [])]


def _analysis(folder: Path, base: str | None) -> list[Check]:
    values, checks = _sealed(folder, ANALYSIS, read_analysis, "files")
    if values is None:
        return checks
    for run in values.get("runs", ()):
        checks.append(_check(f"run {run['folder']}", partial(_read, run)))
    if "frozen_hash" in values:
        model = values["config"]["model"]
        checks += _base(values, base or model["path"], model["revision"], None)
    return [*checks, *_code(values["prunetune"], values["plugins"])]


def _drawn(folder: Path, base: str | None) -> list[Check]:
    values, checks = _sealed(folder, DRAWN, read_drawn, "files")
    if values is None:
        return checks
    model = values["model"]
    checks += _base(values, base or model["path"], model["revision"], None)
    return [*checks, *_code(values["prunetune"], values["plugins"])]


def _sealed(
    folder: Path, record: str, read: Callable[[Path], dict[str, Any]], files: str
) -> tuple[dict[str, Any] | None, list[Check]]:
    """Return what a sealed record says, None if it can't be trusted, and the checks of it and of its files.

    Args:
        folder: of the record and its files.
        record: the record's file.
        read: returns its values, or raises.
        files: under which of them the hashes of the files stand.
    """
    try:
        values = read(folder)
    except PrunetuneError as error:
        return None, [Check("seal", False, str(error))]
    written = [_check(name, partial(_table, folder / name, expected)) for name, expected in values[files].items()]
    return values, [Check("seal", True, f"{record} is as it was written"), *written]


def _read(run: dict[str, str]) -> str:
    """Return what is said of an evaluation that was read."""
    folder = Path(run["folder"])
    if not (folder / MANIFEST).is_file():
        raise _CantTell(f"{folder} is not here")
    found = read_manifest(folder).results_hash
    if found != run["results_hash"]:
        raise CheckpointError(f"{folder} holds other results than those that were read; analyse again")
    return f"the results that were read, {short(found)}"


def _table(path: Path, expected: str) -> str:
    if file_hash(path) != expected:
        raise CheckpointError(f"{path} was changed after it was written; make it again")
    return f"as it was written, {short(expected)}"


def _compared(folder: Path, arm: dict[str, str]) -> str:
    manifest = folder / arm["folder"] / MANIFEST
    if not manifest.is_file():
        raise _CantTell(f"{manifest.parent} is not here")
    if file_hash(manifest) != arm["manifest"]:
        raise CheckpointError(f"{manifest} is another than the one that was compared; compare the arms again")
    return f"the manifest that was compared, {short(arm['manifest'])}"


def _numbers(folder: Path, values: dict[str, Any]) -> str:
    """Make the table again: its rows are computed from the arms' answers."""
    arms = [folder / arm["folder"] for arm in values["arms"]]
    hard_for = folder / values["hard_for"]["folder"] if values["hard_for"] else None
    missing = [arm for arm in [*arms, *([hard_for] if hard_for else [])] if not (arm / MANIFEST).is_file()]
    if missing:
        raise _CantTell(f"{missing[0]} is not here")
    stored = read_table(folder)
    recipe = read_recipe(folder, values)
    if recipe is None:
        table = compare(arms, hard_for=hard_for, allow=values["allow"], rescore=values["rescore"], output=folder)
        expected = stored.model_copy(update={"quoted": []})  # which are of no arm, and of no source that is known
    else:
        whole = len(recipe.quoted) == len(values["recipe"]["quoted"])
        table = (recipe if whole else replace(recipe, quoted=())).table(folder)
        # Costs are computed from the shape of a model, which need not be here.
        rows = [row.model_copy(update={"costs": {}}) for row in stored.rows]
        expected = stored.model_copy(update={"rows": rows} if whole else {"rows": rows, "quoted": []})
    if table.model_dump() != expected.model_dump():
        raise CheckpointError(f"{folder / TABLE} has other numbers than its arms; compare them again")
    also = () if recipe is None else recipe.also
    for file, draw in LAYOUTS.values():
        if file in values["tables"] and (folder / file).read_bytes() != draw(stored, also).encode():
            raise CheckpointError(f"{folder / file} has other numbers than {TABLE}; compare the arms again")
    return "the arms' answers give this table"
