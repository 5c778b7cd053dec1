"""What trains: low-rank changes of the projector, which are stored as a whole one."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY_VLM
from launches import arguments, run_several
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from tuned import tuned

from prunetune.cli import main
from prunetune.configs import ConfigError, RecalibrateConfig, TrainConfig, load_config
from prunetune.models import CheckpointError, load_model
from prunetune.models.adapter import projector_state
from prunetune.models.peft_adapter import start_projector, unwrapped_projector, wrap_low_rank
from prunetune.models.stored import base_hashes
from prunetune.scripts.verify import verify
from prunetune.train.ema import RunningMean
from prunetune.train.freeze import freeze_all_but_projector, wrapped
from prunetune.train.masters import gathered_projector, trained_parameters
from prunetune.train.run import start

FILE = "adapter_model.safetensors"
LORA = TrainConfig(variant="lora", lora_rank=2)


@pytest.fixture
def base(untrained_folder):
    return load_model(str(untrained_folder))[0]


def livened(peft_model):
    """As if it had been trained."""
    with torch.no_grad():
        for number, parameter in enumerate(trained_parameters(peft_model).values()):
            parameter.add_(0.1 * torch.arange(parameter.numel()).add(number).cos().view_as(parameter))
    return peft_model


def test_low_rank_changes_of_the_projector_alone_train(base):
    sizes = {name: tuple(tensor.shape) for name, tensor in projector_state(base).items() if tensor.ndim == 2}
    peft_model = wrapped(base, LORA)
    report = freeze_all_but_projector(peft_model)
    assert report.trainable == {"multi_modal_projector (low-rank)": sum(2 * (a + b) for a, b in sizes.values())}
    assert report.modules["multi_modal_projector"] == sum(t.numel() for t in unwrapped_projector(peft_model).values())
    other = wrapped(load_model(str(TINY_VLM))[0], LORA)
    next(other.get_base_model().lm_head.parameters()).requires_grad_(True)
    with pytest.raises(CheckpointError, match="also training"):
        freeze_all_but_projector(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_stored_as_peft_merges_it(untrained_folder, dtype):
    base = load_model(str(untrained_folder), dtype=dtype)[0]
    before = {name: tensor.clone() for name, tensor in projector_state(base).items()}
    peft_model = wrapped(base, LORA)
    first = gathered_projector(peft_model)  # it begins as it is
    assert all(torch.equal(first[name], tensor.float()) for name, tensor in before.items())
    stored = gathered_projector(livened(peft_model))
    mean = RunningMean(peft_model, 0.9)
    mean.begin(None)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in mean.projector().items())
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    merged = projector_state(peft_model.float().merge_and_unload())
    assert stored.keys() == merged.keys() == before.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
        change = (tensor.double() - before[name].double()).abs().max()
        assert (change > 0.01) == name.endswith("weight") and (change == 0) == name.endswith("bias")


def test_it_starts_from_an_adapter(untrained_folder, base, tmp_path):
    adapter = tuned(untrained_folder, tmp_path / "run")
    peft_model = wrapped(base, LORA)
    start_projector(peft_model, adapter, base_hashes(untrained_folder, ("multi_modal_projector",)))
    found = gathered_projector(peft_model)
    expected = {name.removeprefix("base_model.model."): t for name, t in load_file(adapter / FILE).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_has_no_linear_layers_is_one_line(untrained_folder, base, tmp_path):
    base.model.multi_modal_projector = torch.nn.LayerNorm(4)
    with pytest.raises(
        CheckpointError, match=r"lora changes linear layers.*\(multi_modal_projector\) has none"
    ) as raised:
        wrap_low_rank(base, 2)
    assert "\n" not in str(raised.value)
    more = ["--train.variant", "lora", "--train.trainable", "[multi_modal_projector]"]
    with pytest.raises((SystemExit, ConfigError), match=r"leave one of the two out"):
        main(["recalibrate", *arguments(untrained_folder, tmp_path / "o", *more)])
    assert not (tmp_path / "o").exists()


OPTIONS = ("--train.variant", "lora", "--train.lora_rank", "2", "--train.save_steps", "1", "--train.max_steps", "2",
           "--train.held_out", "8", "--train.eval_steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def runs(untrained_folder, tmp_path_factory):
    """A run, the same gone on with after a kill, and one under ZeRO-3 in bfloat16 with a running mean."""
    folder = tmp_path_factory.mktemp("lora")
    whole = arguments(untrained_folder, folder / "whole", *OPTIONS)
    printed = run_several([whole])
    shutil.copytree(folder / "whole", folder / "killed")
    (folder / "killed" / "checkpoint-2" / "complete.json").unlink()  # as if killed while this one was being written
    (folder / "killed" / "finished.json").unlink()
    assert "resuming from" in run_several([arguments(untrained_folder, folder / "killed", *OPTIONS)])
    half = ("--model.dtype", "bfloat16", "--train.deepspeed", "zero3", "--train.ema", "0.5")
    run_several([arguments(untrained_folder, folder / "zero3", *OPTIONS, *half)])
    return folder, printed


@pytest.mark.parametrize("name", ["whole", "zero3"])
def test_a_run_stores_a_whole_projector_whose_changes_have_the_rank(runs, untrained_folder, name):
    folder, printed = runs
    adapter = folder / name / "adapter"
    assert "[TRAINABLE] multi_modal_projector (low-rank)" in printed
    stock = AutoModelForImageTextToText.from_pretrained(untrained_folder)
    before = {key: tensor.clone() for key, tensor in projector_state(stock).items()}
    theirs = PeftModel.from_pretrained(stock, adapter).get_base_model().model.multi_modal_projector
    after = {f"model.multi_modal_projector.{k}": t for k, t in theirs.modules_to_save["default"].state_dict().items()}
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        first = before[key] if name == "whole" else before[key].bfloat16().float()
        change = (tensor - first).double()
        if tensor.ndim == 2:
            sizes = torch.linalg.svdvals(change)
            assert sizes[0] > 1e-4 and sizes[2] < 1e-3 * sizes[0], sizes[:4]
        else:
            assert not change.any()
    record = json.loads((adapter / "prunetune.json").read_text())
    assert (record["train"]["variant"], record["train"]["lora_rank"], record["stored_in"]) == ("lora", 2, "float32")
    assert not [check for check in verify(folder / name, str(untrained_folder)) if check.holds is False]


def test_a_killed_run_goes_on_to_the_same_projector(runs):
    folder, _ = runs
    rows = [(folder / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    found = [[(r["step"], r.get("loss"), r.get("held_out_loss")) for r in map(json.loads, lines)] for lines in rows]
    assert found[0] == found[1]
    for adapter in ("adapter", "best"):
        mine, other = (load_file(folder / name / adapter / FILE) for name in ("whole", "killed"))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_another_rank_is_another_run(runs, untrained_folder, monkeypatch):
    folder, _ = runs
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, file, *overrides = arguments(untrained_folder, folder / "whole", *OPTIONS, "--train.lora_rank", "4")
    with pytest.raises(ConfigError, match="other settings for train has finished"):
        start(load_config(RecalibrateConfig, file, overrides))
