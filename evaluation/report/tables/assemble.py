"""From folders of finished evaluations to a table: native metrics, relative averages, gains, kinds of questions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.intervals import RESAMPLES
from prunetune.evaluation.metrics.significance import MCNEMAR, PERMUTATIONS
from prunetune.evaluation.report.arms import EvaluatedArm
from prunetune.evaluation.report.comparable import (
    allowed_differences,
    check_allowed,
    check_comparable,
    check_same_questions,
    twin_of,
)
from prunetune.evaluation.report.places import relative_names, without_folders
from prunetune.evaluation.report.quoted import Quote, beside, check_names, known_metrics
from prunetune.evaluation.report.tables.arms import ArmRuns, Entry, named, read_entries
from prunetune.evaluation.report.tables.gains import Gains, Pair, gains
from prunetune.evaluation.report.tables.numbers import (
    Measured,
    Numbers,
    kinds_of,
    measured,
    native,
    numbers_of,
    only,
    pooled,
    relative,
    set_metrics,
)
from prunetune.evaluation.report.tables.table import Row, Table, Value
from prunetune.evaluation.tasks.base import ACCURACY, get_task
from prunetune.models.code import told
from prunetune.models.record import portable

Baseline = str | Path | Sequence[str | Path | ArmRuns | Sequence[str | Path]] | None
"""The arms of the ``downsample`` baseline."""


def assemble(
    runs: Sequence[ArmRuns | str | Path],
    title: str = "",
    baseline: Baseline = None,
    quoted: Sequence[Quote] = (),
    allow: Sequence[str] = (),
    rescore: bool = False,
    several_models: bool = False,
    output: Path | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Table:
    """Return the table of finished evaluations.

    Args:
        runs: a row each: the folder of an arm, or :class:`ArmRuns` for one that was trained several times.
        title: of the table.
        baseline: an arm of the ``downsample`` baseline (of several models one each; a list of folders where benchmarks
            were evaluated into a folder each; :class:`ArmRuns` where models are told apart by name): the items that it
            gets wrong are the hard part (the idea of VTC-Bench, arXiv 2510.07143: the others are answered by a smaller
            image as well). One that answers everything leaves nothing hard, and a footnote says so.
        quoted: rows from papers.
        allow: fields of the manifests that may differ between arms; how they did stands in a footnote.
        rescore: whether the scorers of today count where they say something else than when an arm was evaluated.
        several_models: whether arms may be of several models. Each model then needs arms that are comparable among
            themselves, and has a dense arm of its own.
        output: folder that the table will lie in, which folders of evaluations are named from.
        notes: further footnotes, such as arms that failed.
        seed: of bootstrap and exchanges.

    Raises:
        TaskError: if the arms can't be compared, or a quoted row has a name that nothing here has.
    """
    allowed = check_allowed(allow)
    entries = read_entries(runs, rescore, allowed)
    by_model = _by_model(entries, several_models)
    for own in by_model:
        check_comparable([arm for entry in own for arm in entry.arms], allowed)
        check_same_questions(entries[0].first, own[0].first)
    entries = named([entry for own in by_model for entry in own])
    check_names(quoted, _known_here(entries[0].first), {entry.first.method for entry in entries})
    arms = [arm for entry in entries for arm in entry.arms]
    dense = _dense(entries)
    columns = measured(arms, seed)
    average, pool = relative(columns, dense, seed), pooled(arms, seed)
    pairs = list(_pairs(entries))
    gained = gains(pairs, columns, average, pool, dense, seed)
    twins = {pair.row: entries[_owner(entries, pair.twin)].id for pair in pairs}
    kinds = _kinds(columns, entries, arms, seed)
    hard, hard_notes = _hard(entries, arms, baseline, allowed, rescore, seed)
    rows = []
    for entry in entries:
        gain = gained.get(entry.id, Gains())
        rows.append(
            Row(
                id=entry.id,
                label=entry.label,
                model=entry.model,
                method=entry.first.method,
                budget=entry.first.budget,
                kept=float(np.mean([arm.kept for arm in entry.arms])),
                per_layer=_per_layer(entry),
                projector=entry.first.projector,
                twin=twins.get(entry.id),
                values={column.column.key: column.numbers.of(entry.places) for column in columns},
                gains=gain.by_column,
                relative=_relative(average, entry, dense, columns),
                relative_gain=gain.relative,
                pooled=None if pool is None else pool.of(entry.places),
                pooled_gain=gain.pooled,
                by_type=kinds[entry.id],
                hard=hard.get(entry.id, {}),
                facts=_facts(entry),
                folders=[_place(arm.folder, output) for arm in entry.arms],
            )
        )
    footnotes = [
        *_on_intervals(entries, columns, pairs, gained),
        *_on_averages(columns, dense),
        *_on_stages(rows),
        *hard_notes,
        *_on_allowed(by_model, allowed),
        *_on_scores(arms, rescore),
        *(without_folders(note, output) for note in notes),
    ]
    table = Table(title=title, columns=[one.column for one in columns], rows=rows, footnotes=footnotes)
    return beside(table, quoted)


def _per_layer(entry: Entry) -> float | None:
    """Return the mean number of visual tokens of a layer, over trainings."""
    found = [arm.per_layer for arm in entry.arms if arm.per_layer is not None]
    return float(np.mean(found)) if found else None


def _on_stages(rows: Sequence[Row]) -> Iterator[str]:
    if any(row.per_layer is not None for row in rows):
        yield (
            "Visual tokens are those that enter the LLM; tokens per layer are the mean over its layers, between which "
            "stages drop some."
        )


def _known_here(arm: EvaluatedArm) -> dict[str, set[str]]:
    """Return the metrics that columns can have, by benchmark: also those that benchmarks only name in manifests."""
    found = known_metrics()
    for name, answers in arm.answers.items():
        if not native(get_task(name), answers):
            found[name] = found.get(name, set()) | set(set_metrics(arm, name))
    return found


def _by_model(entries: Sequence[Entry], several: bool) -> list[list[Entry]]:
    """Return the entries of each model, in the order in which models are named first."""
    if not several:
        # One model, wherever it lay: that its weights are the same is checked.
        return [[replace(entry, model=entries[0].model) for entry in entries]]
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.model, entry.first.manifest.frozen_hash), []).append(entry)
    models = [model for model, _ in found]
    for model in models:
        if models.count(model) > 1:
            folders = [own[0].first.folder for (name, _), own in found.items() if name == model]
            raise TaskError(f"{folders[0]} and {folders[1]} are of one model {model!r} with different frozen weights")
    return list(found.values())


def _dense(entries: Sequence[Entry]) -> list[int | None]:
    """Return the place of each arm's dense arm: the first of its model."""
    by_model: dict[str, int] = {}
    for entry in entries:
        if entry.first.dense:
            by_model.setdefault(entry.model, entry.places[0])
    return [by_model.get(entry.model) for entry in entries for _ in entry.arms]


def _pairs(entries: Sequence[Entry]) -> Iterator[Pair]:
    """Give every tuned row with its twin."""
    for entry in entries:
        if entry.first.tuned:
            same = [other for other in entries if other.model == entry.model]
            twin = twin_of(entry.first, [other.first for other in same])
            place = next(other.places[0] for other in same if other.first is twin)  # there is one: it was checked
            yield Pair(entry.id, tuple(entry.places), place)


def _owner(entries: Sequence[Entry], place: int) -> int:
    return next(number for number, entry in enumerate(entries) if place in entry.places)


def _relative(
    average: Numbers | None, entry: Entry, dense: Sequence[int | None], columns: Sequence[Measured]
) -> Value | None:
    base = dense[entry.places[0]]
    if average is None or base is None:
        return None
    found = average.of(entry.places)
    if found.value is not None:
        return found
    for column in columns:
        if column.weighed and not column.numbers.values[base]:
            return found.model_copy(update={"note": f"the dense arm has no {column.column.key} to be a share of"})
    return found


def _kinds(
    columns: Sequence[Measured], entries: Sequence[Entry], arms: Sequence[EvaluatedArm], seed: int
) -> dict[str, dict[str, dict[str, Value]]]:
    """Return each row's headline metrics by kind of question."""
    found: dict[str, dict[str, dict[str, Value]]] = {entry.id: {} for entry in entries}
    for column in columns:
        metric = column.numbers.metric
        if metric is None or not column.column.headline:
            continue
        name = column.column.task
        if any(one.score is None for one in arms[0].answers[name]):
            continue  # a kind's CIDEr weighs words anew, minutes of another program for each arm: manifest.json has it
        for kind, places in kinds_of(get_task(name), arms[0].answers[name]).items():
            (numbers,) = numbers_of([metric], [only(arm.answers[name], places) for arm in arms], seed)
            for entry in entries:
                value = numbers.of(entry.places)
                # MME's perception, of a kind of cognition: it says nothing.
                if value.value is not None:
                    found[entry.id].setdefault(column.column.key, {})[kind] = value
    return found


# What a smaller image answers as well says nothing about which tokens were kept.
def _hard(
    entries: Sequence[Entry],
    arms: Sequence[EvaluatedArm],
    baseline: Baseline,
    allowed: Sequence[str],
    rescore: bool,
    seed: int,
) -> tuple[dict[str, dict[str, Value]], list[str]]:
    """Return each row's accuracy over the items that its model's baseline gets wrong, by benchmark, and footnotes."""
    found: dict[str, dict[str, Value]] = {}
    notes = []
    folders = [baseline] if isinstance(baseline, str | Path) else list(baseline or ())
    for folder in folders:
        one = folder if isinstance(folder, str | Path | ArmRuns) else ArmRuns("", [folder])
        (run,) = read_entries([one], rescore, allowed)
        below = run.first
        if below.pruner != "downsample" or below.tuned:
            raise TaskError(f"{below.folder} is no training-free arm of downsample, which the difficulty filter needs")
        if isinstance(folder, ArmRuns) and folder.model:
            own = [entry for entry in entries if entry.model == folder.model]
        else:
            own = [entry for entry in entries if entry.first.manifest.frozen_hash == below.manifest.frozen_hash]
        # The tuned arms were compared with these before.
        free = [arm for entry in own or entries for arm in entry.arms if not arm.tuned]
        check_comparable([below, *(free or [entries[0].first])], allowed)
        whose = f" of {own[0].model}" if len(folders) > 1 and own else ""
        total = 0
        for name, said in below.answers.items():
            # Half: VQA accuracy knows answers that are half right.
            places = [place for place, one in enumerate(said) if one.score is not None and one.score < 0.5]
            if not places:
                continue
            total += len(places)
            # Items chosen one by one are no whole circles, pairs or positives: of those that all other metrics are
            # counted over, some would lack what the baseline got right, and a perfect arm would not reach its number.
            hard = [only(arm.answers[name], places) for arm in arms]
            (numbers,) = numbers_of([ACCURACY], hard, seed)
            for entry in own:
                found.setdefault(entry.id, {})[name] = numbers.of(entry.places)
        if total == 0:
            notes.append(f"No hard part{whose}: downsample at {below.budget} answers everything; use a smaller budget.")
            continue
        notes.append(
            f"Hard part{whose}: {total:,} of {len(below.ids):,} items, those that downsample at {below.budget} answers "
            "wrongly (after VTC-Bench), under their plain accuracy."
        )
    return found, notes


def _facts(entry: Entry) -> dict[str, str | int | float | None]:
    """Return what a reader of one row needs to know of how it came about."""
    arm = entry.first
    manifest = arm.manifest
    assert manifest.kept_tokens is not None  # a finished arm has them
    protocols = {task.protocol for task in manifest.tasks.values()}
    prompts = {task.prompt for task in manifest.tasks.values()}
    pruning = manifest.pruning.model_dump()
    for name in ("text_tower", "profile"):
        if pruning.get(name) is not None:
            pruning[name] = portable(pruning[name])
    facts: dict[str, str | int | float | None] = {
        "items": len(arm.ids),
        "kept_min": manifest.kept_tokens.min,
        "kept_max": manifest.kept_tokens.max,
        "protocol": "; ".join(sorted(protocols)),
        "prompt": "; ".join(sorted(prompts)),
        "batch_size": manifest.batch_size,
        "dtype": manifest.model.dtype,
        "model": portable(manifest.model.path),
        # 64 bits tell arms apart; the whole hashes are in their manifests.
        "frozen_hash": manifest.frozen_hash[:16],
        "projector_hash": _each(entry, [one.manifest.projector.hash for one in entry.arms]),
        "pruning": json.dumps(pruning, sort_keys=True),
        "original_projector_hash": (manifest.original_projector_hash or "")[:16],
        "adapter_hash": _each(entry, [one.manifest.projector.stored_hash or "" for one in entry.arms]),
        "prunetune": "; ".join(dict.fromkeys(_code(cell) for one in entry.arms for cell in one.cells)),
    }
    if manifest.llm_tokens is not None:
        facts["llm_final_tokens"] = manifest.llm_tokens.final
        facts["llm_layer_tokens"] = " ".join(f"{count:g}" for count in manifest.llm_tokens.layers)
    if len(entry.arms) > 1:
        facts["trainings"] = len(entry.arms)
    return facts


def _code(arm: EvaluatedArm) -> str:
    return told(None if arm.manifest.prunetune is None else arm.manifest.prunetune.model_dump())


def _each(entry: Entry, hashes: Sequence[str]) -> str:
    return " ".join(one[:16] for one in hashes)


def _place(folder: Path, output: Path | None) -> str:
    return str(folder) if output is None else os.path.relpath(folder, output)


def _on_intervals(
    entries: Sequence[Entry], columns: Sequence[Measured], pairs: Sequence[Pair], gained: dict[str, Gains]
) -> Iterator[str]:
    if any(column.numbers.draws is not None for column in columns):
        yield (
            f"Intervals: 95 % bootstrap intervals of the metric itself, {RESAMPLES:,} samples of its units (see each "
            "metric), the same samples for all rows, so that differences are paired."
        )
    if any(len(entry.arms) > 1 for entry in entries):
        yield (
            "Rows over several trainings: the mean; the interval is over images, of that mean; the standard deviation "
            "over trainings stands apart."
        )
    tested = [
        one
        for gain in gained.values()
        for one in (*gain.by_column.values(), gain.relative, gain.pooled)
        if one is not None and one.p is not None
    ]
    if not pairs or not tested:
        return
    text = (
        f"Tests that tuned and training-free do not differ: {PERMUTATIONS:,} exchanges of whole units (images) between "
        "the two arms, since questions of one image hang together"
    )
    if any(one.test == MCNEMAR for one in tested):
        text += "; McNemar's exact test where every unit is one question that is right or wrong"
    yield f"{text}. p is Holm-corrected over the {len(tested)} differences of this table."


def _on_averages(columns: Sequence[Measured], dense: Sequence[int | None]) -> Iterator[str]:
    headlines = [column for column in columns if column.column.headline]
    if all(place is None for place in dense):
        yield "No relative average: no arm is dense."
        return
    weighed = [column.column.key for column in headlines if column.weighed]
    left_out = []
    for column in headlines:
        if not column.weighed:
            left_out.append(f"{column.column.key} ({_why_not(column)})")
    if weighed:
        text = f"Relative average: mean of pruned / dense over {', '.join(weighed)}, the dense arm drawn in each sample"
        yield text + (f"; without {', '.join(left_out)}." if left_out else ".")
    elif left_out:
        yield f"No relative average: there is but {', '.join(left_out)}."


def _why_not(column: Measured) -> str:
    if column.numbers.note:
        return column.numbers.note
    return "less is better" if not column.column.higher else "a score of the whole set"


def _on_allowed(by_model: Sequence[Sequence[Entry]], allowed: Sequence[str]) -> Iterator[str]:
    for own in by_model:
        arms = [arm for entry in own for arm in entry.arms]
        for name, values in allowed_differences(arms, allowed).items():
            folders = [Path(folder) for own_folders in values.values() for folder in own_folders]
            names = dict(zip(map(str, folders), relative_names(folders), strict=True))
            told_of = [
                f"{value} ({', '.join(names[folder] for folder in told_by)})" for value, told_by in values.items()
            ]
            yield without_folders(f"Allowed to differ, {name}: {'; '.join(told_of)}.")


def _on_scores(arms: Sequence[EvaluatedArm], rescore: bool) -> Iterator[str]:
    if not rescore:
        return
    changed = []
    folders = relative_names([arm.folder for arm in arms])
    for arm, folder in zip(arms, folders, strict=True):
        for name, number in arm.rescored.items():
            changed.append(f"{number} of {len(arm.answers[name])} of {name} in {folder}")
    what = f"answers with another score than when they were given: {', '.join(changed)}" if changed else "none differs"
    yield f"Scored anew from the predictions with today's scorers; {what}."
