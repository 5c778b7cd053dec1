"""Run one arm on tasks, into results.jsonl and manifest.json."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from prunetune.configs import EvaluateConfig, to_yaml
from prunetune.data_recipes import Formatter
from prunetune.data_recipes.images import limited
from prunetune.data_recipes.videos import sampled
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import (
    CodeRecord,
    KeptTokens,
    LayerTokens,
    Manifest,
    PluginRecord,
    ProjectorRecord,
    Result,
    TaskRecord,
    TaskSummary,
    read_results,
    results_hash,
    write_manifest,
)
from prunetune.evaluation.run.features import feature_data, sample_of, within
from prunetune.evaluation.run.shards import Batches as Ids
from prunetune.evaluation.run.shards import gather, shard, start
from prunetune.evaluation.tasks import Benchmark, Item, Scored, get_task
from prunetune.evaluation.tasks.base import Questions, items_hash, task_folder
from prunetune.models import Answer, Arm, read_record
from prunetune.models.answering import Batches, answered, check_backend
from prunetune.models.code import code_record
from prunetune.models.features import FeatureFormatter, FeatureStore
from prunetune.models.ranks import Ranks, join_ranks
from prunetune.models.record import required
from prunetune.outputs import EVALUATION, OutputFolder
from prunetune.plugins import plugin_records
from prunetune.screen import say


@dataclass(frozen=True)
class Work:
    """The items of one task, in their fixed batches."""

    task: Benchmark
    questions: Questions
    batches: list[list[Item]]

    @property
    def items(self) -> list[Item]:
        """All items, in order."""
        items = []
        for batch in self.batches:
            items += batch
        return items


def evaluate(config: EvaluateConfig, arm: Arm | None = None, device: str | None = None, bar: bool = True) -> Path:
    """Run one arm and return its folder; a run that was killed goes on with the batches that are not done.

    Batches are cut the same way in every run and dealt to the ranks in turn (``torchrun`` or ``deepspeed`` start
    several), so an interrupted run, an uninterrupted one and one on several ranks write the same results.

    Args:
        config: the arm, its tasks and where results go.
        arm: one with the configuration's model, pruning and adapter that is loaded already; None loads it.
        device: where it is loaded to; None is the GPU if there is one.
        bar: whether a progress bar is shown.

    Raises:
        TaskError: if the folder holds results of another configuration, naming the field.
        OutputError: if it is in use, holds something else, or can't be written.
        CheckpointError, PruningError, DataError: for weights, pruners or images that can't work.
    """
    ranks = join_ranks()
    ranks.check_same(plugin_records())
    folder = output_folder(config)
    with ranks.open_output(folder):
        _fill(folder, config, arm, device, ranks, bar)
    ranks.destroy()
    return folder.path


def output_folder(config: EvaluateConfig) -> OutputFolder:
    """Return where an evaluation writes; rank 0 opens it."""
    return OutputFolder(config.output, EVALUATION, config.overwrite, reads=(config.model.path, config.adapter))


def _fill(
    folder: OutputFolder, config: EvaluateConfig, arm: Arm | None, device: str | None, ranks: Ranks, bar: bool
) -> None:
    """Run one arm into a folder that is open."""
    output = folder.path
    # Before the model: missing files should not wait for minutes of loading.
    works = [_work(name, config) for name in config.tasks]
    if arm is None:
        arm = Arm.load(config.model, config.pruning, config.adapter, device)
    _check_is_configured(arm, config)
    _check_takes_videos(arm, works)
    check_backend(arm, config.backend, config.share_prefix)
    if ranks.is_zero:
        _say_seen(arm, config)
    store = _open_features(config, works, arm)
    manifest = _manifest(config, works, arm, store)
    batches = _batches(works)
    # One rank writes what there is one of; the others wait below until it is there.
    if ranks.is_zero:
        start(output, manifest)
        # Without the word: the file repeats the evaluation, and should not delete what it repeats.
        folder.write_text("config.yaml", to_yaml(config.model_copy(update={"overwrite": False})))
        gather(output, batches)
    ranks.wait()
    done = {row.key for row in read_results(output)}
    ranks.wait()  # nobody appends before everybody has read

    began = time.monotonic()
    # Answering alone: loading and hashing would make a short run look slow.
    _run(config, works, arm, done, ranks, store, bar)
    seconds = time.monotonic() - began
    ranks.wait()
    if ranks.is_zero:
        gather(output, batches)
        rows = read_results(output)
        # Of this run alone: rows of an earlier one took no time now.
        new = len(rows) - len(done)
        rate = round(new / seconds, 2) if new else None
        if bar and rate is not None:
            say(f"{output.name}: {rate} items/s (backend {config.backend}, batch size {config.batch_size})")
        summaries = {}
        for work in works:
            summaries[work.task.name] = _summary(work, rows, folder)
        # Last of all: killed before this line, the arm is still unfinished, and compare says so.
        done_now = manifest.finished(
            summaries, _kept(rows), rate, results_hash(output), _notes(rows), layer_tokens(rows)
        )
        write_manifest(output, done_now)


def _work(name: str, config: EvaluateConfig) -> Work:
    task = get_task(name)
    questions = task.open(task_folder(config.data, name))
    items = questions.items[: config.limit]
    # Cut before ranks and earlier runs are known: which questions share a batch must not depend on either.
    batches = []
    for index in range(0, len(items), config.batch_size):
        batches.append(items[index : index + config.batch_size])
    return Work(task, questions, batches)


def _batches(works: list[Work]) -> Ids:
    """Return the ids of all batches, by task."""
    batches: Ids = {}
    for work in works:
        batches[work.task.name] = []
        for batch in work.batches:
            batches[work.task.name].append([item.id for item in batch])
    return batches


def _check_is_configured(arm: Arm, config: EvaluateConfig) -> None:
    """Check that an arm which was loaded before is the one that the configuration asks for."""
    # The manifest is written from the configuration; with another arm its numbers would be somebody else's.
    asked = (config.model, config.pruning, config.adapter)
    if (arm.base.config, arm.spec, arm.adapter) != asked:
        raise TaskError(f"the arm that was loaded for {config.output} is not the one its configuration names")


def _say_seen(arm: Arm, config: EvaluateConfig) -> None:
    """Say it if the pruner's options were fitted on items of a benchmark that is evaluated: its score is flattered."""
    if arm.profile is not None and arm.profile.data.source == "task" and arm.profile.data.name in config.tasks:
        say(
            f"{config.pruning.profile} was fitted on {arm.profile.data.samples} items of {arm.profile.data.name}, "
            "which is evaluated here: this score is not held out; fit on a recipe or another benchmark"
        )


def _check_takes_videos(arm: Arm, works: list[Work]) -> None:
    """Check that a model which takes no videos is not asked about any."""
    asking = [work.task.name for work in works if work.task.video]
    if not asking:
        return
    family = arm.pruned.family
    if "video" not in family.pixels:
        takes = "takes none"
        if family.frames_are_images:
            takes = "gets their frames as images, which is not done here"
        raise TaskError(
            f"{', '.join(asking)} ask about videos, and model family {family.name!r} {takes}; choose a model that "
            "takes videos, or score predictions made elsewhere: `prunetune score TASK --predictions FILE --data DIR`"
        )


def _open_features(config: EvaluateConfig, works: list[Work], arm: Arm) -> FeatureStore | None:
    """Return the feature cache that is read in place of pixels, checked for the arm and the items; None without one."""
    if config.features is None:
        return None
    questions = {work.task.name: work.questions for work in works}
    data = feature_data(config.tasks, config.data, config.limit, config.max_pixels, questions)
    return FeatureStore.open(config.features, arm, data)


def _formatter(
    config: EvaluateConfig, work: Work, arm: Arm, store: FeatureStore | None
) -> Formatter | FeatureFormatter:
    """Return what turns a task's items into batches."""
    if store is not None:
        return FeatureFormatter(store, arm, within=partial(within, work.task.name))
    return arm.formatter(sampled(limited(work.questions.open_images(), config.max_pixels), config.video))


def _run(
    config: EvaluateConfig,
    works: list[Work],
    arm: Arm,
    done: set[tuple[str, str]],
    ranks: Ranks,
    store: FeatureStore | None,
    bar: bool,
) -> None:
    """Answer this rank's batches that are not done yet."""
    todo = []
    for work in works:
        for batch in work.batches:
            # A batch is done whole or not at all, so its first item speaks for it.
            if (work.task.name, batch[0].id) not in done:
                todo.append((work, batch))
    # In turn and not in blocks: where a task's long questions stand together, one rank would get them all.
    todo = todo[ranks.rank :: ranks.world]
    output = Path(config.output)
    shown = tqdm(
        total=sum(len(batch) for _, batch in todo),
        desc=output.name,
        unit="item",
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not (bar and ranks.is_zero),
    )

    def asked() -> Batches:
        formatters: dict[str, Formatter | FeatureFormatter] = {}
        for work, batch in todo:
            # Images are opened when the first batch needs them: a run that has nothing left to do needs none.
            if work.task.name not in formatters:
                formatters[work.task.name] = _formatter(config, work, arm, store)
            # No answer in the last turn: the prompt ends where the model is to go on.
            yield formatters[work.task.name], [sample_of(item) for item in batch]

    answers = answered(
        arm,
        asked(),
        config.max_new_tokens,
        config.batch_size,
        config.backend,
        config.backend_options,
        config.share_prefix,
    )
    with shard(output, ranks.rank, ranks.world).open("a", encoding="utf-8") as file, shown, closing(answers):
        for (work, batch), own in zip(todo, answers, strict=True):
            file.write("".join(row.to_line() for row in _rows(work.task, batch, own)))
            file.flush()  # killed later, this batch is not made again
            shown.update(len(batch))


def _rows(task: Benchmark, batch: list[Item], answers: list[Answer]) -> list[Result]:
    """Score the answers to one batch, once and for all."""
    rows = []
    for item, answer in zip(batch, answers, strict=True):
        row = Result(
            task=task.name,
            id=item.id,
            source=item.source,
            image=item.image,
            question=item.question,
            answer=item.answer,
            prediction=answer.text,
            score=task.score(answer.text, item).score,
            kept=answer.kept,
            kept_per_frame=None if answer.kept_per_frame is None else list(answer.kept_per_frame),
            # The record takes no others, and what a method counts on the side should not stop an evaluation.
            notes={name: value for name, value in answer.notes.items() if math.isfinite(value)},
            kinds=dict(item.kinds),
            layers=None if answer.layers is None else list(answer.layers),
        )
        rows.append(row)
    return rows


def _summary(work: Work, rows: list[Result], folder: OutputFolder) -> TaskSummary:
    """Return a task's metrics with their interval, writing the upload file where the benchmark has one."""
    # Rows come in the order of the items. The items are those that were read, and not made from rows: an upload or a
    # set's metric may need what a row does not hold.
    own = [row for row in rows if row.task == work.task.name]
    scored = []
    for item, row in zip(work.items, own, strict=True):
        scored.append(Scored(row.prediction, item, row.score))
    summary = work.task.summarise(scored)
    if work.task.upload is None:
        return summary
    if work.task.unasked is not None:
        scored += [Scored("", item, None) for item in work.task.unasked(work.questions.data)]
    # Staged: what a benchmark of somebody else's calls its file must not replace one that is not ours.
    with folder.staged() as staged:
        name = work.task.upload(scored, staged).name
    return summary.model_copy(update={"upload": name})


def _kept(rows: list[Result]) -> KeptTokens:
    """Return how many visual tokens reached the LLM."""
    # Over all items, text alone included: what the LLM got is what a budget is paid for.
    kept = [row.kept for row in rows]
    return KeptTokens(mean=sum(kept) / len(kept), min=min(kept), max=max(kept))


def layer_tokens(rows: Sequence[Result]) -> LayerTokens | None:
    """Return how many visual tokens the LLM's layers processed, over all items; None where no stage dropped any."""
    counts = [row.layers for row in rows if row.layers is not None]
    if not counts:
        return None
    means = [sum(layer) / len(counts) for layer in zip(*counts, strict=True)]
    return LayerTokens(final=means[-1], average=sum(means) / len(means), layers=means)


def _notes(rows: list[Result]) -> dict[str, dict[str, float]]:
    """Return for each task the mean of what the pruner noted, over the items of which it noted that."""
    noted: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, value in row.notes.items():
            noted.setdefault(row.task, {}).setdefault(name, []).append(value)
    means: dict[str, dict[str, float]] = {}
    for task, by_name in noted.items():
        means[task] = {name: sum(values) / len(values) for name, values in by_name.items()}
    return means


def _manifest(config: EvaluateConfig, works: list[Work], arm: Arm, store: FeatureStore | None) -> Manifest:
    """Return everything that decides an arm's numbers."""
    tasks = {}
    for work in works:
        tasks[work.task.name] = TaskRecord(
            items=len(work.items),
            hash=items_hash(work.items),
            protocol=work.task.protocol,
            prompt=work.task.prompt,
        )
    # What the projector was trained for, from the adapter's own record: its folder may have been renamed since.
    tuned_for = stored_hash = None
    made = {}
    # An export has no adapter, and is tuned all the same: nothing may take it for training-free.
    tuned = arm.base.exported if config.adapter is None else read_record(config.adapter)
    if tuned is not None:
        source = config.adapter or config.model.path
        tuned_for = required(tuned, "pruning", source)
        stored_hash = required(tuned, "projector_hash", source)
        # Of which earlier versions did not write all, and most projectors have none.
        made = {name: tuned.get(name) for name in ("trained_in", "elastic", "strength")}
        made["soup"] = len(tuned["soup"]) if tuned.get("soup") else None
    projector = ProjectorRecord(
        adapter=config.adapter,
        hash=arm.projector_hash,
        tuned_for=tuned_for,
        stored_hash=stored_hash,
        **made,
    )
    return Manifest(
        model=config.model,
        frozen_hash=arm.base.hashes.frozen_hash,
        original_projector_hash=arm.base.hashes.original_projector_hash,
        projectors=list(arm.base.hashes.projectors),
        settings_hash=arm.base.settings_hash,
        template_hash=arm.template_hash,
        projector=projector,
        pruning=arm.pruning,
        profile=None if arm.profile is None else arm.profile.link(),
        text_tower_hash=arm.text_tower_hash,
        tasks=tasks,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        share_prefix=config.share_prefix,
        backend=config.backend,
        backend_options=config.backend_options.model_dump(exclude_defaults=True),
        # transformers has a slow and a fast one for many models, and takes one by what else is installed.
        image_processor=type(arm.processor.image_processor).__name__,
        features=None if store is None else store.seal,
        video=config.video if any(work.task.video for work in works) else None,
        device=torch.cuda.get_device_name() if arm.device.type == "cuda" else platform.machine(),
        versions={name: version(name) for name in ("torch", "transformers")},
        prunetune=CodeRecord(**code_record()),
        plugins=[PluginRecord(**plugin) for plugin in plugin_records()],
    )
