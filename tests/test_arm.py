"""The arm: one base, loaded and hashed once, under any pruner, budget and projector."""

import copy
import json
import shutil

import pytest
import torch
from conftest import scene_sample

from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.models import Arm, CheckpointError, loading, wrap_projector, write_adapter
from prunetune.models import arm as arm_module
from prunetune.models.adapter import projector_state
from prunetune.models.hashes import frozen_files_hash
from prunetune.pruning import PruningSpec
from prunetune.tiny_world.recipe import SceneImages

SPEC = PruningSpec("divprune", 16)


@pytest.fixture
def config(untrained_folder):
    return ModelConfig(path=str(untrained_folder), dtype="float32")


@pytest.fixture
def arm(config):
    return Arm.load(config, SPEC, device="cpu")


@pytest.fixture
def adapter(arm, untrained_folder, tmp_path):
    peft_model = wrap_projector(copy.deepcopy(arm.model))
    tensors = {name: tensor + 0.3 for name, tensor in projector_state(arm.model).items()}
    record = {"frozen_hash": frozen_files_hash(untrained_folder, ("multi_modal_projector",))}
    write_adapter(tmp_path / "adapter", tensors, peft_model, record)
    return tmp_path / "adapter"


@pytest.fixture
def questions():
    text = Sample("t", "text", None, (Turn("what color is the ring ?", None),))
    return [scene_sample(10_000_001, "where is the circle ?", None), text, scene_sample(10_000_002, "red ring", None)]


def test_arms_share_the_base_and_differ_in_their_projector_alone(arm, adapter):
    tuned, other = arm.with_adapter(adapter), arm.with_pruning(PruningSpec("fastervlm", 8))
    assert other.model is arm.model and tuned.base is arm.base
    own = set(projector_state(arm.model))
    ours, theirs = arm.model.state_dict(), tuned.model.state_dict()
    for name, tensor in ours.items():
        assert (tensor.data_ptr() == theirs[name].data_ptr()) == (name not in own), name
        assert torch.equal(tensor, theirs[name]) == (name not in own), name
    back = tuned.with_adapter(None)
    assert back.model is arm.model and back.projector_hash == arm.projector_hash != tuned.projector_hash
    assert tuned.model.lm_head.weight is tuned.model.get_input_embeddings().weight  # tied, as before


def test_a_tuned_arm_answers_as_one_that_is_loaded_for_itself(arm, adapter, config, questions):
    tuned = arm.with_adapter(adapter)
    alone = Arm.load(config, SPEC, adapter, device="cpu")
    before, one, other = (
        each.answer(each.formatter(SceneImages()), questions, max_new_tokens=6) for each in (arm, tuned, alone)
    )
    assert one == other and one != before
    assert [answer.kept for answer in one] == [16, 0, 16] and [answer.id for answer in one] == [
        "s10000001",
        "t",
        "s10000002",
    ]
    again = arm.answer(arm.formatter(SceneImages()), questions, max_new_tokens=6)
    assert again == before  # another arm's projector left this one alone


def test_many_arms_hash_the_base_once(config, adapter, monkeypatch):
    calls = []
    real = arm_module.frozen_files_hash
    monkeypatch.setattr(arm_module, "frozen_files_hash", lambda *a: (calls.append(a), real(*a))[1])
    arm = Arm.load(config, SPEC, device="cpu")
    for keep in (4, 8, 16):
        tuned = arm.with_pruning(PruningSpec("fastervlm", keep)).with_adapter(adapter)
        assert tuned.base.frozen_hash == arm.base.frozen_hash
    assert len(calls) == 1


def test_the_formatter_adds_instructions_only_where_they_are_read(arm, questions):
    plain = arm.formatter(SceneImages()).prompt_batch(questions)
    reads = arm.with_pruning(PruningSpec("trimtokenator", 16)).formatter(SceneImages()).prompt_batch(questions)
    assert "instructions" not in plain and reads["instructions"][0] == "where is the circle ?"
    assert plain["sample_ids"] == ["s10000001", "t", "s10000002"]


def test_a_foreign_adapter_is_refused_and_leaves_the_arm_alone(arm, adapter):
    before = arm.projector_hash
    record = json.loads((adapter / "prunetune.json").read_text())
    (adapter / "prunetune.json").write_text(json.dumps(record | {"frozen_hash": "0" * 64}))
    with pytest.raises(CheckpointError, match="recalibrated for another base"):
        arm.with_adapter(adapter)
    assert Arm.load(arm.base.config, SPEC, device="cpu").projector_hash == before


def test_shipped_assets_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = PruningSpec("trim", 16, text_tower="assets/tiny_vlm/clip")
    arm = Arm.load(ModelConfig(path="assets/tiny_vlm", dtype="float32"), spec, device="cpu")
    samples = [scene_sample(10_000_001, "what number is shown ?", None)]
    assert arm.answer(arm.formatter(SceneImages()), samples, 4)[0].kept == 16
    assert arm.spec.text_tower == "assets/tiny_vlm/clip"  # recorded as it was asked for


@pytest.mark.parametrize(("broken", "message"), [
    ("no processor", "holds no processor"),
    ("truncated weights", "is no vision-language checkpoint that transformers can load"),
    ("needs torchvision", r"needs torchvision; pip install 'prunetune\[video\]'"),
])  # fmt: skip
def test_a_broken_checkpoint_is_told_in_one_line(tmp_path, untrained_folder, broken, message, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(untrained_folder, folder)
    if broken == "no processor":
        for file in folder.glob("*token*"):
            file.unlink()
    if broken == "truncated weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    if broken == "needs torchvision":  # what transformers says of Qwen2.5-VL's processor

        def missing(_):
            raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library\nbut it was not found\n")

        monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(CheckpointError, match=message) as error:
        Arm.load(ModelConfig(path=str(folder), dtype="float32"), device="cpu")
    assert "\n" not in str(error.value)


def test_a_projector_that_was_trained_in_another_dtype_says_so_once(arm, adapter, capsys):
    arm.with_adapter(adapter)
    assert capsys.readouterr().out == ""
    record = json.loads((adapter / "prunetune.json").read_text())
    for dtype, lines in (("float32", 0), ("bfloat16", 1)):
        (adapter / "prunetune.json").write_text(json.dumps({**record, "trained_in": dtype}))
        arm.with_adapter(adapter)
        assert capsys.readouterr().out.count("was trained in bfloat16 and runs in float32 here") == lines
