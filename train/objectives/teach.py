"""What ``prunetune teach`` does: the teacher runs once over all samples, shard by shard, on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import DataError, RecipeData, Sample, load_recipe
from prunetune.data_recipes.formatting import supervised
from prunetune.models import Arm
from prunetune.models.ranks import Ranks
from prunetune.models.seal import seal_of
from prunetune.outputs import OutputFolder, write_bytes
from prunetune.pruning import PruningSpec
from prunetune.screen import SCREEN, say
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.head import PIECE, Scores
from prunetune.train.engine.reading import Reads, text_behind_images
from prunetune.train.objectives.stored import (
    PARTS,
    Shard,
    digest_of,
    keys_of,
    parts_of,
    read_index,
    shard_name,
    write_index,
)

SHARD = 512
"""Samples of a shard."""


def teach(
    config: RecalibrateConfig,
    folder: OutputFolder,
    ranks: Ranks,
    top: int = 32,
    hidden: bool = False,
    batch_size: int = 16,
) -> None:
    """Write the teacher's outputs of all samples of a recipe, those that it holds out included; every rank calls this.

    What was begun goes on: shards that are whole stay.

    Args:
        config: of the run that will read them: model, data, longest sample, temperature and hidden layer.
        folder: where they go, open.
        ranks: this process among its peers.
        top: likeliest words that are stored of a position.
        hidden: whether hidden states are stored.
        batch_size: samples at once.

    Raises:
        ConfigError: if the folder holds the outputs of another teacher.
        DataError: for samples that can't be read or told apart.
    """
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    arm = Arm.load(config.model, PruningSpec())
    samples = _Samples(data)
    index = {
        "parts": parts_of(config, arm),
        "data": data.content_hash,
        "samples": len(samples),
        "top": min(top, arm.model.get_output_embeddings().weight.shape[0]),
        "hidden": hidden,
        "batch_size": batch_size,
        "shards": -(-len(samples) // SHARD),
    }
    made_with = seal_of(index)
    if ranks.is_zero:
        _begin(folder.path, index, made_with)
    ranks.wait()
    teacher = _Teacher(config, arm, data, index, made_with)
    left = [
        number for number in range(ranks.rank, index["shards"], ranks.world) if not _whole(folder, number, made_with)
    ]
    for number in tqdm(left, desc="teach", unit="shard", file=SCREEN, disable=not ranks.is_zero):
        first = number * SHARD
        own = [samples[place] for place in range(first, min(first + SHARD, len(samples)))]
        teacher.write(folder.path / shard_name(number), own)
    ranks.wait()
    if ranks.is_zero:
        _check_apart([Shard(folder.path / shard_name(number), made_with) for number in range(index["shards"])])
        write_index(folder.path, {**index, "made_with": made_with, "complete": True})
        say(f"teacher: {folder.path}; recalibrate takes it with --objective.teacher {folder.path}")
    ranks.wait()


class _Samples:
    """All samples of a recipe, held-out ones behind the others."""

    def __init__(self, data: RecipeData) -> None:
        self.parts = [rows for rows in (data.rows, data.held_out) if rows is not None]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.parts)

    def __getitem__(self, place: int) -> Sample:
        for rows in self.parts:
            if place < len(rows):
                return Sample.from_row(rows[place])
            place -= len(rows)
        raise IndexError(place)


def _begin(folder: Path, index: dict[str, Any], made_with: str) -> None:
    if (folder / "teacher.json").is_file():
        earlier = read_index(folder)
        if earlier["made_with"] != made_with:
            raise ConfigError(
                f"{folder} holds the outputs of a teacher with other settings or data; choose another folder, or give "
                "--overwrite to make them anew"
            )
        return
    write_index(folder, {**index, "made_with": made_with, "complete": False})


def _whole(folder: OutputFolder, number: int, made_with: str) -> bool:
    path = folder.path / shard_name(number)
    if not path.is_file():
        return False
    try:
        shard = Shard(path, made_with)
        for place in range(len(shard.keys)):
            shard.sample(place)
    except ConfigError as error:
        say(str(error))
        return False
    return True


def _check_apart(shards: Sequence[Shard]) -> None:
    """Check that no two samples have one key and two pictures; raises DataError."""
    seen: dict[bytes, bytes] = {}
    for shard in shards:
        for key, image in zip(shard.keys, shard.images, strict=True):
            if seen.setdefault(key, image) != image:
                raise DataError(
                    "two samples have one name and one text, and another picture each, so that the teacher's outputs "
                    "can't be told apart; give the samples names of their own"
                )


class _Teacher:
    def __init__(
        self, config: RecalibrateConfig, arm: Arm, data: RecipeData, index: dict[str, Any], made_with: str
    ) -> None:
        self.arm, self.index, self.made_with = arm, index, made_with
        self.model = arm.model.eval()
        switches = config.engine.model_copy(update={"project_kept": False, "shared_prefix": False})
        reads = Reads(True, False, index["hidden"], config.objective.hidden_layer if index["hidden"] else None, True)
        self.engine = Engine(arm.pruned, switches, None, reads)
        self.head = head_of(arm.pruned, switches, partitioned=False)
        self.formatter = arm.formatter(data.images, config.train.max_length, raw_pixels=True)
        self.temperature = config.objective.temperature

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        """Write a shard of samples."""
        found: list[dict[str, Tensor]] = []
        keys: list[bytes] = []
        size = self.index["batch_size"]
        with torch.no_grad(), self.engine.attached(), self.engine.own_head(self.head):
            for first in range(0, len(samples), size):
                own_keys, own = self._batch(samples[first : first + size])
                keys += own_keys
                found += own
        names = [name for names in PARTS.values() for name in names if name in found[0]]
        images = [hashlib.sha256(str(sample.image).encode()).digest()[:16] for sample in samples]
        tensors = {name: torch.cat([own[name] for own in found]).contiguous() for name in names}
        for offsets, parts in PARTS.items():
            counts = [len(own[parts[0]]) if parts[0] in own else 0 for own in found]
            tensors[offsets] = torch.tensor([0, *counts]).cumsum(dim=0)
        tensors["keys"] = _bytes(keys)
        tensors["images"] = _bytes(images)
        digests = []
        for key, image, sample in zip(keys, images, found, strict=True):
            digests.append(digest_of(key, image, [sample[name] for name in names]))
        tensors["digests"] = _bytes(digests)
        write_bytes(path, save(tensors, {"made_with": self.made_with}))

    def _batch(self, samples: Sequence[Sample]) -> tuple[list[bytes], list[dict[str, Tensor]]]:
        built = self.formatter.training_batch(samples)
        inputs = self.arm.place(built, self.formatter.finish)
        keys = keys_of(inputs)
        visual = self.engine.visual
        read = self.engine.read(self.model, inputs)
        assert read.answers is not None and read.features is not None
        words, scores = _likeliest(read.answers, self.index["top"], self.temperature)
        is_visual = torch.isin(built["input_ids"], torch.tensor(visual)).any(dim=1)
        tensors = {"words": words, "scores": scores, "means": read.features.float()}
        counts = {"answers": supervised(built["labels"]).sum(dim=1), "rows": is_visual.long()}
        counts["text"] = text_behind_images(built["input_ids"], built["attention_mask"], visual).sum(dim=1)
        if read.hidden is not None:
            tensors["hidden"] = read.hidden.half()
            if not bool(tensors["hidden"].isfinite().all()):
                raise ConfigError(
                    "hidden states of this model pass what float16 holds; run the teacher beside the model"
                )
        split: list[dict[str, Tensor]] = [{} for _ in samples]
        for offsets, names in PARTS.items():
            ends = [0, *counts[offsets].cumsum(dim=0).tolist()]
            for name in names:
                if name not in tensors:
                    continue
                whole = tensors[name].cpu()
                for own, (first, last) in zip(split, pairwise(ends), strict=True):
                    own[name] = whole[first:last]
        return keys, split


def _likeliest(scores: Scores, top: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest words (n, k) int32, and their log-probabilities with the log of all others' mass."""
    words, found = [], []
    for first in range(0, max(len(scores), 1), PIECE):
        own = (scores.logits(slice(first, first + PIECE)) / temperature).log_softmax(dim=-1)
        best = own.topk(top, dim=-1)
        rest = own.scatter(1, best.indices, float("-inf")).logsumexp(dim=-1, keepdim=True)
        words.append(best.indices.int())
        found.append(torch.cat([best.values, rest], dim=1).float())
    return torch.cat(words), torch.cat(found)


def _bytes(values: Sequence[bytes]) -> Tensor:
    """Return equally long byte strings as (E, n) uint8."""
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).reshape(len(values), -1)
