"""The teacher's outputs in a folder: what `prunetune teach` writes, and the teacher that reads it.

``teacher.json`` says under a seal what they were made with. Each ``teacher-#####.safetensors`` has E samples:

    keys (E, 16) uint8       which sample with which tokens, see :func:`keys_of`
    images (E, 16) uint8     which picture
    digests (E, 32) uint8    SHA-256 of the two before and of what follows of the sample
    answers (E + 1,) int64   the first supervised position of each sample in
    words (N, k) int32       the k likeliest words there
    scores (N, k + 1)        float32 log-probabilities at the temperature, and last the log of all others' mass
    text (E + 1,) int64      the first text position behind an image of each sample in
    hidden (M, D) float16    hidden states there, if they were asked for
    rows (E + 1,) int64      0 or 1 row of each sample in
    means (R, D) float32     the mean over all visual tokens of a sample with images
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import RecipeData
from prunetune.data_recipes.formatting import supervised
from prunetune.data_recipes.segments import MODELS_TOKENS
from prunetune.models import Arm
from prunetune.models.seal import SEAL, read_sealed, sealed
from prunetune.outputs import write_text
from prunetune.reading import one_line
from prunetune.train.objectives import terms
from prunetune.train.objectives.objective import Objective, Taught

INDEX = "teacher.json"
KIND = "prunetune teacher"
FORMAT = 1
PARTS = {"answers": ("words", "scores"), "text": ("hidden",), "rows": ("means",)}
"""The tensors that have rows of samples, by the offsets that say which."""
_ANEW = "`prunetune teach` with the same configuration makes what is missing anew"


def parts_of(config: RecalibrateConfig, arm: Arm) -> dict[str, Any]:
    """Return what the teacher's outputs depend on beside the samples, by the name that a refusal gives it."""
    model = config.model
    parts: dict[str, Any] = {
        "base model": arm.base.frozen_hash,
        "original projector": arm.base.hashes.original_projector_hash,
        "tokenizer, processor or configuration": arm.base.settings_hash,
        "model.template": hashlib.sha256(arm.template.encode()).hexdigest(),
        "model.square": model.square,
        "model.dtype": model.dtype,
        "model.quantization": model.quantization,
        "train.max_length": config.train.max_length,
        "objective.temperature": config.objective.temperature,
        "objective.hidden_layer": config.objective.hidden_layer,
    }
    if model.tokens != MODELS_TOKENS:  # teachers of before there was a choice stay
        parts["model.tokens"] = model.tokens
    return parts


def keys_of(inputs: Mapping[str, Any]) -> list[bytes]:
    """Return for each row of a batch what its outputs are found by: the sample's name with its tokens, 16 bytes."""
    ids, lengths = inputs["input_ids"].cpu(), inputs["attention_mask"].sum(dim=1).tolist()
    keys = []
    for name, row, length in zip(inputs["sample_ids"], ids, lengths, strict=True):
        digest = hashlib.sha256(f"{name}\n".encode())
        digest.update(row[:length].long().numpy().tobytes())
        keys.append(digest.digest()[:16])
    return keys


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"teacher-{number:05d}.safetensors"


def digest_of(key: bytes, image: bytes, tensors: Sequence[Tensor]) -> bytes:
    """Return a SHA-256 of one sample: its key, its picture's, and its tensors."""
    digest = hashlib.sha256(key + image)
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write the index with its seal."""
    write_text(folder / INDEX, json.dumps(sealed({"kind": KIND, "format": FORMAT, **index}), indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a teacher's outputs.

    Raises:
        ConfigError: if there is none, or it was changed.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ConfigError(f"{folder} holds no teacher: there is no {INDEX}; `prunetune teach` makes one")
    return read_sealed(path, "index of a teacher", "teach anew", ConfigError, kind=KIND, format=FORMAT)


class Shard:
    """A file of a teacher's outputs.

    Raises:
        ConfigError: if it is missing or broken, or of other settings.
    """

    def __init__(self, path: Path, made_with: str) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} can't be read: {one_line(error)}; {_ANEW}") from error
        if (self._file.metadata() or {}).get("made_with") != made_with:
            raise ConfigError(f"{path} is of another teacher than its index; {_ANEW}")
        self.names = set(self._file.keys())
        self.keys = [bytes(key.tolist()) for key in self._file.get_tensor("keys")]
        self.images = [bytes(image.tolist()) for image in self._file.get_tensor("images")]
        self._digests = self._file.get_tensor("digests")
        self._offsets = {name: self._file.get_tensor(name).tolist() for name in PARTS}

    def sample(self, number: int) -> dict[str, Tensor]:
        """Return what is stored of a sample; raises ConfigError if it was changed."""
        found = {}
        for offsets, names in PARTS.items():
            first, last = self._offsets[offsets][number : number + 2]
            for name in names:
                if name in self.names:
                    found[name] = self._file.get_slice(name)[first:last]
        if digest_of(self.keys[number], self.images[number], list(found.values())) != bytes(
            self._digests[number].tolist()
        ):
            raise ConfigError(
                f"{self.path} is damaged: what it holds of sample {number} was changed; delete it. {_ANEW}"
            )
        return found


@dataclass(frozen=True)
class TopScores:
    """The teacher's likeliest words at some positions, and all others as one."""

    words: Int[Tensor, "n k"]
    scores: Float[Tensor, "n k1"]

    def kl(self, logits: Float[Tensor, "m V"], piece: slice, temperature: float) -> Float[Tensor, ""]:
        """Return the summed KL at a piece of the positions, at the temperature that they were made at."""
        return terms.kl_of_top(logits, self.words[piece].long(), self.scores[piece], temperature)


class StoredTeacher:
    """Reads the teacher's outputs of a batch from a folder.

    Args:
        folder: of `prunetune teach`.
        config: the run's.
        arm: the model, with the original projector.
        objective: what is asked for.
        data: what it trains on.

    Attributes:
        seal: of the index.

    Raises:
        ConfigError: naming what differs, or what the folder does not hold.
    """

    def __init__(
        self, folder: str | Path, config: RecalibrateConfig, arm: Arm, objective: Objective, data: RecipeData
    ) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.seal = str(index[SEAL])
        same_data = index["data"] in (data.content_hash, data.split_from)
        self._check(index, parts_of(config, arm), objective, same_data)
        self._asks_answers = objective.teacher_reads is not None and objective.teacher_reads.answers
        self.shards = [Shard(self.folder / shard_name(number), index["made_with"]) for number in range(index["shards"])]
        self._places: dict[bytes, tuple[Shard, int]] = {}
        for shard in self.shards:
            for number, key in enumerate(shard.keys):
                self._places.setdefault(key, (shard, number))

    def _check(self, index: dict[str, Any], now: dict[str, Any], objective: Objective, same_data: bool) -> None:
        used = {"model.tokens": None, **now}
        reads = objective.teacher_reads
        if reads is None or not reads.hidden:
            del used["objective.hidden_layer"]
        if "kl" not in objective.weights:
            del used["objective.temperature"]
        differs = [name for name, value in used.items() if index["parts"].get(name) != value]
        if not same_data:
            differs.append("data")
        if differs:
            raise ConfigError(
                f"objective.teacher {self.folder} was made with another {', '.join(differs)}; teach anew, or leave "
                "objective.teacher out, and the teacher runs beside the model"
            )
        if not index["complete"]:
            raise ConfigError(f"objective.teacher {self.folder} is not complete; {_ANEW}")
        if reads is not None and reads.hidden and not index["hidden"]:
            raise ConfigError(f"objective.teacher {self.folder} has no hidden states; teach with --hidden")
        if reads is not None and reads.text:
            raise ConfigError(
                f"objective.teacher {self.folder} has no words at text positions; set objective.kl_at to answers, or "
                "leave objective.teacher out"
            )

    def taught(self, inputs: Mapping[str, Any]) -> Taught:
        """Return what the teacher said of a batch.

        Raises:
            ConfigError: for a sample that it was not asked about, or with other tokens.
        """
        samples = []
        for key, name in zip(keys_of(inputs), inputs["sample_ids"], strict=True):
            if key not in self._places:
                raise ConfigError(
                    f"objective.teacher {self.folder} knows no sample {name!r} with these tokens; teach on "
                    "the same data"
                )
            shard, number = self._places[key]
            samples.append(shard.sample(number))
        device = inputs["input_ids"].device

        def joined(name: str, rows: Sequence[bool]) -> Tensor:
            own = [sample[name][:] if there else sample[name][:0] for sample, there in zip(samples, rows, strict=True)]
            return torch.cat(own).to(device)

        everywhere = [True] * len(samples)
        # A batch that does not count has lost its labels.
        answered = supervised(inputs["labels"]).any(dim=1).tolist()
        answers = None
        if self._asks_answers:
            answers = TopScores(joined("words", answered), joined("scores", answered))
        hidden = joined("hidden", everywhere) if "hidden" in samples[0] else None
        return Taught(answers, None, hidden, joined("means", everywhere))
