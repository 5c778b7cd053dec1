"""What a recalibration will cost, before anything is loaded: tokens, FLOP, memory, the largest budget, and time."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.models.blueprint import model_without_weights
from prunetune.models.profile import resolved
from prunetune.models.record import told_pruning
from prunetune.pruning.families import name_projector
from prunetune.train.deepspeed_settings import zero_stage
from prunetune.train.elastic import settings_of, told
from prunetune.train.flops import Flops, Work, flops_of, forward_of, sequence
from prunetune.train.gpus import GPUS, Gpu
from prunetune.train.memory import GIB, MemoryNeeds, memory_needs
from prunetune.train.sampling import samples_per_step, steps_in_total
from prunetune.train.shape import ModelShape, shape_of
from prunetune.train.workload import PADDED, Workload, prefix_of, workload_of

MFU = 0.45
"""Assumed share of the peak."""
FLOAT8_GAIN = 1.6
"""Assumed speed of frozen linear layers in float8, against bfloat16; their peak is twice as high."""


@dataclass(frozen=True)
class Plan:
    """What a recalibration will cost.

    Attributes:
        config: the recalibration's.
        shape: of the model.
        load: samples and tokens of an epoch.
        work: of the whole run as it is configured, with padding and without what is computed once.
        cost: FLOP of the whole run.
        needs: memory of one device.
        gpu: which.
        gpus: how many.
        mfu: the assumed share of their peak.
        steps: optimizer steps.
        checkpointing: whether activations are recomputed.
        assumptions: what is not known but assumed, a sentence each.
    """

    config: RecalibrateConfig
    shape: ModelShape
    load: Workload
    work: Work
    cost: Flops
    needs: MemoryNeeds
    gpu: Gpu
    gpus: int
    mfu: float
    steps: int
    checkpointing: bool
    assumptions: list[str]

    @property
    def seconds(self) -> float:
        """Predicted time of the steps on all GPUs together; start, checkpoints and the data are not in it."""
        return predicted_seconds(self.cost, self.gpu.bfloat16 * 1e12, self.mfu, self.config.engine.float8) / self.gpus

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the largest micro-batch."""
        return tokens_at_once(self.config, self.load)

    def to_json(self) -> str:
        """Return everything as JSON."""
        values = {
            "model": self.config.model.path,
            "pruner": self.config.pruning.pruner,
            "keep": self.config.pruning.keep,
            "recipe": self.config.data.recipe,
            "gpu": self.gpu.name,
            "gpus": self.gpus,
            "mfu": self.mfu,
            "steps": self.steps,
            "samples": self.load.samples,
            "tokens_per_sample": round(self.load.tokens, 1),
            "longest_sample": self.load.longest,
            "sources": [{**asdict(source), "tokens": round(source.tokens, 1)} for source in self.load.sources],
            "flop": {**self.cost.parts(), "model": self.cost.model, "total": self.cost.total},
            "tokens_per_micro_batch": self.tokens_at_once,
            "checkpointing": self.checkpointing,
            "memory_bytes": self.needs.parts(self.tokens_at_once, self.checkpointing),
            "largest_token_budget": {name: budgets(self.needs, gpu) for name, gpu in GPUS.items()},
            "predicted_seconds": round(self.seconds, 1),
            "predicted_gpu_hours": round(self.seconds * self.gpus / 3600, 3),
            "assumptions": self.assumptions,
        }
        return json.dumps(values, indent=2) + "\n"

    def to_text(self) -> str:
        """Return tables for the screen."""
        return "\n\n".join([self._sources(), self._cost(), self._memory(), self._budgets(), self._end()])

    def in_a_line(self) -> str:
        """Return the cost as the headers of shipped configurations have it."""
        tokens = f"{self.load.samples:,} samples x {self.load.tokens:,.0f} tokens"
        checkpointing = ", checkpointing" if self.checkpointing else ""
        return (
            f"{duration(self.seconds)} on {self.gpus} {self.gpu.name.upper()} ({self.seconds * self.gpus / 3600:.1f} "
            f"GPU-hours): {tokens}, {self.cost.total:.2g} FLOP at an assumed MFU of {self.mfu:.0%}{checkpointing}"
        )

    def _sources(self) -> str:
        header = ["source", "samples", "with image", "text tokens", "visual, kept", "tokens after pruning"]
        rows = [
            [s.name, f"{s.samples:,}", f"{s.images:,}", f"{s.text:.0f}", f"{s.visual:.0f}", f"{s.tokens:.0f}"]
            for s in self.load.sources
        ]
        rows.append(["all", f"{self.load.samples:,}", "", "", "", f"{self.load.tokens:.0f}"])
        settings = settings_of(self.config.pruning, self.config.elastic)
        one = told_pruning(self.config.pruning.model_dump())
        if not self.config.pruning.stages:
            one = f"{self.config.pruning.pruner} at {self.config.pruning.keep}"
        title = f"{self.config.model.path}, {told(settings) if settings else one}"
        if self.load.inside:
            layers = self.load.inside
            title += (
                f"\nvisual tokens of an image: {layers[0]:.0f} enter the LLM, {sum(layers) / len(layers):.1f} a layer, "
                f"{layers[-1]:.0f} in the last"
            )
        return f"{title}\n\n{columns(header, rows)}"

    def _cost(self) -> str:
        rows = []
        for name, value in self.cost.parts().items():
            rows.append([name, f"{value:.3g}", f"{value / self.cost.total:.1%}"])
        rows.append(["all", f"{self.cost.total:.3g}", "100.0%"])
        return columns(["FLOP of the run", "", "share"], rows)

    def _memory(self) -> str:
        parts = self.needs.parts(self.tokens_at_once, self.checkpointing)
        rows = [[name, f"{value / GIB:.2f}"] for name, value in parts.items()]
        total = sum(parts.values())
        rows.append(["all", f"{total / GIB:.2f} of {self.gpu.gib} on {self.gpu.name}"])
        return columns([f"memory at {self.tokens_at_once:,} tokens a micro-batch", "GiB"], rows)

    def _budgets(self) -> str:
        rows = []
        for name, gpu in GPUS.items():
            plain, again = budgets(self.needs, gpu).values()
            rows.append([name, f"{gpu.gib}", f"{plain:,}" if plain else "-", f"{again:,}" if again else "-"])
        return columns(["GPU", "GiB", "largest token budget", "with checkpointing"], rows)

    def _end(self) -> str:
        lines = [f"predicted: {self.in_a_line()}, {self.steps:,} steps; planned, not measured"]
        if not self.needs.fits(self.tokens_at_once, self.gpu.memory, self.checkpointing):
            largest = self.needs.largest_token_budget(self.gpu.memory, self.checkpointing)
            advice = f"set engine.token_budget to at most {largest:,}" if largest else "no budget does"
            lines.append(f"this does not fit a {self.gpu.name} ({self.gpu.gib} GiB): {advice}")
        lines += [f"assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)


def make_plan(
    config: RecalibrateConfig,
    gpu: Gpu,
    gpus: int = 8,
    mfu: float = MFU,
    load: Workload | None = None,
    model: PreTrainedModel | None = None,
) -> Plan:
    """Return what a recalibration will cost on some GPUs; no weight is read.

    Args:
        config: the recalibration's.
        gpu: which kind.
        gpus: how many.
        mfu: assumed share of their peak.
        load: what there is to process; None reads the data, or assumes what it can where that is not there.
        model: the stock model, of which sizes alone are read; None makes it of its configuration.

    Raises:
        CheckpointError: without the model's configuration.
        ConfigError: for a token budget smaller than one sample, or data that is not there and can't be assumed.
        DataError, PruningError: for data or a budget that can't work.
    """
    config = config.model_copy(update={"pruning": resolved(config.pruning)})
    if model is None:
        model = model_without_weights(config.model.path, config.model.revision)
    if config.model.projector is not None:
        name_projector(model, config.model.projector)
    shape = shape_of(model)
    if load is None:
        load = workload_of(config, model)
    check_budget_of_samples(config, load)
    steps = steps_in_total(config.train, load.samples, gpus)
    needs = needs_of(config, shape, load, gpus)
    at_once = tokens_at_once(config, load)
    checkpointing = config.engine.checkpointing
    if checkpointing == "auto":
        checkpointing = needs.needs_checkpointing(at_once, gpu.memory)
    share = steps * samples_per_step(config.train, gpus) / load.samples
    if config.train.max_steps < 0:  # else steps go on over the end of an epoch
        share = min(share, config.train.epochs)
    work = as_computed(config, load).times(share)
    cost = flops_of(shape, work, bool(checkpointing), config.engine.stop_tower)
    if config.objective.asks_dense_model:
        cost = replace(cost, teacher=forward_of(shape, taught(load).times(share)))
    assumptions = [*load.assumptions, f"MFU {mfu:.0%} of {gpu.bfloat16} TFLOP/s, data in time, no time for the ranks"]
    if config.engine.float8:
        assumptions.append(f"frozen linear layers {FLOAT8_GAIN} times as fast in float8")
    return Plan(config, shape, load, work, cost, needs, gpu, gpus, mfu, steps, bool(checkpointing), assumptions)


def prediction(
    config: RecalibrateConfig, model: PreTrainedModel, load: Workload, ranks: int, gpu: Gpu | None, steps: int
) -> float | None:
    """Return the seconds that so many steps of a run are predicted to take, to be held against those that they took.

    Args:
        config: the recalibration's.
        model: the stock model.
        load: what there is to process.
        ranks: devices.
        gpu: which, see :func:`prunetune.train.gpus.gpu_of_device`; None, as on a CPU, is predicted nothing for.
        steps: optimizer steps, which a resumed run has fewer of.

    Raises:
        ConfigError: for a token budget smaller than one sample.
    """
    if gpu is None:
        return None
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps})})
    return make_plan(config, gpu, ranks, load=load, model=model).seconds


def predicted_seconds(cost: Flops, peak: float, mfu: float = MFU, float8: bool = False) -> float:
    """Return the seconds that some FLOP take on one device.

    Args:
        cost: of everything that is computed.
        peak: dense peak of the device in FLOP/s, in the model's dtype.
        mfu: share of it that is reached.
        float8: whether the LLM's frozen layers run in float8.
    """
    frozen = cost.llm + cost.recomputed
    rest = cost.total - frozen
    return (frozen / (FLOAT8_GAIN if float8 else 1) + rest) / (peak * mfu)


def needs_of(config: RecalibrateConfig, shape: ModelShape, load: Workload, ranks: int) -> MemoryNeeds:
    """Return the memory that one of ``ranks`` devices needs for a configuration.

    Raises:
        ConfigError: for a DeepSpeed JSON that can't be used.
    """
    engine = config.engine
    tokens = load.tokens * load.samples
    projected = load.work.projected if engine.project_kept else _all_visual(load)
    items = load.work.patches / max(load.visual.patches, 1) if config.features is None else 0
    logits = load.work.logits / tokens if engine.supervised_logits else 1.0
    return memory_needs(
        shape,
        config.model.dtype,
        quantization=config.model.quantization,
        float8=engine.float8,
        stage=zero_stage(config.train.deepspeed),
        ranks=ranks,
        visual_share=projected / tokens,
        item_share=items / tokens,
        patches=load.visual.patches,
        logit_share=logits,
        supervised_logits=engine.supervised_logits,
    )


def as_computed(config: RecalibrateConfig, load: Workload) -> Work:
    """Return the work of one epoch as the engine's switches lay it out: padding, the prefix, logits, the projector."""
    engine, work = config.engine, load.work
    tokens, pairs = work.tokens, work.pairs
    # Also "auto": what it can't pack is laid out by the budget, nearly without padding. Stages need rows of their own.
    if engine.packing and not load.inside:
        prefix = prefix_of(config.model.template) if engine.shared_prefix else 0
        # Its keys and values are there; what comes behind still sees them.
        pairs -= load.samples * prefix * (prefix + 1) / 2
        tokens -= load.samples * prefix
    else:
        padded = PADDED["length"] if engine.token_budget is not None else PADDED[config.train.sampling]
        tokens, pairs = tokens * padded, pairs * padded**2
    projected = work.projected if engine.project_kept else _all_visual(load)
    logits = work.logits if engine.supervised_logits else tokens
    if config.features is not None:  # the tower ran before, for the cache
        return Work(tokens, pairs, logits, projected)
    return Work(tokens, pairs, logits, projected, work.patches, work.patch_pairs)


def taught(load: Workload) -> Work:
    """Return the work of one epoch for the LLM of a teacher, which sees all visual tokens."""
    dropped = (_all_visual(load) - load.work.projected) / load.samples
    length = load.tokens + dropped
    return replace(sequence(length).times(load.samples), logits=load.work.logits)


def check_budget_of_samples(config: RecalibrateConfig, load: Workload) -> None:
    """Check that every sample fits the token budget.

    Raises:
        ConfigError: if one does not.
    """
    budget = config.engine.token_budget
    if budget is not None and budget < load.longest:
        what = "the longest sample" if load.measured else "a sample"
        raise ConfigError(
            f"engine.token_budget {budget} is smaller than one sample: {what} of recipe {config.data.recipe!r} has "
            f"{load.longest:,} tokens after pruning; set it to at least that"
        )


def budgets(needs: MemoryNeeds, gpu: Gpu) -> dict[str, int]:
    """Return the largest token budgets on a GPU, without and with gradient checkpointing; 0 where nothing fits."""
    return {
        "plain": needs.largest_token_budget(gpu.memory),
        "checkpointing": needs.largest_token_budget(gpu.memory, checkpointing=True),
    }


def tokens_at_once(config: RecalibrateConfig, load: Workload) -> int:
    """Return the tokens of the largest micro-batch; without a token budget, as the average sample makes it."""
    whole_step = math.ceil(config.train.batch_size * config.train.accumulation * load.tokens)
    if config.engine.token_budget is not None:
        return max(min(config.engine.token_budget, whole_step), load.longest)
    padded = 1.0 if config.engine.packing and not load.inside else PADDED[config.train.sampling]
    return math.ceil(config.train.batch_size * load.tokens * padded)


def duration(seconds: float) -> str:
    """Return a time for people: "41 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def columns(header: list[str], rows: list[list[Any]]) -> str:
    """Return a table for the screen: names to the left, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(str(row[place])) for row in table) for place in range(len(header))]
    lines = []
    for row in table:
        cells = [str(row[0]).ljust(widths[0])]
        cells += [str(cell).rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _all_visual(load: Workload) -> float:
    """Return the visual tokens of an epoch before pruning."""
    images = load.work.patches / max(load.visual.patches * load.visual.items, 1)
    return load.visual.tokens * load.visual.items * images
