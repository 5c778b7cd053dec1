"""Qwen3-VL: deepstack levels are cut, stored, projected anew and trained; videos are one run per frame."""

import pytest
import torch
from family_world import WITHOUT_CLS
from qwen_world import KEEP, MANY_MIXED, MIXED, ROWS, QwenImages, batch, tiny_qwen

from prunetune.models import load_projector, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Vision
from prunetune.pruning.families import family_of
from prunetune.train.freeze import freeze_all_but_projector


def batch_of(rows, side="right", labels=True):
    return batch(rows, side, labels, frames_apart=True, timed=False)


class TestImages(QwenImages):
    """The suite of every family, on images of different sizes."""

    kind = "qwen3_vl"

    def batch(self, rows, side, labels):
        return batch_of(rows, side, labels)


class TestVideos(TestImages):
    """The same with videos, in one sequence with images and alone."""

    visuals = MANY_MIXED


@pytest.fixture
def model():
    return tiny_qwen(kind="qwen3_vl")


def plug(model, name="divprune", keep=KEEP, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields))


@torch.no_grad()
def test_levels_are_those_of_the_kept_tokens(model):
    inputs = batch_of(MIXED)
    prepared = plug(model).prepare(inputs)
    for modality, vision in prepared.vision.items():
        stock = getattr(model.model, f"get_{modality}_features")(
            inputs["pixel_values" if modality == "image" else "pixel_values_videos"],
            inputs[f"{modality}_grid_thw"],
            return_dict=True,
        )
        output = prepared.inputs["mm_encoder_outputs"][modality]
        assert len(output.deepstack_features) == len(stock.deepstack_features) == 2
        for own, full in zip(output.deepstack_features, stock.deepstack_features, strict=True):
            for image, features in enumerate(own):
                slots = vision.slots[image]
                rows = (output.pooler_output[image][:, None] == slots[None]).all(-1).int().argmax(1)
                assert torch.equal(features, full[image][rows]) and len(features) == prepared.kept[modality][image]


@torch.no_grad()
def test_levels_reach_the_llm(model):
    """Without its levels a pruned image gives other logits: nothing else carries them."""
    inputs = plug(model).prepare(batch_of([ROWS[0]])).inputs
    logits = model(**inputs).logits
    output = inputs["mm_encoder_outputs"]["image"]
    output.deepstack_features = [[torch.zeros_like(own) for own in level] for level in output.deepstack_features]
    assert not torch.allclose(model(**inputs).logits, logits, atol=1e-3)


@torch.no_grad()
def test_stored_levels_meet_the_mergers_of_now(model, tmp_path):
    """Every merger changed after images were stored: they are read from disk as they would be encoded now."""
    inputs = batch_of(MIXED)
    pruned = plug(model)
    stored = {}
    for modality, vision in pruned.encode(inputs).items():
        vision.save(tmp_path / modality)
        stored[modality] = Vision.load(tmp_path / modality)
    for merger in (model.model.visual.merger, *model.model.visual.deepstack_merger_list):
        merger.linear_fc2.weight.mul_(1.5)
        merger.linear_fc1.bias.add_(0.2)
    without_pixels = {name: value for name, value in inputs.items() if "pixel" not in name}
    fresh = pruned.forward(**inputs).logits
    assert torch.equal(pruned.forward(**without_pixels, vision=stored).logits, fresh)
    kept = pruned.prepare(without_pixels, vision=stored)
    assert kept.kept == pruned.prepare(inputs).kept


@pytest.mark.parametrize("from_disk", [False, True], ids=["encoded", "stored"])
@pytest.mark.parametrize("name", ["divprune", "tome"])
def test_gradients_reach_every_merger(model, name, from_disk):
    model.requires_grad_(False)
    visual = model.model.visual
    mergers = [visual.merger, *visual.deepstack_merger_list]
    for merger in mergers:
        merger.requires_grad_(True)
    model.train()
    inputs = batch_of(MIXED)
    pruned = plug(model, name)
    given = {}
    if from_disk:
        with torch.no_grad():
            given = {"vision": pruned.encode(inputs)}
        inputs = {key: value for key, value in inputs.items() if "pixel" not in key}
    pruned.forward(**inputs, **given).loss.backward()
    for merger in mergers:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in merger.parameters())
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all("visual.merger." in n or "visual.deepstack_merger_list." in n for n in touched)


def test_text_alone_gives_every_merger_a_zero_gradient(model):
    model.requires_grad_(False)
    visual = model.model.visual
    for merger in (visual.merger, *visual.deepstack_merger_list):
        merger.requires_grad_(True)
    model.train()
    inputs = batch_of([ROWS[1]])
    with plug(model).attach():
        loss = model(**inputs).loss
    loss.backward()
    assert torch.equal(loss, model(**inputs).loss)
    for merger in (visual.merger, *visual.deepstack_merger_list):
        assert all(p.grad is not None and not p.grad.any() for p in merger.parameters())


def test_the_projector_is_the_merger_and_all_deepstack_mergers(model, tmp_path):
    """PEFT trains each of them, the freeze step counts them, an adapter holds and loads them."""
    peft_model = wrap_projector(tiny_qwen(kind="qwen3_vl"))
    report = freeze_all_but_projector(peft_model)
    assert set(report.trainable) == {"visual.merger", "visual.deepstack_merger_list"}
    base = peft_model.get_base_model()
    base.train()
    plug(base).forward(**batch_of(MIXED)).loss.backward()
    trained = [n for n, p in base.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 6 and all(p.grad is not None for p in base.parameters() if p.requires_grad)

    tensors = {name: tensor + 0.1 for name, tensor in projector_state(model).items()}
    assert {name.split(".")[2] for name in tensors} == {"merger", "deepstack_merger_list"} and len(tensors) == 18
    write_adapter(tmp_path / "tuned", tensors, peft_model, {"frozen_hash": ""})
    load_projector(model, tmp_path / "tuned")
    assert all(torch.equal(own, tensors[name]) for name, own in projector_state(model).items())


@torch.no_grad()
def test_signals_equal_the_models_own_attention(monkeypatch):
    """The softmax of the model's eager attention in its last block, one call per frame of a video."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as module

    seen = []
    eager_model = tiny_qwen(attention="eager", kind="qwen3_vl")
    eager = module.eager_attention_forward

    def listening(layer, *args, **kwargs):
        output, weights = eager(layer, *args, **kwargs)
        if layer is eager_model.model.visual.blocks[-1].attn:
            seen.append(weights[0])
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", listening)
    vision = plug(eager_model, "hiprune").encode(batch_of([MIXED[1]]))["video"]
    (group,) = vision.groups
    assert group.grid == (4, 6) and len(seen) == 2
    for item, weights in enumerate(seen):
        expected = weights.mean(1).unflatten(1, (24, 4)).mean(2)
        torch.testing.assert_close(group.signals["received_attention"][item], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_selecting_then_projecting_is_projecting_then_selecting(model):
    vision = plug(model).encode(batch_of([ROWS[0]]))["image"]
    family = family_of(model)
    chosen = torch.tensor([3, 8, 9, 21])
    (group,) = vision.groups
    again = family.project(model, group.features[0, chosen])
    torch.testing.assert_close(again, vision.slots[0][chosen], rtol=1e-5, atol=1e-6)
    for level, (features, projected) in enumerate(zip(vision.level_features, vision.levels, strict=True)):
        again = family.project_level(model, level, features[0][chosen])
        torch.testing.assert_close(again, projected[0][chosen], rtol=1e-5, atol=1e-6)


def test_frames_without_text_between_them_are_refused(model):
    """The model would count their rows and columns as one image's, or stop in its own code."""
    inputs = batch([MIXED[1]], timed=False)  # as Qwen2.5-VL writes a video: in one run
    with pytest.raises(PruningError, match=r"video placeholders stand in runs of \[48\].* need runs of \[24, 24\]"):
        plug(model).prepare(inputs)
    inputs = batch_of([MIXED[1]])
    inputs["video_grid_thw"] = torch.tensor([[1, 8, 12]])
    with pytest.raises(PruningError, match="names 1 videos of 96 patches in all, but pixel_values_videos holds 192"):
        plug(model).prepare(inputs)
