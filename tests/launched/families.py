"""Projectors of tiny models trained under DeepSpeed, where the ranks meet images, videos and text alone at once.

Called in ranks with a stage, the file to write to, and names of :data:`FAMILIES`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

FAMILIES = {
    "llava": ("test_llava", "TestLlava"),
    "qwen2_5_vl": ("test_qwen2_5_vl", "TestVideos"),
    "qwen3_vl": ("test_qwen3_vl", "TestVideos"),
}
"""A plain family, one with positions in three parts, one with deepstack levels: the identity suites of each."""
METHODS = ("divprune", "tome")
RATE = 0.02


def suite_of(family: str) -> Any:
    """Return a family's identity suite, which makes its model and batches; None where there is none yet."""
    module, name = FAMILIES[family]
    if not (Path(__file__).parents[1] / f"{module}.py").is_file():
        return None
    return getattr(importlib.import_module(module), name)()


def batches(suite: Any, rank: int) -> list[dict]:
    """Return a batch of one row for each step: neighbouring rows on the two ranks, and at last text alone on both."""
    rows = suite.rows()
    texts = suite.texts()
    steps = [rows[(step + rank) % len(rows)] for step in range(len(rows))] + texts[:1]
    return [suite.asked([row]) for row in steps]


def main(stage: int, file: Path, families: list[str]) -> None:
    """Train every family by every method, and write losses and projectors of all ranks."""
    import deepspeed

    from prunetune.configs import EngineConfig
    from prunetune.models import wrap_projector
    from prunetune.train.engine.engine import Engine
    from prunetune.train.trainer import gathered_projector, use_plain_collectives_on_cpu

    use_plain_collectives_on_cpu()
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        # Nothing is small enough to stay whole: every module's weights are gathered when it runs.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    found = {}
    for family in families:
        suite = suite_of(family)
        for method in METHODS:
            model = suite.make_model()
            pruned = suite.plug(model, method)
            peft_model = wrap_projector(model).train()
            trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
            engine, *_ = deepspeed.initialize(model=peft_model, optimizer=torch.optim.SGD(trained, RATE), config=config)
            losses = []
            switched = Engine(pruned, EngineConfig())
            with switched.attached():
                for inputs in batches(suite, rank):
                    suite.forget(model)
                    loss = switched.summed_loss(engine, inputs)
                    loss = loss / max(1, len(switched.rows.targets))
                    engine.backward(loss)
                    engine.step()
                    losses.append(float(loss.detach()))
            found[family, method] = (losses, gathered_projector(peft_model))
            engine.destroy()
    torch.save(found, f"{file}.{rank}")
    torch.distributed.destroy_process_group()
