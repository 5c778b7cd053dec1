"""Loaded models: checkpoints, adapters and their hashes, the arm that everything runs, and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunetune.lazy import importer

if __name__ != "prunetune.models":
    raise ImportError("import prunetune.models, not models: a second name would load everything twice")

if TYPE_CHECKING:
    from prunetune.models.adapter import export_merged as export_merged
    from prunetune.models.adapter import load_projector as load_projector
    from prunetune.models.arm import Answer as Answer
    from prunetune.models.arm import Arm as Arm
    from prunetune.models.errors import CheckpointError as CheckpointError
    from prunetune.models.hub import load as load
    from prunetune.models.loading import load_model as load_model
    from prunetune.models.loading import load_processor as load_processor
    from prunetune.models.peft_adapter import wrap_projector as wrap_projector
    from prunetune.models.peft_adapter import write_adapter as write_adapter
    from prunetune.models.record import read_record as read_record

# A name is imported when it is first used.
_HOMES = {
    "Answer": "arm",
    "Arm": "arm",
    "CheckpointError": "errors",
    "export_merged": "adapter",
    "load": "hub",
    "load_model": "loading",
    "load_processor": "loading",
    "load_projector": "adapter",
    "read_record": "record",
    "wrap_projector": "peft_adapter",
    "write_adapter": "peft_adapter",
}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
