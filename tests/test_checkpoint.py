"""The one door for weights: what is saved is what is loaded, here, in stock PEFT and in stock transformers."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from prunetune.configs import ModelConfig
from prunetune.models import (
    Arm,
    CheckpointError,
    export_merged,
    load_model,
    load_processor,
    wrap_projector,
    write_adapter,
)
from prunetune.models.adapter import projector_state
from prunetune.models.hashes import frozen_files_hash, tensor_hash
from prunetune.models.stored import base_hashes
from prunetune.outputs import OutputError
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.train.freeze import freeze_all_but_projector
from prunetune.train.trainer import gathered_projector

PROJECTORS = ("multi_modal_projector",)


@pytest.fixture
def adapter(untrained_folder, tmp_path):
    """Write an adapter of the untrained base whose projector was changed by ``change``."""

    def write(change=None, name="adapter"):
        model, _ = load_model(str(untrained_folder))
        peft_model = wrap_projector(model)
        tensors = gathered_projector(peft_model)
        if change is not None:
            tensors = {key: change(value) for key, value in tensors.items()}
        record = {"base_model": "untrained", **base_hashes(untrained_folder, PROJECTORS).record()}
        write_adapter(tmp_path / name, tensors, peft_model, record)
        return tmp_path / name

    return write


def tuned(folder, adapter):
    """The model with an adapter's projector."""
    return Arm.load(ModelConfig(path=str(folder), dtype="float32"), adapter=adapter, device="cpu").model


def shifted(tensor):
    return tensor + 0.05 * torch.arange(tensor.numel()).sin().view_as(tensor)


@torch.no_grad()
def test_step_zero_adapter_is_training_free_bit_for_bit(untrained_folder, adapter, formatter, samples):
    spec = PruningSpec("divprune", 16)
    free = PrunedModel(load_model(str(untrained_folder))[0], spec)
    after = PrunedModel(tuned(untrained_folder, adapter()), spec)
    batch, prompts = formatter.training_batch(samples), formatter.prompt_batch(samples)
    assert torch.equal(free.forward(**batch).logits, after.forward(**batch).logits)
    assert torch.equal(
        free.generate(**prompts, max_new_tokens=5).tokens, after.generate(**prompts, max_new_tokens=5).tokens
    )


def test_only_projector_tensors_differ_between_the_arms(untrained_folder, adapter):
    free = load_model(str(untrained_folder))[0]
    one, other = free.state_dict(), tuned(untrained_folder, adapter(shifted)).state_dict()
    assert one.keys() == other.keys()
    differ = {name for name in one if tensor_hash({"": one[name]}) != tensor_hash({"": other[name]})}
    assert differ == set(projector_state(free)) and len(differ) == 4


@torch.no_grad()
def test_stock_peft_loads_the_adapter_with_the_same_logits(untrained_folder, adapter, formatter, samples):
    folder = adapter(shifted)
    ours = tuned(untrained_folder, folder)
    base = AutoModelForImageTextToText.from_pretrained(untrained_folder).eval()
    batch = formatter.training_batch(samples)
    stock = base(**batch).logits
    theirs = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(theirs(**batch).logits, ours(**batch).logits)
    assert not torch.equal(stock, ours(**batch).logits)
    with theirs.disable_adapter():
        assert torch.equal(theirs(**batch).logits, stock)


@torch.no_grad()
def test_merged_export_is_a_stock_checkpoint(untrained_folder, adapter, formatter, samples, tmp_path):
    model, processor = tuned(untrained_folder, adapter(shifted)), load_processor(str(untrained_folder))
    export_merged(model, processor, tmp_path / "merged")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    batch = formatter.training_batch(samples)
    assert torch.equal(stock(**batch).logits, model(**batch).logits)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"
    binary = torch.load(tmp_path / "merged" / "mm_projector.bin", weights_only=True)
    weight = model.model.multi_modal_projector
    assert set(binary) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert torch.equal(binary["model.mm_projector.2.weight"], weight.linear_2.weight)


def test_an_adapter_holds_the_projector_alone(adapter):
    folder = adapter()
    written = {"adapter_model.safetensors", "adapter_config.json", "prunetune.json", "README.md"}
    assert {p.name for p in folder.iterdir()} == written
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert all(name.startswith("base_model.model.model.multi_modal_projector.") for name in names)


def test_a_projector_for_another_base_is_refused(untrained_folder, adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(untrained_folder, other)
    weights = load_file(other / "model.safetensors")
    name = next(n for n in weights if "language_model" in n)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="recalibrated for another base"):
        tuned(other, adapter())


def test_the_frozen_hash_ignores_the_projector_and_nothing_else(untrained_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(untrained_folder, other)
    weights = load_file(other / "model.safetensors")
    before = frozen_files_hash(other, PROJECTORS)
    for part, same in (("multi_modal_projector", True), ("vision_tower", False), ("language_model", False)):
        name = next(n for n in weights if part in n)
        save_file(weights | {name: weights[name] * 2 + 1}, other / "model.safetensors", metadata={"format": "pt"})
        assert (frozen_files_hash(other, PROJECTORS) == before) is same, part


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "prunetune.json").unlink(), "prunetune.json is missing"),
    (lambda f: (f / "prunetune.json").write_text("{"), "is not valid JSON"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"half a fi"), "can't be read"),
    (lambda f: _rewrite(f, lambda t: {k: v for k, v in t.items() if "bias" not in k}), "the model expects"),
    (lambda f: _rewrite(f, lambda t: {k: v[..., :3].contiguous() for k, v in t.items()}), "another size"),
])  # fmt: skip
def test_a_damaged_adapter_says_what_is_wrong(untrained_folder, adapter, damage, message):
    folder = adapter()
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        tuned(untrained_folder, folder)


def _rewrite(folder, change):
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def test_a_failed_save_keeps_the_old_adapter(adapter, monkeypatch):
    folder = adapter(shifted)
    before = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("prunetune.models.peft_adapter.save_file", _disk_full)
    with pytest.raises(OutputError, match="No space left"):
        adapter()
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert json.loads((folder / "prunetune.json").read_text())["frozen_hash"]


def _disk_full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a checkpoint that could be fetched"):
        load_model("nobody/no-such-model")
    with pytest.raises(CheckpointError, match="no vision-language checkpoint"):
        load_model(str(tmp_path))


# ---- the freeze step -------------------------------------------------------------------------------------------


def test_exactly_the_projector_trains_and_the_report_counts_all(model):
    total = sum(p.numel() for p in model.parameters())
    peft_model = wrap_projector(model)
    report = freeze_all_but_projector(peft_model)
    assert report.trainable == {"multi_modal_projector": 128 * 128 * 2 + 2 * 128}
    assert sum(report.modules.values()) + sum(report.trainable.values()) == total
    assert any(line.startswith("[TRAINABLE] multi_modal_projector") for line in report.lines())
    assert any(line.startswith("[FROZEN]    vision_tower") for line in report.lines())


def test_a_module_that_does_not_exist_stops_instead_of_training_nothing(model):
    with pytest.raises(CheckpointError, match="no module is called 'multi_modal_projectr'.*multi_modal_projector"):
        wrap_projector(model, ["multi_modal_projectr"])


def test_an_empty_trainable_set_stops(model):
    with pytest.raises(CheckpointError, match="nothing would train"):
        wrap_projector(model, [])
    peft_model = wrap_projector(model)
    for parameter in peft_model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CheckpointError, match="nothing would train"):
        freeze_all_but_projector(peft_model)


def test_training_anything_else_stops(model):
    peft_model = wrap_projector(model)
    next(p for n, p in peft_model.named_parameters() if "layers.1.mlp" in n).requires_grad_(True)
    with pytest.raises(CheckpointError, match="exactly the projector.*also training .*layers.1.mlp"):
        freeze_all_but_projector(peft_model)


def test_training_another_module_stops(untrained_folder):
    peft_model = wrap_projector(load_model(str(untrained_folder))[0], ["lm_head"])
    with pytest.raises(CheckpointError, match="exactly the projector"):
        freeze_all_but_projector(peft_model)
