"""Where training begins: with the base's projector, or an adapter's (``train.start_from``).

DeepSpeed is not imported here, so that it can be checked before a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor

from prunetune.models import read_record
from prunetune.models.peft_adapter import start_projector
from prunetune.models.record import adapter_folder, portable, required, told_pruning
from prunetune.models.seal import short
from prunetune.models.stored import BaseHashes


@dataclass(frozen=True)
class Start:
    """The adapter whose projector training begins with.

    Attributes:
        adapter: its folder, as it was given.
        projector_hash: of its stored tensors.
        pruning: what it was tuned for.
    """

    adapter: str
    projector_hash: str
    pruning: dict[str, Any]

    @classmethod
    def of(cls, adapter: str | None) -> Start | None:
        """Return what an adapter's record says; None if none is asked for.

        Raises:
            CheckpointError: if the folder is no adapter, or its record was edited.
        """
        if adapter is None:
            return None
        folder = adapter_folder(adapter)
        record = read_record(folder)
        return cls(adapter, required(record, "projector_hash", folder), dict(required(record, "pruning", folder)))

    def load(self, peft_model: PeftModel, base: BaseHashes) -> dict[str, Tensor]:
        """Put the projector into what is to be trained, and return it as it is stored.

        Args:
            peft_model: before DeepSpeed has it.
            base: what the base's files hold, which the adapter must belong to.

        Raises:
            CheckpointError: if it belongs to another base, or does not fit.
        """
        return start_projector(peft_model, adapter_folder(self.adapter), base)

    def record(self) -> dict[str, Any]:
        """Return what the record of the trained adapter says of it, which names no folder of this machine."""
        return {"adapter": portable(self.adapter), "projector_hash": self.projector_hash, "pruning": self.pruning}

    def line(self) -> str:
        """Return it for people."""
        tuned = f"{self.pruning.get('pruner')}, keep {self.pruning.get('keep')}"
        if self.pruning.get("stages"):
            tuned = told_pruning(self.pruning)
        if self.pruning.get("choose_with"):
            tuned += f", chosen by the {self.pruning['choose_with']} projector"
        return f"{self.adapter} ({short(self.projector_hash)}), tuned for {tuned}"
