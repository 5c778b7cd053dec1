"""Rows of one batch that end, and draw their tokens, each for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from prunetune.serving.job import Job
from prunetune.serving.text import AnswerText


class EndOfRows(StoppingCriteria):
    """Hands every row's new token to its answer, and ends the rows whose answers have ended.

    Attributes:
        answers: one a row; empty until the prompts are known.
    """

    def __init__(self) -> None:
        self.answers: list[AnswerText] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows have ended, (B,) boolean."""
        tokens = input_ids[:, -1].tolist()
        ended = [answer.add(token) for answer, token in zip(self.answers, tokens, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class DrawnRows(LogitsProcessor):
    """Draws the tokens of the rows that are sampled; the others stay as they are, and take their likeliest token.

    Each row has a generator of its own, so that what is drawn does not depend on the batch.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.rows: dict[int, tuple[Job, torch.Generator]] = {}
        for number, job in enumerate(jobs):
            if job.wanted.temperature > 0:
                generator = torch.Generator()
                if job.wanted.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed(job.wanted.seed % 2**63)
                self.rows[number] = (job, generator)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) in which nothing but the drawn token of a sampled row is left."""
        if not self.rows:
            return scores
        scores = scores.clone()
        for number, (job, generator) in self.rows.items():
            token = draw(scores[number].float().cpu(), job.wanted.temperature, job.wanted.top_p, generator)
            scores[number] = -torch.inf
            scores[number, token] = 0.0
        return scores


def draw(scores: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token drawn from scores (V,).

    Args:
        scores: logits.
        temperature: above 0.
        top_p: the likeliest tokens that together have this probability are drawn from, at least one.
        generator: on the CPU.
    """
    chances = torch.softmax(scores / max(temperature, 1e-5), dim=0)
    ordered, tokens = chances.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    ordered = torch.where(before < top_p, ordered, 0.0)
    return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
