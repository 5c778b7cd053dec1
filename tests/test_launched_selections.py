"""In launched runs, in bfloat16, every method keeps the tokens that plain evaluation keeps: by hashes, to the bit."""

import json
import subprocess

import pytest
import torch
from conftest import ROOT, TINY_VLM
from launched.selections import NAMES, all_plugs, describe

from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn, load_recipe
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.scripts.launch import launch_environment, launch_line

CLIP = str(TINY_VLM / "clip")


@pytest.fixture(scope="module")
def evaluated():
    """What plain evaluation keeps: prompts, in one batch, on one process."""
    data = load_recipe("tiny_world", max_samples=16)
    arm = Arm.load(ModelConfig(path=str(TINY_VLM)), PruningSpec("trimtokenator", 16), device="cpu")
    samples = []
    for index in range(16):
        sample = data[index]
        question = Turn(sample.turns[0].question, None)
        samples.append(Sample(sample.id, sample.source, sample.image, (question,)))
    with torch.inference_mode():
        inputs = arm.place(arm.formatter(data.images).prompt_batch(samples))
        return describe(all_plugs(arm.model, arm.processor.tokenizer, CLIP), inputs)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_training_keeps_what_evaluation_keeps(evaluated, tmp_path, stage):
    arguments = ["--config", "recalibrate/tiny_divprune_16", "--output", str(tmp_path / "run"),
                 "--pruning.pruner", "trimtokenator", "--model.dtype", "bfloat16", "--data.max_samples", "16",
                 "--train.batch_size", "4", "--train.max_steps", "2", "--train.learning_rate", "1e-12",
                 "--train.deepspeed", stage, "--tracking.wandb", "off"]  # fmt: skip
    line = launch_line(2, arguments)
    line[line.index("--module") : line.index("--module") + 2] = ["tests/launched/selections.py"]
    environment = launch_environment(2) | {"PRUNETUNE_TEST_OUTPUT": str(tmp_path), "PRUNETUNE_TEST_CLIP": CLIP}
    done = subprocess.run(line, env=environment | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True, capture_output=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    trained = {}
    for rank in (0, 1):
        trained |= json.loads((tmp_path / f"rank{rank}.json").read_text())
    assert trained.keys() == evaluated.keys() and len(trained) == 16
    for sample, hashes in evaluated.items():
        assert set(NAMES) | {"features", "projected", "attention"} == hashes.keys()
        different = {name for name in hashes if trained[sample][name] != hashes[name]}
        assert not different, (sample, different)
