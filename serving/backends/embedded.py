"""The model in this process: micro-batches through `PrunedModel.generate`, the path of `prunetune evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunetune.configs.serving import LimitsConfig
from prunetune.models.arm import Arm
from prunetune.pruning.rewrite import Pruned
from prunetune.serving.backends.base import Prompts
from prunetune.serving.backends.rows import DrawnRows, EndOfRows
from prunetune.serving.errors import ServingError
from prunetune.serving.job import Job
from prunetune.serving.text import AnswerText


class Embedded:
    """Answers batches with an arm, every family and pruning stages included.

    Args:
        arm: what is served.
        limits: the longest answer of requests that name none.

    Raises:
        ServingError: for a model whose own settings ask for beams, which can't be told as they come.
    """

    def __init__(self, arm: Arm, limits: LimitsConfig) -> None:
        self.arm = arm
        self.prompts = Prompts(arm, limits)
        settings: Any = arm.model.generation_config
        if (settings.num_beams or 1) > 1:
            raise ServingError(f"the model's generation_config.json has num_beams {settings.num_beams}; set it to 1")
        ends = settings.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or ())

    def run(self, jobs: Sequence[Job]) -> None:
        """Answer a batch; rows that end early are told at once, and do not wait for the longest."""
        end = EndOfRows()

        def begin(pruned: Pruned) -> None:
            tokenizer = self.arm.processor.tokenizer  # type: ignore[attr-defined] # of every processor with text
            for job, row in zip(jobs, self.prompts.rows(pruned, jobs), strict=True):
                end.answers.append(AnswerText(job, tokenizer, self.ends, row.longest, row.usage))

        longest = max(job.wanted.longest or self.prompts.limits.max_tokens for job in jobs)
        with torch.inference_mode():
            self.arm.pruned.generate(
                **self.prompts.batch(jobs),
                seen=begin,
                max_new_tokens=longest,
                do_sample=False,
                stopping_criteria=[end],
                logits_processor=[DrawnRows(jobs)],
            )

    def close(self) -> None:
        """Nothing is held."""
