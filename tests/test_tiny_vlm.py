"""The bundled tiny VLM really sees, and its training can be interrupted."""

import json

import pytest
import torch
from conftest import ROOT, TINY_VLM
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

from prunetune.configs import EvaluateConfig, load_config
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.tiny_world import SPLITS
from prunetune.tiny_world.training.model import build_tokenizer
from prunetune.tiny_world.training.run import train_tiny_vlm
from prunetune.tiny_world.training.stages import STAGES


def test_it_is_a_stock_checkpoint_of_at_most_6_mb():
    files = list(TINY_VLM.rglob("*.safetensors"))
    assert len(files) == 2 and sum(f.stat().st_size for f in files) <= 6_000_000
    model = AutoModelForImageTextToText.from_pretrained(TINY_VLM)
    assert model.config.model_type == "llava" and model.dtype == torch.float16
    clip = CLIPModel.from_pretrained(TINY_VLM / "clip")
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, clip.vision_model.state_dict()[name].to(tensor.dtype)), name


def test_its_tokenizer_is_the_one_the_code_builds():
    assert AutoProcessor.from_pretrained(TINY_VLM).tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize(("pruning", "low", "high"), [
    ((), 90, 100),
    (("--pruning.pruner", "divprune", "--pruning.keep", "16"), 50, 85),
])  # fmt: skip
def test_it_sees_and_pruning_hurts(tmp_path, pruning, low, high):
    """400 questions of untouched scenes; the bars the model was trained for."""
    overrides = ["--model.path", str(TINY_VLM), "--limit", "400", "--output", str(tmp_path / "arm"), *pruning]
    config = load_config(EvaluateConfig, ROOT / "configs" / "evaluate" / "tiny_dense.yaml", overrides)
    rows = read_results(evaluate(config))
    accuracy = 100 * sum(row.score for row in rows) / len(rows)
    assert low <= accuracy <= high


def test_the_card_names_recipe_augmentation_and_numbers():
    card = (TINY_VLM / "README.md").read_text().lower()
    for word in (
        "keep-rate augmentation",
        "scripts/train_tiny_vlm.py",
        "seed",
        "blind",
        "dense",
        *(s.name for s in STAGES),
    ):
        assert word in card, word


def test_it_was_trained_on_scenes_of_its_own_range():
    scenes = 32 * sum(stage.steps for stage in STAGES)
    assert scenes <= len(SPLITS["pretrain"])


def test_interrupted_training_ends_with_the_same_weights(tmp_path):
    def weights(folder):
        return (folder / "model" / "model.safetensors").read_bytes()

    train_tiny_vlm(tmp_path / "a" / "model", tmp_path / "a", scale=0.001)
    for _ in range(4):
        train_tiny_vlm(tmp_path / "b" / "model", tmp_path / "b", scale=0.001, stop_after=3)
    assert not [line for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines() if not json.loads(line)]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    with pytest.raises(ValueError, match="was written with seed=0, this run has 1"):
        train_tiny_vlm(tmp_path / "b" / "model", tmp_path / "b", seed=1, scale=0.001)
