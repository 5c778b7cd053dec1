"""Training that begins with an adapter's projector: which weights, what the record says, what may go on."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from launches import FEW, arguments, losses, run_several
from safetensors.torch import load_file
from tuned import shifted, tuned

from prunetune.cli import main
from prunetune.configs import ConfigError, ModelConfig, RecalibrateConfig, load_config
from prunetune.data_recipes import load_recipe
from prunetune.models import Arm, CheckpointError, wrap_projector
from prunetune.models.peft_adapter import start_projector
from prunetune.models.stored import base_hashes
from prunetune.scripts.verify import verify
from prunetune.train.checkpoints import Mark
from prunetune.train.run import _settings, start

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(untrained_folder, tmp_path_factory):
    return tuned(untrained_folder, tmp_path_factory.mktemp("first") / "run", "fastervlm", 8)


@pytest.fixture(scope="module")
def runs(untrained_folder, adapter, tmp_path_factory):
    """Training from the adapter, from an export of it, and no training in bfloat16, in the same ranks."""
    folder = tmp_path_factory.mktemp("runs")
    main(["export", "--model", str(untrained_folder), "--adapter", str(adapter), "--output", str(folder / "export")])
    begins, few = ("--train.start_from", str(adapter.parent)), ("--train.max_steps", "3")
    half = ("--model.dtype", "bfloat16", "--train.max_steps", "0")
    run_several(
        [
            arguments(untrained_folder, folder / "begun", *begins, *few),
            arguments(folder / "export", folder / "exported", *few),
            arguments(untrained_folder, folder / "half", *begins, *half),
        ]
    )
    run_several([arguments(untrained_folder, folder / "zero3", *begins, *half, "--train.deepspeed", "zero3")])
    return folder


def test_a_run_trains_as_one_of_a_base_that_has_the_projector(runs):
    assert losses(runs / "begun") == losses(runs / "exported") and len(losses(runs / "begun")) == 3
    mine, theirs = (load_file(runs / name / "adapter" / FILE) for name in ("begun", "exported"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_record_names_where_it_began_and_the_base_s_own_projector(runs, adapter, untrained_folder):
    first, record = (
        json.loads((folder / "prunetune.json").read_text()) for folder in (adapter, runs / "begun/adapter")
    )
    begun = record["started_from"]
    assert begun["projector_hash"] == first["projector_hash"] != record["projector_hash"]
    assert (begun["pruning"]["pruner"], begun["adapter"]) == ("fastervlm", "run")  # an absolute path names no machine
    own = base_hashes(untrained_folder, ("multi_modal_projector",)).original_projector_hash
    assert record["original_projector_hash"] == own and record["pruning"]["pruner"] == "divprune"
    checks = {check.link: check.holds for check in verify(runs / "begun", str(untrained_folder))}
    assert checks["projector_hash"] and checks["original_projector_hash"]
    assert "started_from" not in first and "start_from" not in first["train"]


@pytest.mark.parametrize("name", ["half", "zero3"])
def test_bfloat16_begins_with_all_digits_of_the_adapter(runs, adapter, name):
    """Stored is what was stored: the float32 weights begin with more than the model's rounded ones hold."""
    stored, before = load_file(runs / name / "adapter" / FILE), load_file(adapter / FILE)
    assert all(torch.equal(stored[key], before[key]) for key in before)
    assert any(not torch.equal(tensor.bfloat16().float(), tensor) for tensor in before.values())


def test_going_on_asks_for_the_same_projector_wherever_it_lies(runs, adapter, untrained_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    other = tuned(untrained_folder, tmp_path / "other", "fastervlm", 8, lambda tensor: shifted(tensor, 0.01))

    def started(begins):
        few = ("--train.max_steps", "3")
        _, file, *overrides = arguments(untrained_folder, runs / "begun", *few, *begins)
        return start(load_config(RecalibrateConfig, file, overrides))

    assert started(["--train.start_from", str(moved)]).finished == 3
    for begins in ([], ["--train.start_from", str(other)]):
        with pytest.raises(ConfigError, match=r"other settings for train\.start_from has finished"):
            started(begins)


def test_a_run_with_an_objective_or_settings_is_not_gone_on_with_without_them(untrained_folder, tmp_path):
    def settings(*more):
        _, file, *overrides = arguments(untrained_folder, tmp_path, *more)
        return _settings(load_config(RecalibrateConfig, file, overrides), load_recipe(str(FEW), max_samples=8), 1)

    plain = settings()
    for name, more in {
        "objective": ("--objective.terms", "{gce: 1.0}"),
        "elastic": ("--elastic.budgets", "[8, 16]"),
    }.items():
        other = settings(*more)
        assert Mark(1, plain, {}, {}).changed_settings(other) == [name]
        assert Mark(1, other, {}, {}).changed_settings(plain) == [name]
    earlier = {key: value for key, value in plain.items() if value is not None}  # of a version that knew none of them
    assert not Mark(1, earlier, {}, {}).changed_settings(plain)


def test_the_original_beside_what_trains_stays_the_base_s(adapter, untrained_folder):
    arm = Arm.load(ModelConfig(path=str(untrained_folder), dtype="float32"), device="cpu")
    before = arm.model.model.multi_modal_projector.linear_1.weight.clone()
    peft_model = wrap_projector(arm.model)
    start_projector(peft_model, adapter, arm.base.hashes)
    wrapper = peft_model.get_base_model().model.multi_modal_projector
    assert torch.equal(wrapper.original_module.linear_1.weight, before)
    assert torch.equal(wrapper.modules_to_save["default"].linear_1.weight, shifted(before))


def test_what_training_can_not_begin_with_is_one_line(adapter, untrained_folder, runs, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(untrained_folder, other)
    model = Arm.load(ModelConfig(path=str(untrained_folder), dtype="float32"), device="cpu").model
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(other)
    arm = Arm.load(ModelConfig(path=str(other), dtype="float32"), device="cpu")
    with pytest.raises(CheckpointError, match="recalibrated for another base"):
        start_projector(wrap_projector(arm.model), adapter, arm.base.hashes)
    for folder, said in ((tmp_path, "is no recalibrated projector"), (runs / "export", "is an export, whose weights")):
        with pytest.raises((SystemExit, CheckpointError)) as raised:
            main(["recalibrate", *arguments(untrained_folder, tmp_path / "o", "--train.start_from", str(folder))])
        assert said in str(raised.value) and "\n" not in str(raised.value) and not (tmp_path / "o").exists()
