"""A learning rate for a run, from a short sweep: the rate rises exponentially, and the loss says where it is too high.

One process trains a copy of the projector on the run's own batches; nothing of the run is touched. After Smith,
"Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import set_seed

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import Formatter, RecipeData, load_recipe
from prunetune.models.features import FeatureFormatter
from prunetune.outputs import RATE, OutputFolder, write_bytes, write_text
from prunetune.screen import SCREEN
from prunetune.train.elastic import Draws
from prunetune.train.engine.layout import Share, StepSampler
from prunetune.train.engine.lengths import lengths_of_settings
from prunetune.train.float8 import use_float8
from prunetune.train.freeze import freeze_all_but_projector, wrapped
from prunetune.train.held_out import split, supervised_tokens
from prunetune.train.objectives.aim import scales_of
from prunetune.train.objectives.start import aim_of, check_objective
from prunetune.train.parts import arm_of, draws_of, formatter_of, recompute
from prunetune.train.sampling import ShuffledSampler, samples_per_step
from prunetune.train.start_from import Start
from prunetune.train.trainer import training_batch

SMOOTHING = 0.9
"""Share of the past in the smoothed loss."""
DIVERGED = 4.0
"""Times the lowest smoothed loss at which the sweep ends."""
NUMBERS, PLOT = "lr_finder.json", "lr_finder.png"


@dataclass(frozen=True)
class Point:
    """One update of a sweep.

    Attributes:
        rate: its learning rate.
        loss: of its batch, before the update.
        smoothed: mean of the losses so far, the recent ones weighing most.
    """

    rate: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        points: one per update, the one that diverged left out.
        diverged: the rate at which it ended early; None if it reached the highest.
    """

    points: tuple[Point, ...]
    diverged: float | None

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls fastest over the rate's logarithm; None if it never falls."""
        losses = [point.smoothed for point in self.points]
        slopes = [after - before for before, after in zip(losses[:-2], losses[2:], strict=True)]
        # The first means are of few losses, and jump: a tenth of the usual hundred says nothing of a slope.
        first = min(round(1 / (1 - SMOOTHING)), len(slopes) // 4)
        slopes = slopes[first:]
        if not slopes or min(slopes) >= 0:
            return None
        return self.points[first + slopes.index(min(slopes)) + 1].rate

    @property
    def valley(self) -> float | None:
        """The middle of the longest falling sequence of smoothed losses; None if it never falls.

        A sequence may leave points out, so that single bad batches do not end it.
        """
        sequence = longest_fall([point.smoothed for point in self.points])
        if len(sequence) < 2:
            return None
        first, last = self.points[sequence[0]].rate, self.points[sequence[-1]].rate
        return math.sqrt(first * last)

    @property
    def lowest(self) -> float:
        """The rate of the lowest smoothed loss: above what to train with, as the next updates would diverge."""
        return min(self.points, key=lambda point: point.smoothed).rate


def longest_fall(values: Sequence[float]) -> list[int]:
    """Return the positions of the longest subsequence that falls; of two as long, of the one that ends first.

    Of ``[5, 6, 4, 1, 3, 2]`` it is ``[0, 2, 4, 5]``: 5, 4, 3, 2.
    """
    if not values:
        return []
    length, before = [1] * len(values), [-1] * len(values)
    for end, value in enumerate(values):
        for start in range(end):
            if values[start] > value and length[start] + 1 > length[end]:
                length[end], before[end] = length[start] + 1, start
    position = length.index(max(length))
    sequence = []
    while position >= 0:
        sequence.append(position)
        position = before[position]
    return sequence[::-1]


def sweep(step: Callable[[float], float], rates: Sequence[float]) -> Sweep:
    """Take one update at each rate, until the loss is not finite or four times the lowest.

    Args:
        step: takes an update at a rate, and returns the loss of its batch before it.
        rates: in rising order.
    """
    points: list[Point] = []
    running, lowest = 0.0, math.inf
    for number, rate in enumerate(rates):
        loss = step(rate)
        running = SMOOTHING * running + (1 - SMOOTHING) * loss
        smoothed = running / (1 - SMOOTHING ** (number + 1))  # the past begins with nothing, not with a loss of 0
        if not math.isfinite(smoothed) or smoothed > DIVERGED * lowest:
            return Sweep(tuple(points), rate)
        lowest = min(lowest, smoothed)
        points.append(Point(rate, loss, smoothed))
    return Sweep(tuple(points), None)


def exponential(lowest: float, highest: float, steps: int) -> list[float]:
    """Return rates from the lowest to the highest, each the same factor above the one before."""
    return [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]


class Update:
    """Takes updates of the projector at any rate, as the run would: AdamW on float32 weights, gradients clipped.

    Args:
        model: whose parameters that need a gradient are trained.
        batches: yields the micro-batches of an update.
        summed_loss: see :data:`prunetune.train.held_out.SummedLoss`.
        config: of the run; read are weight decay, clipping and the kind of loss.
        units: counts the units of a micro-batch, given whether it is the first of its update.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterator[list[dict[str, Any]]],
        summed_loss: Callable[[Mapping[str, Any]], Tensor],
        config: RecalibrateConfig,
        units: Callable[[Mapping[str, Any], bool], Mapping[str, int]] | None = None,
    ) -> None:
        self.units = units or (lambda batch, first: {"answers": supervised_tokens(batch)[0]})
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A small step is less than half the distance between two bfloat16 numbers: DeepSpeed trains float32 copies too.
        self.masters = [parameter.detach().float().clone() for parameter in self.own]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, weight_decay=config.train.weight_decay)
        self.batches, self.summed_loss = batches, summed_loss
        self.max_norm, self.loss = config.train.max_grad_norm, config.train.loss

    def __call__(self, rate: float) -> float:
        """Take one update, and return its loss."""
        micro_batches = next(self.batches)
        total = 0.0
        units = [self.units(batch, number == 0) for number, batch in enumerate(micro_batches)]
        weights, numbers = scales_of(units, self.loss)
        for batch, own in zip(micro_batches, weights, strict=True):
            if not any(own):
                continue
            sums = self.summed_loss(batch).reshape(-1)
            scales = [weight / max(number, 1) for weight, number in zip(own, numbers, strict=True)]
            loss = (sums * torch.tensor(scales).to(sums)).sum()
            loss.backward()
            total += float(loss.detach())
        for master, parameter in zip(self.masters, self.own, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_(self.masters, self.max_norm)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.own, strict=True):
                parameter.copy_(master)
        return total


def updates(
    data: RecipeData,
    formatter: Formatter | FeatureFormatter,
    share: Share,
    lengths: Sequence[Sequence[int]] | None,
    seed: int,
    draws: Draws | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the micro-batches of one update after another, over all devices of the run, for ever.

    Args:
        data: the samples.
        formatter: what turns them into batches.
        share: how an update is laid out, on one device.
        lengths: for each setting tokens of every sample, where it is laid out by a budget.
        seed: of the order.
        draws: says which setting each sample has, in a run over several.
    """
    epoch = 0
    order = ShuffledSampler(len(data), seed)
    order.epoch = lambda: epoch
    while True:
        for batches in StepSampler(order, share, lengths, draws):
            built = []
            for batch in batches:
                built.append(training_batch(formatter, [data[index] for index in batch.indices], batch))
            yield built
        epoch += 1


def to_json(found: Sweep, config: RecalibrateConfig, data: RecipeData) -> str:
    """Return what is written: the suggestions, what they are of, and every update."""
    values = {
        "suggested": found.valley,
        "steepest": found.steepest,
        "valley": found.valley,
        "lowest_loss_at": found.lowest,
        "diverged_at": found.diverged,
        "configured": config.train.learning_rate,
        "recipe": data.name,
        "data_hash": data.content_hash,
        "samples_per_update": samples_per_step(config.train, config.devices or 1),
        "seed": config.train.seed,
        "updates": [asdict(point) for point in found.points],
    }
    return json.dumps(values, indent=1) + "\n"


def plot(found: Sweep, path: Path, configured: float) -> None:
    """Draw loss over rate, with the suggestions and the configured rate as lines."""
    import matplotlib  # takes a second, and nothing else of training draws

    matplotlib.use("Agg")  # a server has no display, and the default backend would look for one
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130)
    rates = [point.rate for point in found.points]
    axes.plot(rates, [point.loss for point in found.points], color="lightgrey", linewidth=1, label="of each batch")
    axes.plot(rates, [point.smoothed for point in found.points], color="black", linewidth=1.6, label="smoothed")
    marked = {"valley": (found.valley, "tab:blue"), "steepest": (found.steepest, "tab:orange")}
    marked["configured"] = (configured, "tab:green")
    for name, (rate, color) in marked.items():
        if rate is not None:
            axes.axvline(rate, color=color, linestyle="--", linewidth=1, label=f"{name} {rate:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)  # pyplot keeps every figure that is not closed
    write_bytes(path, drawn.getvalue())


def find_rate(config: RecalibrateConfig, folder: Path, lowest: float, highest: float, steps: int) -> Sweep:
    """Sweep the rate over a run's own updates, and write ``lr_finder.json`` and ``lr_finder.png``.

    Args:
        config: of the run; its learning rate, schedule and output are not used.
        folder: where the two files are written.
        lowest: the first rate.
        highest: the last one, if the loss does not diverge before.
        steps: updates in all, at least 3.

    Raises:
        ConfigError, PruningError, DataError: for options or data that can't work.
        FloatingPointError: if the loss is no number at the lowest rate.
    """
    with OutputFolder(folder, RATE, config.overwrite, reads=(config.model.path,)):
        found, data = _swept(config, exponential(lowest, highest, steps))
        write_text(folder / NUMBERS, to_json(found, config, data))
        plot(found, folder / PLOT, config.train.learning_rate)
    return found


def _swept(config: RecalibrateConfig, rates: Sequence[float]) -> tuple[Sweep, RecipeData]:
    set_seed(config.train.seed)
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    if config.train.held_out:
        data, _ = split(data, config.train.held_out, config.data.seed or 0)
    if config.model.dtype == "float16":
        raise ConfigError("find-rate scales no float16 loss; sweep with --model.dtype bfloat16 or float32")
    arm = arm_of(config)
    formatter = formatter_of(config, arm, data)
    check_objective(config)
    aim = aim_of(config, arm, formatter, data)
    engine = aim.engine
    peft_model = wrapped(arm.model, config.train)
    freeze_all_but_projector(peft_model)
    begins = Start.of(config.train.start_from)
    if begins is not None:
        begins.load(peft_model, arm.base.hashes)
    if aim.anchor is not None:
        aim.anchor.hold(peft_model)
    if config.engine.float8:
        use_float8(arm.model, device=arm.device)
    if config.engine.checkpointing is True:
        recompute(arm)
    train, budget = config.train, config.engine.token_budget
    devices = config.devices or 1
    share = Share(0, 1, train.batch_size, train.accumulation * devices, budget, padded=not engine.choice.packing)
    lengths = None if budget is None else lengths_of_settings(data, formatter, arm.pruned, train.max_length)

    def summed_loss(batch: Mapping[str, Any]) -> Tensor:
        found = aim.losses(peft_model, arm.place(batch, formatter.finish)).units
        return torch.stack([found[unit] for unit in aim.objective.units])

    arm.model.train()
    with aim.attached(arm.device):
        batches = updates(data, formatter, share, lengths, train.seed, draws_of(config))
        step = Update(peft_model, batches, summed_loss, config, aim.units)
        found = sweep(counted(step, len(rates)), rates)
    if not found.points:
        raise FloatingPointError(
            f"the loss is no number at the lowest rate, {rates[0]:g}; use bfloat16 or float32, or see whether the "
            "base's own answers are sound"
        )
    return found, data


def counted(step: Callable[[float], float], steps: int) -> Callable[[float], float]:
    """Return the same step, which draws a progress bar."""
    bar = tqdm(total=steps, desc="find-rate", unit="step", dynamic_ncols=True, mininterval=1.0, file=SCREEN)

    def shown(rate: float) -> float:
        loss = step(rate)
        bar.update(1)
        bar.set_postfix_str(f"rate {rate:.1e}, loss {loss:.3f}")
        return loss

    return shown


def lines(found: Sweep, configured: float) -> list[str]:
    """Return what was found, for people."""
    end = "at the highest rate" if found.diverged is None else f"as the loss diverged at {found.diverged:.1e}"
    said = [f"{len(found.points)} updates, ended {end}; lowest loss at {found.lowest:.1e}"]
    if found.valley is None or found.steepest is None:
        return [*said, "the loss never falls: nothing is suggested; try lower rates, or more steps"]
    said.append(f"valley {found.valley:.1e}, steepest {found.steepest:.1e}, configured {configured:.1e}")
    return [*said, f"to use it: --train.learning_rate {found.valley:.1e}"]
