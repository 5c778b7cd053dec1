"""Projectors between the base's and a tuned one: their weights, their losses, and the adapter that is chosen."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from launches import FEW
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from tuned import tuned

import prunetune
from prunetune.cli import main
from prunetune.configs import EvaluateConfig, ModelConfig, load_config
from prunetune.data_recipes import load_recipe
from prunetune.evaluation.records import read_manifest
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.models import Arm, CheckpointError
from prunetune.models.adapter import projector_state
from prunetune.models.derived import at_strength, original_projector
from prunetune.models.dial import read_dial
from prunetune.pruning import PruningSpec
from prunetune.scripts.verify import verify
from prunetune.train.dial import Point, chosen, own_slice

FILE = "adapter_model.safetensors"


def test_between_is_a_straight_line_whose_ends_are_exact():
    torch.manual_seed(0)
    first, last = torch.randn(999).half(), torch.randn(999) * 1e-9  # of very different sizes
    ends = [at_strength({"w": first}, {"w": last}, strength)["w"] for strength in (0, 1)]
    assert torch.equal(ends[0], first.float()) and torch.equal(ends[1], last)
    for strength in (0.25, 0.7, 1.5, -1.0):
        expected = first.double().numpy() + strength * (last.double().numpy() - first.double().numpy())
        torch.testing.assert_close(
            at_strength({"w": first}, {"w": last}, strength)["w"].double(),
            torch.from_numpy(expected),
            rtol=1e-6,
            atol=0,
        )
    with pytest.raises(CheckpointError, match="a strength is a number"):
        at_strength({"w": first}, {"w": last}, float("nan"))


def test_the_base_s_own_weights_are_those_of_its_files_in_any_dtype(untrained_folder):
    loaded = {}
    for dtype in ("float32", "bfloat16"):
        loaded[dtype] = original_projector(
            Arm.load(ModelConfig(path=str(untrained_folder), dtype=dtype), device="cpu").base
        )
    for name, tensor in loaded["float32"].items():
        assert tensor.dtype == torch.float32 and torch.equal(loaded["bfloat16"][name], tensor), name


def test_the_lowest_pruned_loss_is_chosen_that_the_dense_one_allows():
    points = [Point(0.0, 2.0, 1.0), Point(0.25, 1.5, 1.01), Point(0.5, 1.2, 1.1), Point(1.0, 1.2, 1.5)]
    found = {within: chosen(points, within).strength for within in (None, 0.2, 0.05, 0.0, -1.0)}
    assert found == {None: 0.5, 0.2: 0.5, 0.05: 0.25, 0.0: 0.0, -1.0: 0.0}


@pytest.fixture(scope="module")
def world(untrained_folder, tmp_path_factory):
    """An adapter, and a dial of it whose third strength is made the best by an impossible allowance of all others."""
    folder = tmp_path_factory.mktemp("dial")
    adapter = tuned(untrained_folder, folder / "run", held_out=12, recipe=FEW)
    main(
        ["dial", "--adapter", str(folder / "run"), "--strengths", "0.5,1", "--choose", "--output", str(folder / "dial")]
    )
    return folder, adapter


def plain_loss(arm, data):
    """One sample at a time, by the stock model's own loss."""
    formatter, total, number = arm.formatter(data.images), 0.0, 0
    for index in range(len(data)):
        batch = arm.place(formatter.training_batch([data[index]]))
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(arm.pruned.forward(**batch).loss) * tokens
        number += tokens
    return total / number


def test_the_losses_are_those_of_the_held_out_samples_under_each_projector(world, untrained_folder):
    folder, adapter = world
    dial = read_dial(folder / "dial")
    held = own_slice(adapter, None).data
    whole = load_recipe(str(FEW), max_samples=32)
    trained = set(whole.rows["id"]) - set(held.rows["id"])
    assert (
        dial["data"]["samples"] == len(held)
        and trained
        and not set(held.rows["image"]) & {row["image"] for row in whole.rows if row["id"] in trained}
    )
    assert [point["strength"] for point in dial["points"]] == [0.0, 0.5, 1.0]
    base = Arm.load(ModelConfig(path=str(untrained_folder), dtype="float32"), PruningSpec("divprune", 16), device="cpu")
    ends = {0.0: base, 1.0: base.with_adapter(adapter)}
    for point in (dial["points"][0], dial["points"][2]):
        arm = ends[point["strength"]]
        assert point["pruned"] == pytest.approx(plain_loss(arm, held), rel=1e-5)
        assert point["dense"] == pytest.approx(plain_loss(arm.with_pruning(PruningSpec()), held), rel=1e-5)
    assert (folder / "dial" / "dial.png").read_bytes().startswith(b"\x89PNG")


def test_the_chosen_adapter_is_loaded_verified_and_evaluated_like_any_other(
    world, untrained_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    _, adapter = world
    main(["dial", "--adapter", str(adapter), "--strengths", "0.5", "--output", str(tmp_path / "dial"), "--choose",
          "--samples", "8", "--dense-within", "100"])  # fmt: skip
    dial, written = read_dial(tmp_path / "dial"), tmp_path / "dial" / "adapter"
    record = json.loads((written / "prunetune.json").read_text())
    first = json.loads((adapter / "prunetune.json").read_text())
    assert record["strength"] == dial["chosen"] and record["from"] == first["projector_hash"] == dial["projector_hash"]
    assert record["projector_hash"] != first["projector_hash"] and dial["data"]["samples"] == 8
    assert record["pruning"] == first["pruning"] and "strength" not in first
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(untrained_folder), written)
    ours = projector_state(prunetune.load(written, untrained_folder, "cpu").model)
    theirs = stock.get_base_model().model.multi_modal_projector.modules_to_save["default"].state_dict()
    assert all(torch.equal(tensor, ours[f"model.multi_modal_projector.{name}"]) for name, tensor in theirs.items())
    checks = {check.link: check.holds for check in verify(tmp_path / "dial", str(untrained_folder))}
    assert all(checks[link] for link in ("dial.json", "strength", "seal", "projector_hash", "original_projector_hash"))
    options = ["--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks", "[tiny_world_validation]",
               "--limit", "8", "--batch_size", "8", "--max_new_tokens", "3", "--adapter", str(written),
               "--output", str(tmp_path / "arm"), "--pruning.pruner", "divprune", "--pruning.keep", "16"]  # fmt: skip
    arm = read_manifest(evaluate(load_config(EvaluateConfig, None, options)))
    assert arm.projector.stored_hash == record["projector_hash"]


def test_an_export_at_a_strength_holds_the_same_projector(world, untrained_folder, tmp_path):
    _, adapter = world
    output = tmp_path / "export"
    main(["export", "--model", str(untrained_folder), "--adapter", str(adapter), "--strength", "0.7",
          "--output", str(output)])  # fmt: skip
    base, tuned_one = load_file(untrained_folder / "model.safetensors"), load_file(adapter / FILE)
    merged = load_file(output / "model.safetensors")
    for name in tuned_one:
        short = name.removeprefix("base_model.model.")
        own = next(key for key in base if key.endswith(short.removeprefix("model.")))
        expected = base[own].double() + 0.7 * (tuned_one[name].double() - base[own].double())
        torch.testing.assert_close(merged[own].double(), expected, rtol=1e-6, atol=1e-9)
    record = json.loads((output / "prunetune.json").read_text())
    assert (
        record["strength"] == 0.7
        and record["from"] == json.loads((adapter / "prunetune.json").read_text())["projector_hash"]
    )
    assert {check.holds for check in verify(output, str(untrained_folder)) if check.link != "data"} <= {True, None}
    assert "strength 0.7 of the projector" in (output / "README.md").read_text()
    assert prunetune.load(output, device="cpu").projector_hash == record["projector_hash"]


def test_an_edited_dial_is_found(world, tmp_path):
    folder, _ = world
    shutil.copytree(folder / "dial", tmp_path / "dial")
    file = tmp_path / "dial" / "dial.json"
    file.write_text(file.read_text().replace('"strength": 0.5', '"strength": 0.6'))
    assert [check.link for check in verify(tmp_path / "dial") if check.holds is False][:1] == ["dial.json"]


def test_what_can_not_be_measured_is_one_line(world, untrained_folder, tmp_path):
    _, adapter = world
    alone = shutil.copytree(adapter, tmp_path / "alone" / "adapter")
    everything = tuned(untrained_folder, tmp_path / "everything", recipe=FEW)
    other = tuned(untrained_folder, tmp_path / "other", held_out=12, recipe=FEW)
    file = other.parent / "config.yaml"
    file.write_text(file.read_text().replace("max_samples: 32", "max_samples: 24"))
    for arguments, said in (
        (["--adapter", str(alone)], "config.yaml is not there.*give --recipe"),
        (["--adapter", str(everything)], "was trained on all samples of recipe"),
        (["--adapter", str(other)], "has other samples now than"),
        (["--adapter", str(tmp_path)], "is no recalibrated projector"),
        (["--adapter", str(adapter), "--strengths", "0,x"], "--strengths is numbers with commas"),
        (["--adapter", str(adapter), "--dense-within", "1"], "add --choose"),
    ):
        with pytest.raises(SystemExit, match=said) as raised:
            main(["dial", *arguments, "--output", str(tmp_path / "o")])
        assert "\n" not in str(raised.value) and not (tmp_path / "o").exists()
    main(["dial", "--adapter", str(alone), "--base", str(untrained_folder), "--recipe", str(FEW), "--samples", "4",
          "--strengths", "1", "--output", str(tmp_path / "o")])  # fmt: skip
    assert read_dial(tmp_path / "o")["data"]["samples"] == 4 and not (tmp_path / "o" / "adapter").exists()
