"""In launched runs, in bfloat16, every method keeps the tokens that plain evaluation keeps: by hashes, to the bit."""

import json

import pytest
import torch
from conftest import TINY_VLM
from launched import selections
from launched.selections import NAMES, all_plugs, describe
from launches import FEW, call

from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn, load_recipe
from prunetune.models import Arm
from prunetune.pruning import PruningSpec

CLIP = str(TINY_VLM / "clip")
SAMPLES = 8


@pytest.fixture(scope="module")
def evaluated():
    """What plain evaluation keeps: prompts, in one batch, on one process."""
    data = load_recipe(str(FEW), max_samples=SAMPLES)
    arm = Arm.load(ModelConfig(path=str(TINY_VLM)), PruningSpec("trimtokenator", 16), device="cpu")
    samples = []
    for index in range(SAMPLES):
        sample = data[index]
        question = Turn(sample.turns[0].question, None)
        samples.append(Sample(sample.id, sample.source, sample.image, (question,)))
    with torch.inference_mode():
        inputs = arm.place(arm.formatter(data.images).prompt_batch(samples))
        return describe(all_plugs(arm.model, arm.processor.tokenizer, CLIP), inputs)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_training_keeps_what_evaluation_keeps(evaluated, tmp_path, stage):
    arguments = ["--config", "recalibrate/tiny_divprune_16", "--data.recipe", str(FEW),
                 "--output", str(tmp_path / "run"),
                 "--pruning.pruner", "trimtokenator", "--model.dtype", "bfloat16", "--data.max_samples", str(SAMPLES),
                 "--train.batch_size", "4", "--train.max_steps", "1", "--train.learning_rate", "1e-12",
                 "--train.deepspeed", stage, "--tracking.wandb", "off",
                 # Methods are asked that read layers which the one that trains does not.
                 "--engine.stop_tower", "false"]  # fmt: skip
    call(selections.main, arguments, tmp_path, CLIP)
    trained = {}
    for rank in (0, 1):
        trained |= json.loads((tmp_path / f"rank{rank}.json").read_text())
    assert trained.keys() == evaluated.keys() and len(trained) == SAMPLES
    for sample, hashes in evaluated.items():
        assert set(NAMES) | {"features", "projected", "attention"} == hashes.keys()
        different = {name for name in hashes if trained[sample][name] != hashes[name]}
        assert not different, (sample, different)
