"""Making a feature cache: tower and pruners run once over all images, shard by shard, on every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from prunetune.data_recipes import Formatter, RecipeData, Sample, Turn
from prunetune.data_recipes.sample import samples_of
from prunetune.errors import PrunetuneError
from prunetune.models.adapter import projector_state
from prunetune.models.arm import Arm
from prunetune.models.code import code_record
from prunetune.models.errors import FeatureError
from prunetune.models.features.identity import choice_parts, differing, model_parts
from prunetune.models.features.index import INDEX, made_with, read_index, settings_of, write_index
from prunetune.models.features.kept import (
    KeptImage,
    KeptSlots,
    check_can_be_stored,
    choose_before_projector,
    joined,
    kept_images,
    kept_slots,
    newline_of,
)
from prunetune.models.features.keys import FingerprintingImages, entries_of, instruction_of
from prunetune.models.features.shard import Entry, Shard, entry_bytes, shard_name, write_shard
from prunetune.models.hashes import tensor_hash
from prunetune.models.ranks import Ranks
from prunetune.models.seal import seal_of
from prunetune.outputs import OutputFolder
from prunetune.plugins import plugin_records
from prunetune.pruning import Budget, PruningSpec
from prunetune.pruning.sequence import placeholders
from prunetune.pruning.stored import is_all_tokens, told_choice
from prunetune.screen import SCREEN, say

_SHARD_BYTES = 64 * 2**20
_SHARDS = 64  # at least so many of a large data set: they are dealt to the ranks, and a killed run loses one of each
_MOST_SHARDS = 512  # each is an open file of every process that reads, and most systems allow 1,024
_PROBED = 8
_MARGIN = 1.03  # methods whose budgets adapt to the image keep a little more or less than those that were probed

Result = TypeVar("Result")


@dataclass(frozen=True)
class FeatureData:
    """The images that features are made of.

    Attributes:
        name: of the recipe or the tasks.
        samples: in their order; of several with one image the first speaks for all.
        images: opens the images.
    """

    name: str
    samples: Iterable[Sample]
    images: Any

    @classmethod
    def of_recipe(cls, data: RecipeData) -> FeatureData:
        """Return the images of a recipe, those that it holds out included."""
        return cls(data.name, _RecipeSamples(data), data.images)


@dataclass(frozen=True)
class _RecipeSamples:
    """A recipe's samples one after another, as often as they are asked for; held-out ones follow the others."""

    data: RecipeData

    def __iter__(self) -> Iterator[Sample]:
        for rows in (self.data.rows, self.data.held_out):
            if rows is None:
                continue
            for many in rows.iter(batch_size=1000):
                yield from samples_of(many)


@dataclass(frozen=True)
class _Plan:
    """What is made, and how it is cut: the same on every rank.

    Attributes:
        folder: of the cache.
        arms: for each choice the arm whose pruner runs, which several budgets share.
        choices: for each choice its record in the index.
        entries: the images, each once.
        by_question: whether an image has an entry for each question.
        batch_size: images per run of the tower.
        data: the images' name and opener.
    """

    folder: Path
    arms: list[tuple[Arm, Budget]]
    choices: list[dict[str, Any]]
    entries: list[tuple[bytes, Sample]]
    by_question: bool
    batch_size: int
    data: FeatureData

    @property
    def needs(self) -> frozenset[str]:
        """All signals that any of the pruners reads."""
        return frozenset(need for arm, _ in self.arms for need in arm.pruned.needs)

    @property
    def has_all_tokens(self) -> bool:
        """Whether a choice is to keep everything."""
        return any(is_all_tokens(choice["choice"]) for choice in self.choices)

    def told(self) -> str:
        """Return the choices for people."""
        return ", ".join(told_choice(choice["choice"]) for choice in self.choices)


def make_features(
    folder: OutputFolder,
    arm: Arm,
    prunings: Sequence[PruningSpec],
    data: FeatureData,
    ranks: Ranks,
    batch_size: int = 16,
) -> Path:
    """Run tower and pruners over all images, and return the folder; one that was killed goes on with whole shards.

    Shards and batches are cut alike in every run and dealt to the ranks in turn, so a run that was killed, one that was
    not and one on several ranks write the same bytes. A cache that is complete is checked, and what is damaged of it is
    made anew. Every rank calls this; rank 0 has opened the folder for all.

    Args:
        folder: where the cache is written, open.
        arm: the model; its projector is used for nothing but methods that choose by it.
        prunings: the pruners and budgets.
        data: the images.
        ranks: this process among its peers.
        batch_size: images per run of the tower; in half precision features depend on it in their last bits.

    Raises:
        FeatureError: on every rank, if the folder holds other features, the disk is too small, or the family's features
            or the method's choice can't be stored.
        DataError: for an image that can't be opened.
    """
    plan = _plan(folder.path, arm, prunings, data, batch_size)
    index = _agreed(ranks, lambda: _begin(plan, arm))
    number = index["shard_images"]
    shards = [plan.entries[first : first + number] for first in range(0, len(plan.entries), number)]
    _fill(plan, shards, made_with(index), ranks)
    ranks.wait()
    _agreed(ranks, lambda: _finish(plan, index, len(shards)))
    return folder.path


def _plan(folder: Path, arm: Arm, prunings: Sequence[PruningSpec], data: FeatureData, batch_size: int) -> _Plan:
    arms: list[tuple[Arm, Budget]] = []
    choices: list[dict[str, Any]] = []
    made: dict[str, Arm] = {}
    for spec in prunings:
        # One arm for all budgets of a method: it may hold a text tower.
        key = seal_of(spec.model_dump(exclude={"keep"}))
        if key not in made:
            made[key] = arm if spec == arm.spec else arm.with_pruning(spec)
        own = made[key]
        parts = choice_parts(own, spec.keep)
        if parts in choices:
            continue
        arms.append((own, spec.keep))
        choices.append(parts)
    by_question = any(own.pruned.reads_text for own, _ in arms)
    entries = list(entries_of(data.samples, by_question))
    if not entries:
        raise FeatureError(f"{data.name} has no image, so there are no features to make")
    return _Plan(folder, arms, choices, entries, by_question, batch_size, data)


def _begin(plan: _Plan, arm: Arm) -> dict[str, Any]:
    """Write the index of a cache that is begun, or check that the folder holds the same one, and the disk's room."""
    asked = {
        "model": model_parts(arm),
        "projector": tensor_hash(projector_state(arm.model)),
        "family": arm.pruned.family.name,
        "choices": plan.choices,
        "by_question": plan.by_question,
        "data": {"name": plan.data.name, "images": _keys_hash(plan), "count": len(plan.entries)},
        "batch_size": plan.batch_size,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    probed = _probe(plan)
    earlier = read_index(plan.folder) if (plan.folder / INDEX).is_file() else None
    if earlier is None:
        number = min(int(_SHARD_BYTES / probed), -(-len(plan.entries) // _SHARDS))
        number = max(number, -(-len(plan.entries) // _MOST_SHARDS))
        # Whole batches, so that a shard's last one is as full as the others.
        number = max(1, number // plan.batch_size) * plan.batch_size
    else:
        number = int(earlier["shard_images"])
    index = {**asked, "shard_images": number, "complete": False, "shards": []}
    if earlier is not None:
        _check_same(plan.folder, settings_of(earlier), settings_of(index))
    _check_room(plan, probed, number)
    if earlier is None:
        write_index(plan.folder, {**index, "prunetune": code_record(), "plugins": plugin_records()})
    return read_index(plan.folder)


def _check_same(folder: Path, earlier: dict[str, Any], asked: dict[str, Any]) -> None:
    """Check that a folder's features are those that are asked for; raises FeatureError naming what differs."""
    parts = differing(earlier, asked)
    if "model" in parts:
        parts[parts.index("model")] = ", ".join(differing(earlier["model"], asked["model"]))
    if parts:
        raise FeatureError(
            f"{folder} holds features that differ in {', '.join(parts)}; choose another folder, or give --overwrite "
            "to make them anew"
        )


def _probe(plan: _Plan) -> float:
    """Return about how many bytes an image takes, from some of them spread over the data."""
    count = min(_PROBED, len(plan.entries))
    numbers = [index * len(plan.entries) // count for index in range(count)]
    batch = _Encoder(plan).entries([plan.entries[number] for number in numbers])
    return _MARGIN * entry_bytes(batch.entries) / count


def _check_room(plan: _Plan, per_image: float, shard_images: int) -> None:
    """Say what the cache needs, and check that the disk has it."""
    total = len(plan.entries)
    there = 0
    for number in range(-(-total // shard_images)):
        if (plan.folder / shard_name(number)).is_file():
            there += min(shard_images, total - number * shard_images)
    needed, free = per_image * (total - there), free_bytes(plan.folder)
    what = "images with their questions" if plan.by_question else "images"
    say(
        f"features of {total:,} {what} for {plan.told()}: about {size(per_image)} each, {size(per_image * total)} in "
        f"all, {size(needed)} still to be made; {size(free)} free"
    )
    if needed > free:
        raise FeatureError(
            f"{plan.folder} needs about {size(needed)} more for the features of {total:,} {what}, and its disk has "
            f"{size(free)} free; choose fewer pruners and budgets, fewer samples, or a folder on another disk"
        )


def free_bytes(folder: Path) -> int:
    """Return how many bytes the disk of a folder has free."""
    return shutil.disk_usage(folder).free


def size(count: float) -> str:
    """Return a number of bytes for people, in powers of 1,000 as disks are sold."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def _keys_hash(plan: _Plan) -> str:
    return seal_of({"keys": [key.hex() for key, _ in plan.entries]})


def _fill(plan: _Plan, shards: Sequence[Sequence[tuple[bytes, Sample]]], seal: str, ranks: Ranks) -> None:
    """Make this rank's shards that are not there whole."""
    # In turn: where large images stand together, one rank would get them all.
    own = list(enumerate(shards))[ranks.rank :: ranks.world]
    encoder = _Encoder(plan)
    bar = tqdm(
        total=sum(len(shard) for _, shard in own),
        desc="cache",
        unit="image",
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not ranks.is_zero,
        file=SCREEN,
    )
    with bar:
        for number, shard in own:
            path = plan.folder / shard_name(number)
            if _is_whole(path, shard, seal):
                bar.update(len(shard))
                bar.initial += len(shard)  # the rate and the time left are of what is made
                continue
            made = encoder.shard(shard, bar)
            write_shard(path, made.entries, made.newline, made.reads_projector, seal, plan.has_all_tokens)


def _is_whole(path: Path, shard: Sequence[tuple[bytes, Sample]], seal: str) -> bool:
    """Return whether a shard is there as it was written; what is damaged is made anew."""
    if not path.is_file():
        return False
    try:
        there = Shard(path)
        there.check_all()
    except FeatureError as error:
        say(f"{path.name} is made anew: {str(error).partition(';')[0]}")
        return False
    return there.made_with == seal and there.keys == [key for key, _ in shard]


@dataclass
class _Made:
    """Some images with their features."""

    entries: list[Entry]
    newline: Tensor | None
    reads_projector: list[bool]


class _Encoder:
    """Runs the tower on batches of images, and every pruner on what it made of them."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.images = FingerprintingImages(plan.data.images)
        self.arm = plan.arms[0][0]
        self.formatter: Formatter = self.arm.formatter(self.images)

    def shard(self, entries: Sequence[tuple[bytes, Sample]], bar: tqdm) -> _Made:
        """Return a shard's images, batch by batch."""
        made = _Made([], None, [False] * len(self.plan.arms))
        for first in range(0, len(entries), self.plan.batch_size):
            batch = self.entries(entries[first : first + self.plan.batch_size])
            made.entries += batch.entries
            made.newline = batch.newline if made.newline is None else made.newline
            pairs = zip(made.reads_projector, batch.reads_projector, strict=True)
            made.reads_projector = [before or now for before, now in pairs]
            bar.update(len(batch.entries))
        return made

    @torch.inference_mode()
    def entries(self, batch: Sequence[tuple[bytes, Sample]]) -> _Made:
        """Return one batch's images with their features.

        Raises:
            FeatureError, PruningError, DataError: if they can't be made or stored.
        """
        samples = [_question(sample) for _, sample in batch]
        inputs = self.arm.place(self.formatter.prompt_batch(samples))
        for name in ("instructions", "sample_ids", "video_seconds"):
            inputs.pop(name, None)
        pruned = self.arm.pruned
        visions = pruned.encode(inputs, self.plan.needs)
        vision = check_can_be_stored(self.arm.model, pruned.family, visions)
        token = pruned.family.token_id(self.arm.model, "image")
        rows = placeholders(inputs["input_ids"], token, vision.lengths)[1]
        names = {number: f"sample {samples[row].id!r}" for number, row in enumerate(rows)}
        instructions = [instruction_of(sample) for _, sample in batch]
        choices: list[KeptSlots] = []
        reads_projector = []
        for arm, keep in self.plan.arms:
            own = arm.pruned
            choice, by_projector = choose_before_projector(own, vision, instructions, rows, keep, names)
            choices.append(kept_slots(choice, vision, own.spec.pruner, own.spec.newline, own.merges))
            reads_projector.append(by_projector)
        # Where every tile counts as an image, a sample has several.
        tiles: list[list[KeptImage]] = [[] for _ in batch]
        for row, image in zip(rows, kept_images(vision, choices), strict=True):
            tiles[row].append(image)
        entries = []
        for (key, sample), own_tiles in zip(batch, tiles, strict=True):
            kept = joined(own_tiles)
            image_size, mark = self.images.seen[str(sample.image)]
            entries.append(Entry(key, image_size, mark, kept))
        self.images.seen.clear()
        return _Made(entries, newline_of(vision), reads_projector)


def _question(sample: Sample) -> Sample:
    """Return a sample that asks its first question: the image's features do not depend on it."""
    return Sample(sample.id, sample.source, sample.image, (Turn(sample.turns[0].question, None),))


def _finish(plan: _Plan, index: Mapping[str, Any], count: int) -> None:
    """Write the index of the complete cache, with the hash of every shard."""
    shards = []
    by_projector = [False] * len(plan.choices)
    for number in range(count):
        shard = Shard(plan.folder / shard_name(number))
        shards.append({"file": shard.path.name, "bytes": shard.path.stat().st_size, "head": shard.head})
        for choice in range(len(plan.choices)):
            by_projector[choice] = by_projector[choice] or shard.reads_projector(choice)
    done = {**index, "complete": True, "shards": shards, "by_projector": by_projector}
    if done != index:
        write_index(plan.folder, done)


def _agreed(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Return what rank 0's work returns, on every rank; its error ends all of them with the same line."""
    told: list[Any] = [None, None]
    error: Exception | None = None
    if ranks.is_zero:
        try:
            told[0] = work()
        except PrunetuneError as failure:
            error, told[1] = failure, str(failure)
    if ranks.world > 1:
        torch.distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise error or FeatureError(told[1])
    result: Result = told[0]
    return result
