"""Adapters as a recalibration writes them, with weights that were not trained for it."""

import torch

from prunetune.configs import RecalibrateConfig, to_yaml
from prunetune.data_recipes import load_recipe
from prunetune.models import Arm, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.pruning import PruningSpec
from prunetune.train.held_out import split
from prunetune.train.record import run_record


def shifted(tensor, by=0.05):
    """Other weights, no two of them changed alike; float32 ones that no half precision has."""
    return tensor + by * torch.arange(tensor.numel()).sin().view_as(tensor)


def tuned(base, output, pruner="divprune", keep=16, change=shifted, held_out=0, recipe="tiny_world", **pruning):
    """Write ``output/adapter`` and the run's configuration, and return the adapter's folder."""
    spec = PruningSpec(pruner, keep, **pruning)
    values = {"model": {"path": str(base), "dtype": "float32"}, "pruning": spec.model_dump(),
              "output": str(output), "data": {"recipe": str(recipe), "max_samples": 32},
              "train": {"held_out": held_out}}  # fmt: skip
    config = RecalibrateConfig.model_validate(values)
    arm = Arm.load(config.model, config.pruning, device="cpu")
    tensors = {name: change(tensor.clone()) for name, tensor in projector_state(arm.model).items()}
    data = load_recipe(str(recipe), max_samples=32)
    if held_out:
        data, _ = split(data, held_out, 0)
    record = run_record(config, data, arm, tensors, 7, None)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(to_yaml(config))
    write_adapter(output / "adapter", tensors, wrap_projector(arm.model), record)
    return output / "adapter"
