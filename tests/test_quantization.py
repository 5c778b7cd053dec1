"""4- and 8-bit bases: what is said where they can't be, and what of them stays as stored. None of it needs a GPU."""

import importlib.util

import pytest
import torch
from conftest import ROOT, TINY_VLM
from qwen_world import tiny_qwen
from transformers import AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module

from prunetune.cli import main
from prunetune.configs import ConfigError, EvaluateConfig, ModelConfig, RecalibrateConfig, load_config, to_yaml
from prunetune.models import Arm, CheckpointError, load_model, loading
from prunetune.models.quantization import quantization_config
from prunetune.pruning import PruningSpec
from prunetune.train.preflight import check_before_launch

TINY = ["--model.path", str(TINY_VLM), "--model.dtype", "bfloat16"]


def quantised_linears(model, config):
    """Which linear layers transformers would replace, by its own rule."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name in names if should_convert_module(name, config.llm_int8_skip_modules)}, set(names)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_llms_linear_layers_alone_are_quantised(bits):
    model, _ = load_model(str(TINY_VLM))
    config = quantization_config(TINY_VLM, bits, "bfloat16")
    assert "model.multi_modal_projector" in config.llm_int8_skip_modules
    quantised, linears = quantised_linears(model, config)
    assert quantised == {name for name in linears if name.startswith("model.language_model.")} and quantised
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == "4bit", bits == "8bit")
    if bits == "4bit":
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_merger_inside_the_tower_stays_as_well(tmp_path):
    model = tiny_qwen()
    model.config.save_pretrained(tmp_path)
    config = quantization_config(tmp_path, "4bit", "bfloat16")
    assert {"model.visual", "model.visual.merger", "lm_head"} <= set(config.llm_int8_skip_modules)
    quantised, linears = quantised_linears(model, config)
    assert quantised == {name for name in linears if name.startswith("model.language_model.")} and quantised


def test_without_a_gpu_or_the_package_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = [
        "evaluate",
        *TINY,
        "--tasks",
        "[tiny_world]",
        "--output",
        str(tmp_path / "o"),
        "--model.quantization",
        "4bit",
    ]
    with pytest.raises(SystemExit, match="model.quantization 4bit needs an NVIDIA GPU, and there is none") as error:
        main(line)
    assert "\n" not in str(error.value).strip()
    config = load_config(RecalibrateConfig, ROOT / "configs/recalibrate/tiny_divprune_16.yaml",
                         ["--model.quantization", "8bit"])  # fmt: skip
    with pytest.raises(CheckpointError, match="8bit needs an NVIDIA GPU"):
        check_before_launch(config)
    three = config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": "zero3"})})
    with pytest.raises(ConfigError, match="8bit can't be partitioned by ZeRO-3; set train.deepspeed to zero2"):
        check_before_launch(three)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs bitsandbytes; pip install 'prunetune\[quant\]'"):
        load_model(str(TINY_VLM), quantization="4bit")


def test_quantised_weights_are_made_where_they_stay_and_the_stored_ones_are_hashed(monkeypatch):
    """bitsandbytes itself is left out here: what transformers is asked for is looked at, and plain weights go on."""
    asked = {}

    class Loader:
        @staticmethod
        def from_pretrained(folder, quantization_config=None, device_map=None, **options):
            asked.update(config=quantization_config, device_map=device_map)
            return AutoModelForImageTextToText.from_pretrained(folder, **options)

    monkeypatch.setattr(loading, "check_quantization", lambda quantization: None)
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", Loader)
    plain = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu")
    assert asked == {"config": None, "device_map": None}
    config = ModelConfig(path=str(TINY_VLM), dtype="float32", quantization="4bit")
    arm = Arm.load(config, PruningSpec("divprune", 16), device="cpu")
    assert asked["config"].load_in_4bit and asked["device_map"] == {"": torch.device("cpu")}
    assert arm.base.hashes == plain.base.hashes and arm.projector_hash == plain.projector_hash


def test_the_configuration_takes_two_widths_and_says_nothing_of_none():
    lines = [*TINY, "--tasks", "[tiny_world]", "--output", "o"]
    config = load_config(EvaluateConfig, None, [*lines, "--model.quantization", "4bit"])
    assert config.model.quantization == "4bit" and "quantization: 4bit" in to_yaml(config)
    # Manifests and records of those who do not use it stay what they were.
    assert "quantization" not in load_config(EvaluateConfig, None, lines).model_dump()["model"]
    assert "profile" not in PruningSpec("divprune", 16).model_dump()
    with pytest.raises(ConfigError, match="model.quantization: .*'4bit' or '8bit', got '3bit'"):
        load_config(EvaluateConfig, None, [*lines, "--model.quantization", "3bit"])
