"""What a profile holds, typed: ``profile.json``, read and written here and nowhere else."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from prunetune.configs import ConfigError, ModelConfig
from prunetune.models.seal import SEAL, read_sealed, sealed
from prunetune.pruning.spec import PruningSpec

PROFILE, PAGE = "profile.json", "profile.md"
KIND: Literal["prunetune costs"] = "prunetune costs"
FORMAT: Literal[1] = 1
CONFIDENCE = 0.95


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Number(_Part):
    """Something measured several times.

    Attributes:
        median: of the values.
        low: lower end of its interval.
        high: upper end of its interval.
        values: how many there are.
        whole: whether the interval has 95 % coverage; of fewer than six values it reaches from the least to the
            greatest and has less.
    """

    median: float
    low: float
    high: float
    values: int
    whole: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Number:
        """Return the median with its interval by order statistics, which assumes no distribution and draws nothing."""
        ranked = sorted(values)
        cut = _cut(len(ranked))
        low, high = ranked[max(cut - 1, 0)], ranked[-max(cut, 1)]
        return cls(median=statistics.median(ranked), low=low, high=high, values=len(ranked), whole=cut > 0)


def _cut(count: int) -> int:
    """Return the rank, from 1, of the value that an interval of the median begins with; 0 if none covers enough."""
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count  # the probability that so many values or fewer lie below
        if 2 * below > 1 - CONFIDENCE:
            break
        rank += 1
    return rank


class BatchCost(_Part):
    """What one batch of requests costs an arm.

    Attributes:
        size: requests in the batch.
        tokens: of each prompt at the LLM, padding included.
        kept: visual tokens of a request that reached the LLM, mean.
        average: visual tokens of a request that a layer of the LLM processed, mean; None where no stage drops any
            inside.
        layers: how many tokens each layer of the LLM processes.
        stages: milliseconds of each stage of the batch, one after another: see docs/profile.md.
        prefill: milliseconds of the LLM over the prompts, stages between its layers included.
        first_token: milliseconds from pixels to the first token of all answers.
        end_to_end: milliseconds from pixels to the last token.
        decode: tokens a second after the first, all rows together.
        faster: how many times as fast as dense, by what was measured, round by round.
        over_stock: how many times as long as the stock model without this package it takes; dense alone.
        same_as_stock: whether both made the same tokens; dense alone.
        flop: of a request by part, computed from the shape.
        counted: of a request by stage, counted by torch while it ran.
        cache: bytes of a request's keys and values, computed.
        cache_measured: the same, measured on the cache itself.
        peak: most bytes that tensors took on the GPU, weights included; None where that is not measured.
    """

    size: int
    tokens: int
    kept: float
    average: float | None = None
    layers: list[int]
    stages: dict[str, Number]
    prefill: Number
    first_token: Number
    end_to_end: Number
    decode: Number | None
    faster: dict[str, Number]
    over_stock: dict[str, Number] = {}
    same_as_stock: bool | None = None
    flop: dict[str, float]
    counted: dict[str, float]
    cache: float
    cache_measured: float | None
    peak: int | None


class LoadCost(_Part):
    """What many requests in flight cost an arm.

    Attributes:
        clients: how many ask at once, each for its next answer when it has one.
        requests: how many were answered in each round.
        at_most: requests that one batch takes.
        batch: requests that one batch had, mean.
        rate: requests a second.
        half: milliseconds that half of the requests waited at most.
        nearly_all: milliseconds that 95 % of them waited at most.
        faster: the rate against the dense arm's, round by round.
        joules: of the GPU for a request, idle power included; None where that is not measured.
    """

    clients: int
    requests: int
    at_most: int
    batch: float
    rate: Number
    half: Number
    nearly_all: Number
    faster: Number
    joules: Number | None = None


class ArmCost(_Part):
    """One arm.

    Attributes:
        row: its name in the table.
        label: method and budget, for people.
        pruning: as it ran.
        refused: why it could not be measured; nothing else is there then.
        batches: by size, in the order of the sizes.
        load: None where there was no load test.
    """

    row: str
    label: str
    pruning: PruningSpec
    refused: str | None = None
    batches: list[BatchCost] = []
    load: LoadCost | None = None


class ModelCost(_Part):
    """One model with its arms, the dense one first.

    Attributes:
        name: what the table calls it.
        config: how it was loaded.
        random_weights: whether its weights were drawn; then answers say nothing, and prompts are made up.
        frozen_hash: SHA-256 of the stored weights without the projector; None of random ones.
        asked: where the requests came from.
        arms: dense first.
    """

    name: str
    config: ModelConfig
    random_weights: bool
    frozen_hash: str | None
    asked: str
    arms: list[ArmCost]


class Costs(_Part):
    """All that was measured in one run, on one machine.

    Attributes:
        models: in the table's order.
        new_tokens: length of every answer.
        repeats: measured rounds, after the rounds that warm up.
        warmup: how many of those.
        device: what ran.
        threads: of the CPU.
        versions: of the libraries.
        notes: what was not measured, and why.
        prunetune: version and source of this package.
    """

    kind: Literal["prunetune costs"] = KIND
    format: Literal[1] = FORMAT
    models: list[ModelCost]
    new_tokens: int
    repeats: int
    warmup: int
    device: str
    threads: int
    versions: dict[str, str]
    notes: list[str]
    prunetune: dict[str, Any]

    def to_text(self) -> str:
        """Return the file's text, with its seal."""
        return json.dumps(sealed(self.model_dump(mode="json")), indent=1) + "\n"


def read_costs(path: Path) -> Costs:
    """Return a profile.

    Raises:
        ConfigError: if it can't be read, is none, or was edited.
    """
    again = "name a file that `prunetune profile` wrote, or run it again"
    values = read_sealed(path, "profile", again, ConfigError, kind=KIND, format=FORMAT)
    del values[SEAL]
    try:
        return Costs.model_validate(values)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise ConfigError(f"{path} is of another version ({fields}); run prunetune profile again") from None
