"""What backends share: prompts of a batch, and what is checked of every row before an LLM reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prunetune.configs.serving import LimitsConfig
from prunetune.models.arm import Arm
from prunetune.pruning.rewrite import Pruned
from prunetune.serving.errors import Refused, bad
from prunetune.serving.job import Job, Usage
from prunetune.serving.prompts import OpenedImages


class Backend(Protocol):
    """Who answers."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Answer a batch, telling every job its end, or raise."""
        ...

    def close(self) -> None:
        """Let go of what is held."""
        ...


class RowsRefused(Exception):
    """Some rows of a batch can't be answered, and the others can."""

    def __init__(self, rows: Mapping[int, Refused]) -> None:
        super().__init__(f"{len(rows)} rows are refused")
        self.rows = rows


@dataclass(frozen=True)
class PromptRow:
    """One row of a pruned batch.

    Attributes:
        usage: what its prompt costs.
        longest: answer that fits, in tokens.
        features: of each of its images (K, D), as they reach the LLM.
    """

    usage: Usage
    longest: int
    features: list[Tensor]


class Prompts:
    """Makes batches of requests as `prunetune evaluate` makes them of questions, and checks them.

    Args:
        arm: what is served.
        limits: the longest answer of requests that name none.
    """

    def __init__(self, arm: Arm, limits: LimitsConfig) -> None:
        self.arm = arm
        self.limits = limits
        self.formatter = arm.formatter(OpenedImages({}))
        config: Any = arm.model.config
        self.context: int = config.get_text_config().max_position_embeddings
        self.width: int = config.get_text_config().hidden_size

    def batch(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the jobs' prompts on the arm's device, padded on the left."""
        self.formatter.images = OpenedImages({job.sample.id: job.opened for job in jobs if job.opened is not None})
        try:
            return self.arm.place(self.formatter.prompt_batch([job.sample for job in jobs]))
        finally:
            self.formatter.images = OpenedImages({})  # the pictures of a batch go with it

    def rows(self, pruned: Pruned, jobs: Sequence[Job]) -> list[PromptRow]:
        """Return what is known of each row.

        Raises:
            RowsRefused: for prompts that are too long, and features that are not finite.
        """
        lengths = pruned.inputs["attention_mask"].sum(dim=1).tolist()
        dropped = (~pruned.keep).sum(dim=1).tolist()
        features = image_features(pruned, len(jobs))
        rows: list[PromptRow] = []
        refused: dict[int, Refused] = {}
        for number, job in enumerate(jobs):
            own = features[number]
            kept = sum(len(image) for image in own)
            usage = Usage(lengths[number], 0, kept + dropped[number], kept)
            try:
                _check_finite(own)
                longest = self._longest(job, usage)
            except Refused as why:
                refused[number] = why
                continue
            rows.append(PromptRow(usage, longest, own))
        if refused:
            raise RowsRefused(refused)
        return rows

    def _longest(self, job: Job, usage: Usage) -> int:
        """Return how long an answer may get."""
        length = usage.prompt
        if self.arm.pruned.position_policy == "original":
            length += usage.visual - usage.kept  # positions are those of the full sequence
        left = self.context - length
        asked = job.wanted.longest
        if left < 1 or (asked or 0) > left:
            raise bad(
                "context_length_exceeded",
                f"the prompt has {length} tokens and max_tokens is {asked or 1}, the model's context {self.context}; "
                "shorten the prompt or lower max_tokens",
                "messages",
            )
        return min(self.limits.max_tokens, left) if asked is None else asked


def image_features(pruned: Pruned, rows: int) -> list[list[Tensor]]:
    """Return for each row the features (K, D) of each of its images, in reading order."""
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    encoded = pruned.inputs.get("mm_encoder_outputs", {}).get("image")
    counts = pruned.kept.get("image", [])
    if not counts:
        return found
    if encoded is None:  # nothing of any image is kept, and so nothing is handed on
        pieces: Sequence[Tensor] = [torch.empty(0, 0)] * len(counts)
    elif isinstance(encoded.pooler_output, Tensor):
        flat = encoded.pooler_output.reshape(-1, encoded.pooler_output.shape[-1])
        pieces = flat.split(counts)
    else:
        pieces = encoded.pooler_output
    for row, piece in zip(pruned.rows["image"], pieces, strict=True):
        found[row].append(piece)
    return found


def _check_finite(features: Sequence[Tensor]) -> None:
    """Refuse features that hold NaN or infinity: in an engine they spoil other requests' answers as well."""
    if not all(bool(torch.isfinite(image).all()) for image in features):
        raise Refused(
            422,
            "non_finite_features",
            "the model's features of this request's images hold NaN or infinity; another model.dtype may help",
            "messages",
        )
