"""The teacher that runs beside the model: the same frozen LLM, all visual tokens, the original projector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunetune.configs.schema import EngineConfig
from prunetune.models import Arm
from prunetune.models.features.batches import WHOLE
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.head import Scores
from prunetune.train.engine.reading import Reads
from prunetune.train.objectives import terms
from prunetune.train.objectives.objective import Taught


@dataclass(frozen=True)
class LiveScores:
    """The teacher's distributions, made of its logits when they are asked for."""

    scores: Scores

    def kl(self, logits: Float[Tensor, "m V"], piece: slice, temperature: float) -> Float[Tensor, ""]:
        """Return the summed KL at a piece of the positions."""
        return terms.kl(logits, self.scores.logits(piece), temperature)


class LiveTeacher:
    """Runs the teacher on every batch, without a gradient, before the model itself.

    It shares every tensor with the model but the projector, so it is to be made before PEFT or DeepSpeed have the
    model, and before another projector is put into it; float8 layers, which replace the model's own, leave it as it is.

    Args:
        arm: the model with the original projector.
        config: the run's switches.
        reads: what is read of it.
        prefix: what the run's prompts begin with.
    """

    def __init__(self, arm: Arm, config: EngineConfig, reads: Reads, prefix: Int[Tensor, " P"] | None = None) -> None:
        pruned = arm.untouched().pruned
        self.model = pruned.model.eval().requires_grad_(False)
        switches = config.model_copy(update={"project_kept": False})  # all of them are
        self.engine = Engine(pruned, switches, prefix, reads)
        self._head = head_of(pruned, config, partitioned=False)

    @contextmanager
    def attached(self, device: torch.device | str) -> Iterator[None]:
        """While open, the teacher can be asked; what of it is its own is moved to a device."""
        # Quantised weights are where they belong, and do not move.
        if any(tensor.device != torch.device(device) for tensor in [*self.model.parameters(), *self.model.buffers()]):
            self.model.to(device)  # type: ignore[arg-type] # a string is as good as a device
        with self.engine.attached(), self.engine.own_head(self._head):
            yield

    def taught(self, inputs: Mapping[str, Any]) -> Taught:
        """Return what it says of a batch.

        Args:
            inputs: of the formatter, on the device; ``vision`` may hold the encoded images.
        """
        own = {name: value for name, value in inputs.items() if name not in ("cells", WHOLE)}
        if WHOLE in inputs:
            own["stored"] = inputs[WHOLE]
        with torch.no_grad():
            read = self.engine.read(self.model, own)
        return Taught(
            None if read.answers is None else LiveScores(read.answers),
            None if read.text is None else LiveScores(read.text),
            read.hidden,
            read.features,
        )
