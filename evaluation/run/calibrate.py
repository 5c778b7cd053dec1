"""Fit a method to a model: the options that its file declares, measured on data, into a profile."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from prunetune.configs import DataConfig, EvaluateConfig, RecalibrateConfig
from prunetune.data_recipes import DataError, Formatter, Sample, Turn, load_recipe
from prunetune.data_recipes.formatting import IGNORE_INDEX
from prunetune.data_recipes.images import ImageOpener, limited
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.data_recipes.videos import VIDEO, sampled
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.intervals import bootstrap_interval
from prunetune.evaluation.run.boundaries import MEASURE, fit_boundary, open_stage
from prunetune.evaluation.tasks import Benchmark, Item, get_task
from prunetune.evaluation.tasks.base import items_hash, task_folder
from prunetune.models import Arm
from prunetune.models.code import code_record
from prunetune.models.profile import Measured, Profile, ProfiledData, ProfiledModel
from prunetune.models.record import portable
from prunetune.plugins import plugin_records
from prunetune.pruning import PruningSpec, StageSpec, VisualTokens
from prunetune.pruning.fitting import Choice, Fit, Mean
from prunetune.pruning.ops.complexity import attention_entropy, erank
from prunetune.pruning.registry import method_of

MEASURES = ("erank", "attention_entropy")
Values = dict[str, list[float]]
"""A measure's values, by its name."""


@dataclass(frozen=True)
class Spread:
    """Mean and quartiles of one measure."""

    mean: float
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of some values."""
        if len(values) == 1:  # which statistics.quantiles refuses
            return cls(values[0], values[0], values[0], values[0])
        # The values are all there is, not a sample of something larger, so the extremes are the ends of the range.
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.fmean(values), lower, median, upper)


@dataclass(frozen=True)
class Calibration:
    """What was measured and fitted.

    Attributes:
        items: images, crops or pooled crops that the pruner was given.
        before: each measure of them.
        after: each measure of what the fitted pruner keeps of them.
        profile: what was fitted; None for a method that has nothing to fit under these options.
    """

    items: int
    before: dict[str, Spread]
    after: dict[str, Spread]
    profile: Profile | None

    def to_markdown(self) -> str:
        """Return the tables: complexity before and after, and what was measured with each value of each option."""
        lines = ["| measure | mean | lower quartile | median | upper quartile |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, spread in self.before.items():
            lines.append(_line(name, spread))
        for name, spread in self.after.items():
            lines.append(_line(f"{name}, kept tokens", spread))
        if self.profile is not None:
            lines += ["", *fitted_lines(self.profile)]
        return "\n".join(lines)


def _line(name: str, spread: Spread) -> str:
    numbers = (spread.mean, spread.lower, spread.median, spread.upper)
    return f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |"


def fitted_lines(profile: Profile) -> list[str]:
    """Return the table of what was measured with each value, and what the method reports, as lines of Markdown."""
    score = profile.measure or "score"
    lines = [f"| option | value | {score} | against published | fitted |", "| --- | ---: | ---: | ---: | :---: |"]
    for option, rows in profile.evidence.items():
        for row in rows:
            gain = ""
            if row.gain is not None and row.gain_interval is not None:
                gain = f"{row.gain:+.3f} ({row.gain_interval[0]:+.3f} to {row.gain_interval[1]:+.3f})"
            mean = "" if row.score is None else f"{row.score:.{3 if option in profile.options else 5}f}"
            chosen = "x" if _is_fitted(profile, option, row.value) else ""
            lines.append(f"| {option} | {row.value} | {mean} | {gain} | {chosen} |")
        scores = {row.score for row in rows}
        if len(rows) > 1 and None not in scores and len(scores) == 1:
            lines.append(
                f"\nevery {option} answers alike at keep {profile.pruning['keep']}: nothing to choose by; another "
                "budget or more samples may tell"
            )
    for name, value in profile.reports.items():
        lines.append(f"\n{name}: {100 * value:.1f} % of the items")
    return lines


def _is_fitted(profile: Profile, option: str, value: Any) -> bool:
    if option in profile.options:
        return bool(value == profile.options[option])
    return [value] == profile.stages.get(option.split(" ")[0])


@dataclass(frozen=True)
class Scores:
    """How well one candidate answers: one number per sample, and the image of each."""

    values: list[float]
    images: list[str]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    def gain_over(self, other: Scores) -> tuple[float, list[float]]:
        """Return the mean difference from another candidate's scores, and its paired 95 % interval by image."""
        difference = np.subtract(self.values, other.values)
        low, high = bootstrap_interval(difference, self.images)  # in percent
        return float(difference.mean()), [low / 100, high / 100]


@dataclass(frozen=True)
class Slice:
    """The samples that are measured on, where they come from, and how an arm is scored on them.

    Attributes:
        samples: with an image each; questions of a benchmark have no answer in their last turn.
        images: opens them.
        about: for the profile.
        max_length: longest sequence in tokens, None for no limit.
        task: the benchmark whose scorer is used; None scores by the likelihood of the samples' own answers.
        items: the benchmark's items, in the samples' order.
        max_new_tokens: longest answer to a benchmark.
    """

    samples: list[Sample]
    images: ImageOpener
    about: ProfiledData
    max_length: int | None = None
    task: Benchmark | None = None
    items: list[Item] = field(default_factory=list)
    max_new_tokens: int = 128

    @property
    def measure(self) -> str:
        """What a score is, in words."""
        return "log-likelihood per answer token" if self.task is None else f"score by {self.task.name}"

    def scores(self, arm: Arm, batch_size: int) -> Scores:
        """Return how well an arm answers every sample."""
        formatter = arm.formatter(self.images, self.max_length)
        values: list[float] = []
        images: list[str] = []
        for indices in _batches(len(self.samples), batch_size, "answers"):
            samples = [self.samples[index] for index in indices]
            if self.task is None:
                measured = _log_likelihoods(arm, formatter, samples)
            else:
                measured = self._task_scores(arm, formatter, indices)
            for sample, value in zip(samples, measured, strict=True):
                if value is not None:  # a sample that lost its answer to the limit says nothing
                    values.append(value)
                    images.append(str(sample.image))
        if not values:
            raise DataError(f"no sample of {self.about.name} has an answer within train.max_length to measure by")
        return Scores(values, images)

    def _task_scores(self, arm: Arm, formatter: Formatter, indices: Sequence[int]) -> list[float | None]:
        assert self.task is not None
        answers = arm.answer(formatter, [self.samples[index] for index in indices], self.max_new_tokens)
        scores: list[float | None] = []
        for index, answer in zip(indices, answers, strict=True):
            score = self.task.score(answer.text, self.items[index]).score
            if score is None:
                raise TaskError(
                    f"{self.task.name} has no score per item, which options are chosen by; calibrate on another "
                    "benchmark or on a recipe"
                )
            scores.append(score)
        return scores


@torch.inference_mode()
def calibrate(
    config: RecalibrateConfig | EvaluateConfig,
    count: int,
    batch_size: int = 8,
    device: str | None = None,
    eta: float = 0.003,
) -> Calibration:
    """Fit the configuration's method to its model, on ``count`` samples of its data.

    Means are measured first, then choices one after another, each with what was fitted before. The published value of
    a choice is left only for one that is better beyond chance: the paired 95 % interval by image excludes 0. Options
    that the configuration sets, and that the method does not declare as fitted, stay as they are.

    The data are the samples that a recipe holds out, or of one that holds out none, a draw by its seed from all; of a
    benchmark the items of drawn images or videos. The projector is the checkpoint's: both arms of a comparison, the
    tuned and the training-free one, run with what is fitted.

    Of a stage that withdraws all visual tokens and names no layer (``vtw``) that layer is fitted: the first at which
    the distribution of the first answer token changes by no more than ``eta``.

    Raises:
        DataError, TaskError, PruningError, CheckpointError: for data, options or weights that can't work.
    """
    data = _task_slice(config, count) if isinstance(config, EvaluateConfig) else _recipe_slice(config, count)
    method = method_of(config.pruning.pruner)
    # All that is fitted is set from the start: what a profile or the configuration says of it is what is measured anew.
    spec = config.pruning.model_copy(update={"profile": None})
    pruner = spec.build()
    fits = [fit for fit in method.fits if fit.counts(pruner)]
    published = {fit.option: getattr(method.pruner(), fit.option) for fit in fits}
    spec = _with_options(spec, published)
    stage = open_stage(spec)
    if stage is not None:  # its paper's layer may be none of this model's
        spec = spec.model_copy(update={"stages": [own for own in spec.stages if own != stage]})
    arm = Arm.load(config.model, spec, device=device)
    evidence: dict[str, list[Measured]] = {}
    fitted: dict[str, Any] = {}
    if stage is not None:
        return _of_stage(config, arm, stage, data, batch_size, eta, fits)
    means = [fit for fit in fits if isinstance(fit, Mean)]
    if means:
        fitted |= _means(arm, data, means, batch_size)
        for mean in means:
            evidence[mean.option] = [Measured(value=published[mean.option]), Measured(value=fitted[mean.option])]
    for fit in fits:
        values = _candidates(fit, arm, published[fit.option])
        if values:
            arm = arm.with_pruning(_with_options(spec, fitted))
            rows, best = _choose(arm, data, fit.option, values, published[fit.option], batch_size)
            evidence[fit.option], fitted[fit.option] = rows, best
    arm = arm.with_pruning(_with_options(spec, fitted))
    looked = _look(arm, data, batch_size)
    profile = _profile(config, arm, data, fitted, evidence, looked.reports) if fits else None
    return Calibration(len(looked.before["erank"]), _spreads(looked.before), _spreads(looked.after), profile)


def _of_stage(
    config: RecalibrateConfig | EvaluateConfig,
    arm: Arm,
    stage: StageSpec,
    data: Slice,
    batch_size: int,
    eta: float,
    fits: Sequence[Fit],
) -> Calibration:
    """Return what was measured of a stage's boundaries."""
    if fits:
        raise TaskError(
            f"{config.pruning.pruner} and {stage.name} are both to be fitted: fit the pruner without the stage first, "
            "and write its options into pruning.options"
        )
    formatter = arm.formatter(data.images)
    prompts = (
        formatter.prompt_batch([_question(data.samples[index]) for index in indices])
        for indices in _batches(len(data.samples), batch_size, "boundaries")
    )
    rows, boundary = fit_boundary(arm, stage, prompts, eta)
    looked = _look(arm, data, batch_size)
    profile = _profile(config, arm, data, {}, {f"{stage.name} boundaries": rows}, looked.reports)
    profile = profile.model_copy(update={"stages": {stage.name: [boundary]}, "measure": MEASURE})
    return Calibration(len(looked.before["erank"]), _spreads(looked.before), _spreads(looked.after), profile)


def _with_options(spec: PruningSpec, options: dict[str, Any]) -> PruningSpec:
    return spec.model_copy(update={"options": {**spec.options, **options}})


def _candidates(fit: Fit, arm: Arm, published: Any) -> list[Any]:
    """Return the values of a choice, the published one first where the model has it; none of a mean."""
    if isinstance(fit, Choice):
        values = list(fit.values)
    elif isinstance(fit, Mean):
        return []
    else:
        values = _layers(arm.pruned.family.vision_layers(arm.model), published)
    return sorted(values, key=lambda value: value != published)


def _layers(count: int, published: int, most: int = 8) -> list[int]:
    """Return at most ``most`` layers from 1 to ``count``, evenly spread, and the published one if it is among them."""
    steps = min(most, count)
    layers = {round(1 + step * (count - 1) / max(steps - 1, 1)) for step in range(steps)}
    if published <= count:
        layers.add(published)
    return sorted(layers)


def _choose(
    arm: Arm, data: Slice, option: str, values: list[Any], published: Any, batch_size: int
) -> tuple[list[Measured], Any]:
    """Return what was measured with each value, and the best one; the published one unless another is truly better."""
    scores = {}
    for value in values:
        candidate = arm.with_pruning(_with_options(arm.spec, {option: value}))
        scores[value] = data.scores(candidate, batch_size)
    rows = []
    better = {}
    for value in values:
        gain: float | None = None
        interval: list[float] | None = None
        if value != published and published in scores:
            gain, interval = scores[value].gain_over(scores[published])
        # A model without the published layer has nothing to hold on to: the best is taken.
        if published not in scores or (interval is not None and interval[0] > 0):
            better[value] = scores[value].mean
        rows.append(Measured(value=value, score=round(scores[value].mean, 4), gain=gain, gain_interval=interval))
    best = max(better, key=lambda value: better[value]) if better else published
    return rows, best


def _means(arm: Arm, data: Slice, fits: list[Mean], batch_size: int) -> dict[str, float]:
    """Return the mean of each measure over what the pruner chooses from."""
    values: Values = {fit.option: [] for fit in fits}
    for tokens in _given(arm, data, batch_size):
        for fit in fits:
            assert fit.measure is not None  # the registry checked it
            values[fit.option] += fit.measure(tokens).tolist()
    return {option: round(statistics.fmean(measured), 3) for option, measured in values.items()}


def _given(arm: Arm, data: Slice, batch_size: int) -> Iterator[VisualTokens]:
    """Yield what the pruner chooses from, batch by batch."""
    formatter = arm.formatter(data.images)
    for indices in _batches(len(data.samples), batch_size, "means"):
        batch = formatter.prompt_batch([_question(data.samples[index]) for index in indices])
        prepared = arm.pruned.prepare(arm.place(batch))
        for chosen in prepared.chosen.values():
            for among in chosen.candidates:
                yield among.tokens


@dataclass
class _Looked:
    before: Values = field(default_factory=lambda: {name: [] for name in MEASURES})
    after: Values = field(default_factory=lambda: {name: [] for name in MEASURES})
    reports: Values = field(default_factory=dict)


def _look(arm: Arm, data: Slice, batch_size: int) -> _Looked:
    """Measure how complex images are before and after pruning, and what the method reports of its choices.

    The effective rank is that of the projected tokens (equations 3 and 7 of the adaptive pruning study), the entropy
    that of the head-averaged [CLS] attention, where the method reads it (equations 1 and 2).
    """
    looked = _Looked()
    formatter = arm.formatter(data.images)
    for indices in _batches(len(data.samples), batch_size, "complexity"):
        batch = formatter.prompt_batch([_question(data.samples[index]) for index in indices])
        _measure(arm, batch, looked)
    return looked


def _measure(arm: Arm, batch: dict[str, Any], looked: _Looked) -> None:
    """Measure one batch: what the pruner is given, what it keeps, and what its method reports."""
    prepared = arm.pruned.prepare(arm.place(batch))
    # After: the features as they reach the LLM, merged tokens included.
    pairs = []
    for modality, chosen in prepared.chosen.items():
        for features in prepared.inputs["mm_encoder_outputs"][modality].pooler_output:
            looked.after["erank"] += erank(features[None]).tolist()
        pairs += list(zip(chosen.candidates, chosen.selections, strict=True))
    # Before: what the pruner chose from, one group for each size of image or frame.
    for among, selection in pairs:
        tokens = among.tokens
        looked.before["erank"] += erank(tokens.finite("projected")).tolist()
        for report in method_of(arm.spec.pruner).reports:
            told = report.measure(arm.pruned.pruner, tokens, selection)
            if told is not None:
                looked.reports.setdefault(report.name, []).extend(told.float().tolist())
        if "cls_attention" not in tokens.signals:
            continue
        attention = tokens.finite("cls_attention")
        looked.before["attention_entropy"] += attention_entropy(attention).tolist()
        # One item at a time: each keeps other positions, and some methods another number of them.
        for item in range(len(attention)):
            kept = attention[item : item + 1, :, selection.of(item)]
            looked.after["attention_entropy"] += attention_entropy(kept).tolist()


def _log_likelihoods(arm: Arm, formatter: Formatter, samples: list[Sample]) -> list[float | None]:
    """Return the mean log-likelihood of each sample's answer tokens; None where the limit left none."""
    prepared = arm.pruned.prepare(arm.place(formatter.training_batch(samples)))
    inputs = dict(prepared.inputs)
    labels = inputs.pop("labels")[:, 1:]  # (B, L - 1)
    logits = arm.pruned.run(prepared, inputs).logits[:, :-1]  # (B, L - 1, V)
    told = labels != IGNORE_INDEX
    values: list[float | None] = []
    # Row by row and of supervised positions alone: a row's logits are wide enough in float32.
    for row in range(len(labels)):
        positions = told[row]
        if not bool(positions.any()):
            values.append(None)
            continue
        loss = functional.cross_entropy(logits[row, positions].float(), labels[row, positions])
        values.append(-float(loss))
    return values


def _batches(count: int, size: int, what: str) -> Iterator[range]:
    """Yield the indices of each batch, behind a progress bar."""
    starts = range(0, count, size)
    for start in tqdm(starts, desc=f"calibrate: {what}", unit="batch", dynamic_ncols=True):
        yield range(start, min(start + size, count))


def _question(sample: Sample) -> Sample:
    """Return a sample whose last answer is left open, as a prompt has it."""
    last = sample.turns[-1]
    return Sample(sample.id, sample.source, sample.image, (*sample.turns[:-1], Turn(last.question, None)))


def _spreads(values: Values) -> dict[str, Spread]:
    """Return the spread of every measure that was taken: towers without [CLS] have no attention entropy."""
    spreads = {}
    for name, measured in values.items():
        if measured:
            spreads[name] = Spread.of(measured)
    return spreads


# ---- data -------------------------------------------------------------------------------------------------------


def _recipe_slice(config: RecalibrateConfig, count: int) -> Slice:
    """Return what a recipe holds out, or of one that holds out nothing, ``count`` samples drawn from all.

    Raises:
        DataError: for data that can't be read, or without images.
    """
    options = config.data.model_dump(exclude={"recipe"})
    options["max_samples"] = None  # what is trained on may be a subset; the draw is from the whole recipe
    data = load_recipe(config.data.recipe, **options)
    rows, part = data.rows, "drawn from all"
    if data.held_out is not None and len(data.held_out):
        rows, part = data.held_out, "held out"
    indices = [index for index, image in enumerate(rows["image"]) if image is not None]
    if not indices:
        raise DataError(f"recipe {data.name!r} has no sample with a picture to calibrate on")
    samples = [Sample.from_row(rows[index]) for index in _drawn(indices, count, config.data)]
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.id, sample.source, sample.image, sample.turns)).encode())
    about = ProfiledData(
        source="recipe",
        name=data.name,
        part=part,
        samples=len(samples),
        hash=digest.hexdigest(),
        video=_sampling(data.images, samples),
    )
    return Slice(samples, data.images, about, config.train.max_length)


def _sampling(images: ImageOpener, samples: list[Sample]) -> VideoSampling | None:
    """Return which frames a recipe looks at; None if no sample is about a video."""
    if not any(str(sample.image).startswith(VIDEO) for sample in samples):
        return None
    return getattr(images, "sampling", None)


def _drawn(indices: list[int], count: int, config: DataConfig) -> list[int]:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(config.seed or 0))
    return [indices[position] for position in order[:count].tolist()]


def _task_slice(config: EvaluateConfig, count: int) -> Slice:
    """Return the items of drawn images of a benchmark, at least ``count`` if there are as many.

    Raises:
        TaskError: for an adapter, several benchmarks at once, hidden answers, or files that are missing.
    """
    if config.adapter is not None:
        raise TaskError(
            f"calibrate measures the checkpoint's own projector, not the one in {config.adapter}: both arms of a "
            "comparison run with what is fitted; leave `adapter` out"
        )
    if len(config.tasks) > 1:
        raise TaskError(f"calibrate measures on one benchmark, and tasks names {', '.join(config.tasks)}; name one")
    task = get_task(config.tasks[0])
    if task.hidden:
        raise TaskError(f"the answers of {task.name} are hidden; calibrate on another benchmark or on a recipe")
    questions = task.open(task_folder(config.data, task.name))
    items = _of_drawn_images([item for item in questions.items if item.image is not None], count)
    if not items:
        raise TaskError(f"{task.name} has no item with an image to calibrate on")
    samples = []
    for item in items:
        samples.append(Sample(item.id, item.source, item.image, (Turn(item.question, None),)))
    kind: Literal["task"] = "task"
    about = ProfiledData(
        source=kind,
        name=task.name,
        part="items of drawn videos" if task.video else "items of drawn images",
        samples=len(items),
        hash=items_hash(items),
        video=config.video if task.video else None,
    )
    images = sampled(limited(questions.open_images(), config.max_pixels), config.video)
    return Slice(samples, images, about, task=task, items=items, max_new_tokens=config.max_new_tokens)


def _of_drawn_images(items: list[Item], count: int) -> list[Item]:
    """Return the items of images drawn until there are ``count`` items, in the order of the benchmark."""
    numbers = Counter(str(item.image) for item in items)
    names = list(numbers)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    drawn: set[str] = set()
    total = 0
    for position in order:
        if total >= count:
            break
        drawn.add(names[position])
        total += numbers[names[position]]
    return [item for item in items if str(item.image) in drawn]


# ---- the profile ------------------------------------------------------------------------------------------------


def _profile(
    config: RecalibrateConfig | EvaluateConfig,
    arm: Arm,
    data: Slice,
    fitted: dict[str, Any],
    evidence: dict[str, list[Measured]],
    reports: Values,
) -> Profile:
    base = arm.base
    pruning = config.pruning.model_dump(exclude={"profile"})
    pruning["text_tower"] = portable(pruning["text_tower"])
    scored = any(row.score is not None for rows in evidence.values() for row in rows)
    return Profile(
        pruner=config.pruning.pruner,
        options=fitted,
        pruning=pruning,
        model=ProfiledModel(
            path=str(portable(config.model.path)),
            revision=config.model.revision,
            dtype=config.model.dtype,
            quantization=config.model.quantization,
            frozen_hash=base.hashes.frozen_hash,
            original_projector_hash=base.hashes.original_projector_hash,
            projectors=list(base.hashes.projectors),
            settings_hash=base.settings_hash,
            text_tower_hash=arm.text_tower_hash,
        ),
        data=data.about,
        measure=data.measure if scored else None,
        evidence=evidence,
        reports={name: statistics.fmean(values) for name, values in reports.items()},
        prunetune=code_record(),
        plugins=plugin_records(),
    )
