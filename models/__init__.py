"""Loaded models: checkpoints, adapters and their hashes, the arm that everything runs, and ranks."""

if __name__ != "prunetune.models":
    raise ImportError("import prunetune.models, not models: a second name would load everything twice")

from prunetune.models.adapter import export_merged, load_projector, read_record, wrap_projector, write_adapter
from prunetune.models.arm import Answer, Arm
from prunetune.models.loading import CheckpointError, load_model, load_processor

__all__ = [
    "Answer",
    "Arm",
    "CheckpointError",
    "export_merged",
    "load_model",
    "load_processor",
    "load_projector",
    "read_record",
    "wrap_projector",
    "write_adapter",
]
