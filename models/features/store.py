"""Reading a feature cache: what it holds for a batch's samples, refused where it was made for something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunetune.data_recipes import Sample
from prunetune.models.adapter import projector_state
from prunetune.models.arm import Arm
from prunetune.models.errors import FeatureError
from prunetune.models.features.identity import choice_parts, differing, model_parts
from prunetune.models.features.index import made_with, read_index
from prunetune.models.features.keys import entries_of, fingerprint, key_of
from prunetune.models.features.make import FeatureData
from prunetune.models.features.shard import Shard
from prunetune.models.hashes import tensor_hash
from prunetune.models.seal import SEAL, short
from prunetune.pruning import Budget, PruningSpec
from prunetune.pruning.budget import BudgetRule
from prunetune.pruning.elastic import ElasticModel
from prunetune.pruning.stored import StoredImages, is_all_tokens, told_choice
from prunetune.pruning.stored import differing as parts_that_differ

_LOOKED_AT = 4
"""Images that are opened to see whether they are those that the features were made of."""


@dataclass(frozen=True)
class Served:
    """What the images of a setting are made of.

    Attributes:
        number: of the choice that is read.
        anew: the setting, if that is all tokens and it chooses from them when it runs.
    """

    number: int
    anew: PruningSpec | None = None


class FeatureStore:
    """A complete feature cache, read through memory maps; processes that load data can share one.

    Args:
        folder: written by `prunetune cache`.

    Raises:
        FeatureError: if there is none, it was not finished, or its files are missing or cut short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if not self.index["complete"]:
            raise FeatureError(f"{self.folder} was not finished; the same `prunetune cache` goes on with it")
        self.made_with = made_with(self.index)
        self._by_question = bool(self.index["by_question"])
        self._shards: dict[int, Shard] = {}
        self._place_of: dict[bytes, tuple[int, int]] = {}
        choices = [parts["choice"] for parts in self.index["choices"]]
        self._choices: list[dict[str, Any]] = choices
        self._all_tokens = next((number for number, choice in enumerate(choices) if is_all_tokens(choice)), None)
        self._own = Served(0)
        self._cells: tuple[Served, ...] = ()
        self._trains = False
        for number, about in enumerate(self.index["shards"]):
            self._check_size(self.folder / about["file"], int(about["bytes"]))
            for place, key in enumerate(self._shard(number).keys):
                self._place_of[key] = (number, place)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        arm: Arm,
        data: FeatureData | None = None,
        trains: bool = False,
        settings: Sequence[PruningSpec] = (),
    ) -> FeatureStore:
        """Return the features of an arm, checked; call it before PEFT wraps the model or ZeRO-3 partitions it.

        Args:
            folder: written by `prunetune cache`.
            arm: the model with its pruner and budget.
            data: the samples that will be asked for; None leaves them unchecked until they are.
            trains: whether the projector will change.
            settings: further pruners and budgets, which batches name by their number among these; those of an elastic
                arm are its own.

        Raises:
            FeatureError: if the features belong to another tower, pruner, budget, preprocessing, text tower or data,
                naming what differs; if the choice depends on a projector that is another one, or will be.
        """
        store = cls(folder)
        store.check(arm, trains, settings)
        if data is not None:
            store.check_data(data)
        return store

    def __len__(self) -> int:
        return len(self._place_of)

    @property
    def seal(self) -> str:
        """The index's seal, which covers every byte of the cache: what records hold."""
        return str(self.index[SEAL])

    def check(self, arm: Arm, trains: bool = False, settings: Sequence[PruningSpec] = ()) -> None:
        """Check that these features are an arm's, and take its pruner and budget, and further ones, for :meth:`batch`.

        Raises:
            FeatureError: as :meth:`open`.
        """
        now = model_parts(arm)
        parts = differing(self.index["model"], now)
        if parts:
            raise FeatureError(
                f"{self.folder} holds features of another model or preprocessing: {self._told(parts, now)}; make them "
                "for this one with `prunetune cache`, or train without features"
            )
        self._trains = trains
        arms = [arm.with_pruning(setting) for setting in settings]
        if isinstance(arm.pruned, ElasticModel):
            arms = [replace(arm, pruned=part, spec=part.spec, profile=None) for part in arm.pruned.parts]
            arm = arm.with_pruning(arm.spec)
        self._own = self._served(arm)
        self._cells = tuple(self._served(own) for own in arms)

    def _told(self, parts: Sequence[str], now: dict[str, Any]) -> str:
        told = []
        for name in parts:
            told.append(f"{name} {_shown(self.index['model'].get(name))} there, {_shown(now[name])} here")
        return "; ".join(told)

    def _served(self, arm: Arm, keep: Budget | None = None) -> Served:
        """Return what an arm's images are made of: what it kept when the cache was made, or all tokens to choose from.

        Raises:
            FeatureError: if there is neither.
        """
        asked = choice_parts(arm, keep)
        try:
            number = self._choice_of(asked)
            if self.index["by_projector"][number]:
                self._check_projector(arm)
            return Served(number)
        except FeatureError as error:
            why = arm.pruned.why_not_live()
            if why is None and self._all_tokens is not None:
                why = self._why_not_anew()
                if why is None:
                    spec = arm.pruning if keep is None else arm.pruning.model_copy(update={"keep": keep})
                    return Served(self._all_tokens, spec)
            elif why is None and self._is_of_projector(asked):
                why = "it could choose anew from all tokens, which `prunetune cache --all-tokens` stores"
            raise error if why is None else FeatureError(f"{error}; {why}") from None

    def _is_of_projector(self, asked: Mapping[str, Any]) -> bool:
        stored = self.index["choices"]
        return asked in stored and bool(self.index["by_projector"][stored.index(asked)])

    def _why_not_anew(self) -> str | None:
        """Return why nothing can be chosen from the images of this cache, of which all tokens are stored."""
        for number in range(len(self.index["shards"])):
            if not self._shard(number).can_choose_anew:
                return (
                    "nothing can be chosen anew from its images, which are cut into crops or have row ends, or were "
                    "stored by an earlier release"
                )
        return None

    def _choice_of(self, asked: Mapping[str, Any]) -> int:
        """Return the number of a choice among those that are stored."""
        stored = self.index["choices"]
        if asked in stored:
            return int(stored.index(asked))
        alike = [parts for parts in stored if parts["choice"] == asked["choice"]]
        if alike:
            (name, *_) = differing(alike[0], asked)
            raise FeatureError(
                f"{self.folder} was made with another {name[:-1] if name.endswith('s') else name}: "
                f"{_shown(alike[0][name])} there, {_shown(asked[name])} here; make the features for this one"
            )
        there = ", ".join(told_choice(parts["choice"]) for parts in stored)
        pruner = asked["choice"]["pruner"]
        same = [parts["choice"] for parts in stored if parts["choice"]["pruner"] == pruner]
        why = ""
        if same:
            name = parts_that_differ(same[0], asked["choice"])[0]
            why = f" ({name} {_shown(same[0].get(name))} there, {_shown(asked['choice'].get(name))} here)"
        raise FeatureError(
            f"{self.folder} holds what {there} keeps, not {told_choice(asked['choice'])}{why}; make the features for "
            "it with `prunetune cache`"
        )

    def _check_projector(self, arm: Arm) -> None:
        """Check that a choice by the projector's output is still the choice."""
        name = arm.spec.pruner
        if self._trains:
            raise FeatureError(
                f"{name} chooses by the projector's output, which training changes, so what {self.folder} holds is "
                "what it chose before; train without features, or with a method that chooses before the projector"
            )
        own = tensor_hash(projector_state(arm.model))
        if own != self.index["projector"]:
            raise FeatureError(
                f"{name} chooses by the projector's output, and {self.folder} was made with another projector: "
                f"{short(self.index['projector'])} there, {short(own)} here; make the features for this one"
            )

    def check_data(self, data: FeatureData) -> None:
        """Check that there are features of every image, and that some of the images are those they were made of.

        Raises:
            FeatureError: naming a sample whose image is missing, or whose pixels differ.
        """
        missing, wanted = 0, 0
        first: Sample | None = None
        known: list[Sample] = []
        for key, sample in entries_of(data.samples, self._by_question):
            wanted += 1
            if key not in self._place_of:
                missing += 1
                first = first or sample
            else:
                known.append(sample)
        if first is not None:
            raise FeatureError(
                f"{self._has_none(first)}: {missing:,} of {wanted:,} entries of {data.name} are missing; make the "
                "features of this data with `prunetune cache`"
            )
        for number in range(min(_LOOKED_AT, len(known))):
            sample = known[number * len(known) // _LOOKED_AT]
            self._check_image(sample, data)

    def _check_image(self, sample: Sample, data: FeatureData) -> None:
        shard, place = self._find(sample)
        opened = data.images.open(str(sample.image), sample.id)
        if not isinstance(opened, Image.Image) or fingerprint(opened) != bytes(shard.array("fingerprints")[place]):
            raise FeatureError(
                f"{self.folder} was made of other images: {sample.image!r} of sample {sample.id!r} has other pixels "
                "now; make the features of this data"
            )

    def batch(
        self,
        samples: Sequence[Sample],
        keep: Budget | None = None,
        arm: Arm | None = None,
        cells: Sequence[int] | None = None,
    ) -> StoredImages:
        """Return what is kept of the images of some samples, in their order; text alone has none.

        Args:
            samples: of the batch.
            keep: another budget than that of the arm which was checked; ``arm`` must be given with it.
            arm: whose budget it is.
            cells: for each sample the number of its setting among those which were checked; None is the arm's own.

        Raises:
            FeatureError: for a sample whose image has no features, a damaged shard, a budget that was not stored.
        """
        if cells is not None:
            numbers = [self._cells[cell].number for cell in cells]
        else:
            own = self._own if keep is None or arm is None else self._served(arm, keep)
            numbers = [own.number] * len(samples)
        return self._read(samples, numbers)

    def all_tokens(self, samples: Sequence[Sample]) -> StoredImages:
        """Return all tokens of the images of some samples, as the dense model reads them.

        Raises:
            FeatureError: if the cache holds what is kept of them alone; as :meth:`batch`.
        """
        if self._all_tokens is None:
            raise FeatureError(
                f"{self.folder} does not hold all tokens of its images, which the model without pruning reads; make "
                "the features with `prunetune cache --all-tokens`"
            )
        return self._read(samples, [self._all_tokens] * len(samples))

    def _read(self, samples: Sequence[Sample], numbers: Sequence[int]) -> StoredImages:
        """Return what the choices of these numbers keep of the images of some samples."""
        found, own = [], []
        for sample, number in zip(samples, numbers, strict=True):
            if sample.image is not None:
                found.append(self._find(sample))
                own.append(number)
        return stored_images(found, own, self._choices, self._shard(0))

    def size(self, sample: Sample) -> tuple[int, int]:
        """Return the width and height of a sample's image in pixels; raises FeatureError if it has no features."""
        shard, place = self._find(sample)
        width, height = shard.array("sizes")[place].tolist()
        return width, height

    def placeholders(self, sample: Sample) -> int:
        """Return how many placeholders a sample's image has; 0 of text alone."""
        if sample.image is None:
            return 0
        shard, place = self._find(sample)
        return int(shard.array("lengths")[place])

    def kept(self, sample: Sample, cell: int | None = None) -> int:
        """Return how many of them stay; 0 of text alone.

        Args:
            sample: with its image.
            cell: the number of its setting; None is the arm's own. Of a method that chooses anew it is the budget.
        """
        if sample.image is None:
            return 0
        served = self._own if cell is None else self._cells[cell]
        shard, place = self._find(sample)
        first, last = shard.array(f"{served.number}.offsets")[place : place + 2].tolist()
        if served.anew is None:
            return int(last - first)
        items = shard.items(place)[0]
        return items * BudgetRule(served.anew.keep, served.anew.small_images).of_item(int(last - first) // items)

    def _find(self, sample: Sample) -> tuple[Shard, int]:
        found = self._place_of.get(key_of(sample, self._by_question))
        if found is None:
            raise FeatureError(f"{self._has_none(sample)}; make them of this data with `prunetune cache`")
        number, place = found
        return self._shard(number), place

    def _has_none(self, sample: Sample) -> str:
        what = "image and question" if self._by_question else "image"
        return f"{self.folder} holds no features of the {what} of sample {sample.id!r}, {sample.image!r}"

    def _shard(self, number: int) -> Shard:
        """Return a shard, opened and checked when it is first used."""
        if number not in self._shards:
            about = self.index["shards"][number]
            shard = Shard(self.folder / about["file"], about["head"])
            if shard.made_with != self.made_with:
                raise FeatureError(f"{shard.path} belongs to another feature cache; make the cache anew")
            self._shards[number] = shard
        return self._shards[number]

    def _check_size(self, path: Path, expected: int) -> None:
        there = path.stat().st_size if path.is_file() else 0
        if there != expected:
            what = f"has {there:,} bytes of {expected:,}" if path.is_file() else "is missing"
            raise FeatureError(f"{path} {what}; the same `prunetune cache` makes it anew")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a data loading process that is spawned needs: it maps the files by itself."""
        return {**self.__dict__, "_shards": {}}


def stored_images(
    found: Sequence[tuple[Shard, int]], numbers: Sequence[int], choices: Sequence[Mapping[str, Any]], like: Shard
) -> StoredImages:
    """Return what is kept of some images of shards.

    Args:
        found: the shard of each image, and its number in it.
        numbers: for each image the number of the choice.
        choices: all that are stored: their pruners and budgets.
        like: a shard with features of this dtype and width, for a batch without images.

    Raises:
        FeatureError: if a shard is damaged.
    """
    # Of no image at first, so that a batch of text alone has a width and a dtype.
    rows: list[Any] = [like.rows[:0]]
    stays: list[Any] = [np.zeros(0, dtype=bool)]
    ends: list[Any] = [np.zeros(0, dtype=np.int64)]
    lengths, notes, items = [], [], []
    newline = None
    first = 0  # of an image's slots among all that stay
    for (shard, number), choice in zip(found, numbers, strict=True):
        features = shard.features(number)
        at, source = shard.kept(number, choice)
        is_token = source >= 0
        rows.append(features[source[is_token]])
        ends.append(np.flatnonzero(~is_token) + first)
        first += len(at)
        lengths.append(int(shard.array("lengths")[number]))
        own = np.zeros(lengths[-1], dtype=bool)
        own[at] = True
        stays.append(own)
        notes.append(shard.notes(number, choice))
        items.append(shard.items(number) if is_all_tokens(choices[choice]) else (0, 0, 0))
        newline = shard.newline if newline is None else newline
    flat = np.concatenate(rows)
    width = flat.shape[1] // like.dtype.itemsize
    return StoredImages(
        # Of one dimension first: what has no rows can't be seen as another dtype.
        rows=torch.from_numpy(flat.reshape(-1)).view(like.dtype).view(-1, width),
        stays=torch.from_numpy(np.concatenate(stays)),
        lengths=tuple(lengths),
        ends=torch.from_numpy(np.concatenate(ends)),
        newline=newline,
        choices=tuple(choices[choice] for choice in numbers),
        notes=tuple(notes),
        items=tuple(items),
    )


def _shown(value: Any) -> str:
    """Return a part for people: of a hash its first digits."""
    text = str(value)
    return short(text) if len(text) == 64 and " " not in text else repr(value)
