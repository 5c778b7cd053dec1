"""The dial: the held-out loss of every projector between the base's and a tuned one, pruned and with all tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.configs import RecalibrateConfig, load_config
from prunetune.data_recipes import DataError, RecipeData, load_recipe
from prunetune.models import Arm, load, read_record, write_adapter
from prunetune.models.adapter import projector_state, read_projector
from prunetune.models.derived import at_strength, dialled_record, original_projector, put_projector
from prunetune.models.dial import write_dial
from prunetune.models.errors import CheckpointError
from prunetune.models.ranks import Ranks
from prunetune.models.record import adapter_folder, portable
from prunetune.models.stored import BaseHashes
from prunetune.outputs import DIAL, OutputFolder, write_bytes
from prunetune.pruning import PruningSpec
from prunetune.pruning.sequence import IGNORE_INDEX
from prunetune.train.held_out import HeldOutLoss, split

PLOT = "dial.png"


@dataclass(frozen=True)
class Point:
    """The held-out losses at one strength, per supervised token.

    Attributes:
        strength: 0 is the base's projector, 1 the tuned one.
        pruned: at the adapter's pruning.
        dense: with all visual tokens.
    """

    strength: float
    pruned: float
    dense: float


@dataclass(frozen=True)
class Slice:
    """What a dial is measured on.

    Attributes:
        data: the samples.
        max_length: longest sequence in tokens, as in training.
    """

    data: RecipeData
    max_length: int


def chosen(points: Sequence[Point], dense_within: float | None) -> Point:
    """Return the point of the lowest pruned loss; of equal ones the nearest to the base.

    Args:
        points: among them that of strength 0, the base's.
        dense_within: how much above the base's its dense loss may be; None is any.
    """
    base = next(point for point in points if point.strength == 0)
    allowed = [point for point in points if dense_within is None or point.dense <= base.dense + dense_within]
    if dense_within is not None and not allowed:
        allowed = [base]  # a negative allowance
    return min(allowed, key=lambda point: (point.pruned, abs(point.strength)))


def own_slice(adapter: Path, samples: int | None) -> Slice:
    """Return what the run that wrote an adapter did not train on, by the configuration beside it.

    Args:
        adapter: the folder.
        samples: how many to measure on; None is as many as the run did, or else all that the recipe holds out.

    Raises:
        DataError: if nothing was held out, or the data is not what was trained on.
        CheckpointError: if there is no configuration.
    """
    file = adapter.parent / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{file} is not there, so nothing says what {adapter} was not trained on; give --recipe")
    config = load_config(RecalibrateConfig, str(file), [])
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    own = data.held_out is not None and len(data.held_out)
    if not own and not config.train.held_out:
        raise DataError(
            f"{adapter} was trained on all samples of recipe {data.name!r}: none is left to choose a strength by; give "
            "another --recipe, or train with train.held_out"
        )
    number = config.train.held_out or samples or (len(data.held_out) if data.held_out is not None else 0)
    trained, held = split(data, number, config.data.seed or 0)
    expected = (read_record(adapter).get("data") or {}).get("hash")
    if expected != trained.content_hash:
        raise DataError(
            f"recipe {data.name!r} has other samples now than {adapter} was trained on, so what it did not see is not "
            "known; give the data back, or another --recipe"
        )
    if samples is not None and samples < len(held):
        held = split(held, samples, 0)[1]
    return Slice(held, config.train.max_length)


def given_slice(adapter: Path, recipe: str, file: str | None, image_root: str | None, samples: int | None) -> Slice:
    """Return what a recipe holds out, or all of one that holds nothing out.

    Raises:
        DataError: if it is what the adapter was trained on.
    """
    data = load_recipe(recipe, file=file, image_root=image_root)
    record = read_record(adapter)
    if data.held_out is not None and len(data.held_out):
        data = split(data, samples or len(data.held_out), 0)[1]
    elif data.content_hash == (record.get("data") or {}).get("hash"):
        raise DataError(f"{adapter} was trained on recipe {data.name!r}, which can't choose a strength; give another")
    elif samples is not None and samples < len(data):
        data = load_recipe(recipe, file=file, image_root=image_root, max_samples=samples)
    return Slice(data, (record.get("train") or {}).get("max_length", 2048))


class Dial:
    """An adapter's arm whose projector can be set to any strength.

    Args:
        adapter: the folder.
        base: folder or hub id of the base; None is the one that the record names.
        device: None is the GPU of this process, or the CPU where there is none.

    Attributes:
        arm: with the adapter's pruning; its projector is set by :meth:`turn`.
        record: the adapter's.

    Raises:
        CheckpointError, PruningError: as :func:`prunetune.load` does.
    """

    def __init__(self, adapter: Path, base: str | None = None, device: str | None = None) -> None:
        self.adapter = adapter
        self.arm = load(adapter, base, device)
        self.record, self._tuned = read_projector(adapter, projector_state(self.arm.model))
        self._original = original_projector(self.arm.base)
        self._dense = self.arm.with_pruning(PruningSpec())

    def at(self, strength: float) -> dict[str, Tensor]:
        """Return the projector at a strength in float32."""
        return at_strength(self._original, self._tuned, strength)

    def measure(self, held: Slice, strengths: Sequence[float], size: int) -> list[Point]:
        """Return the losses at each strength.

        Args:
            held: what to measure on.
            strengths: in the order of the result.
            size: samples of a batch.
        """
        points = []
        for strength in strengths:
            put_projector(self.arm.model, self.at(strength))
            points.append(Point(strength, self._loss(self.arm, held, size), self._loss(self._dense, held, size)))
        put_projector(self.arm.model, self._tuned)
        return points

    def _loss(self, arm: Arm, held: Slice, size: int) -> float:
        formatter = arm.formatter(held.data.images, held.max_length, raw_pixels=True)

        def summed(batch: Mapping[str, Any]) -> Tensor:
            return summed_loss(arm, arm.place(batch, formatter.finish))

        loss = HeldOutLoss(held.data, formatter, summed, Ranks(0, 0, 1), size)
        return loss(arm.model, torch.device("cpu"))

    def write(self, folder: Path, strength: float) -> None:
        """Write an adapter at a strength, which says of what it is made."""
        tensors = self.at(strength)
        write_adapter(folder, tensors, self.adapter, dialled_record(self.record, tensors, strength, self.adapter))


def summed_loss(arm: Arm, inputs: Mapping[str, Any]) -> Tensor:
    """Return the cross entropy of a batch on an arm's device, summed over its supervised tokens, in float32."""
    pruned = arm.pruned.prepare(inputs)
    labels = pruned.inputs["labels"][:, 1:]
    logits = arm.pruned.run(pruned).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def run_dial(
    adapter: str | Path,
    folder: Path,
    strengths: Sequence[float],
    held: Slice | None = None,
    *,
    base: str | None = None,
    samples: int | None = None,
    size: int = 16,
    choose: bool = False,
    dense_within: float | None = None,
    overwrite: bool = False,
) -> list[Point]:
    """Measure a dial, and write ``dial.json``, ``dial.png`` and, if asked for, the adapter of the chosen strength.

    Args:
        adapter: its folder, or the output of its recalibration.
        folder: where it is written; the adapter below it.
        strengths: that of the base, 0, is measured in any case.
        held: what to measure on; None is what the adapter's run held out.
        base: folder or hub id of the base; None is the one that the record names.
        samples: of the run's held-out samples; None is all.
        size: samples of a batch.
        choose: write the adapter of the lowest pruned loss.
        dense_within: how much its dense loss may be above the base's, per token; None is any.
        overwrite: whether the folder may hold other files.

    Raises:
        CheckpointError, DataError, PruningError, OutputError: for what can't work.
    """
    source = adapter_folder(adapter)
    held = own_slice(source, samples) if held is None else held
    with OutputFolder(folder, DIAL, overwrite, reads=(source, source.parent, base)):
        dial = Dial(source, base)
        points = dial.measure(held, sorted({0.0, *map(float, strengths)}), size)
        best = chosen(points, dense_within) if choose else None
        if best is not None:
            dial.write(folder / "adapter", best.strength)
        hashes: BaseHashes = dial.arm.base.hashes
        values = {
            "adapter": portable(str(source)),
            "projector_hash": dial.record["projector_hash"],
            **hashes.record(),
            "pruning": dial.record["pruning"],
            "data": {"recipe": held.data.name, "hash": held.data.content_hash, "samples": len(held.data)},
            "points": [asdict(point) for point in points],
            "dense_within": dense_within,
            "chosen": None if best is None else best.strength,
        }
        write_dial(folder, values)
        plot(points, folder / PLOT, best)
    return points


def lines(points: Sequence[Point], best: Point | None) -> list[str]:
    """Return a table of the losses, for people."""
    base = next(point for point in points if point.strength == 0)
    told = ["strength  loss, pruned  loss, all tokens  - base's"]
    for point in points:
        mark = "  chosen" if point == best else ""
        above = point.dense - base.dense
        told.append(f"{point.strength:>8g}  {point.pruned:>12.4f}  {point.dense:>16.4f}  {above:>+8.4f}{mark}")
    return told


def plot(points: Sequence[Point], path: Path, best: Point | None) -> None:
    """Draw both losses over the strength."""
    import matplotlib  # takes a second, and only commands that draw need it

    matplotlib.use("Agg")  # a server has no display, and the default backend would look for one
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=130)
    strengths = [point.strength for point in points]
    axes.plot(strengths, [point.pruned for point in points], "o-", color="tab:blue", label="pruned")
    axes.plot(strengths, [point.dense for point in points], "o-", color="tab:grey", label="all visual tokens")
    if best is not None:
        axes.axvline(best.strength, color="tab:green", linestyle="--", linewidth=1, label=f"chosen: {best.strength:g}")
    axes.set_xlabel("strength: 0 is the base's projector, 1 the tuned one")
    axes.set_ylabel("held-out loss per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)  # pyplot keeps every figure that is not closed
    write_bytes(path, drawn.getvalue())
