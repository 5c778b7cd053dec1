"""Adapters as a recalibration writes them, with weights that were not trained for it."""

import torch

from prunetune.configs import RecalibrateConfig
from prunetune.data_recipes import load_recipe
from prunetune.models import Arm, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.pruning import PruningSpec
from prunetune.train.record import run_record


def shifted(tensor, by=0.05):
    """Other weights, no two of them changed alike; float32 ones that no half precision has."""
    return tensor + by * torch.arange(tensor.numel()).sin().view_as(tensor)


def tuned(base, output, pruner="divprune", keep=16, change=shifted, **more):
    """Write ``output/adapter``, and return that folder."""
    values = {"model": {"path": str(base), "dtype": "float32"}, "pruning": PruningSpec(pruner, keep).model_dump(),
              "output": str(output), "data": {"recipe": "tiny_world", "max_samples": 4}, **more}  # fmt: skip
    config = RecalibrateConfig.model_validate(values)
    arm = Arm.load(config.model, config.pruning, device="cpu")
    tensors = {name: change(tensor.clone()) for name, tensor in projector_state(arm.model).items()}
    record = run_record(config, load_recipe("tiny_world", max_samples=4), arm, tensors, 7, None)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(f"model: {{path: {base}}}\n")
    write_adapter(output / "adapter", tensors, wrap_projector(arm.model), record)
    return output / "adapter"
