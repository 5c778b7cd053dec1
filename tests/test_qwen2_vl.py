"""Qwen2-VL: a tower without windows; features, signals and positions as the model's own."""

import pytest
import torch
from family_world import WITHOUT_CLS
from qwen_world import KEEP, MANY_MIXED, MIXED, ROWS, QwenImages, Row, tiny_qwen
from qwen_world import batch as timed_batch

from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of


def batch(rows, side="right", labels=True):
    return timed_batch(rows, side, labels, timed=False)


class TestImages(QwenImages):
    """The suite of every family, on images of different sizes."""

    kind = "qwen2_vl"

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)


class TestVideos(TestImages):
    """The same with videos, in one sequence with images and alone."""

    visuals = MANY_MIXED


@pytest.fixture
def model():
    return tiny_qwen(kind="qwen2_vl")


def plug(model, name="divprune", keep=KEEP, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields))


@torch.no_grad()
def test_signals_equal_the_models_own_attention(monkeypatch):
    """The softmax of the model's eager attention, one call per frame; the four patches of a token are averaged."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as module

    seen = []
    eager_model = tiny_qwen(attention="eager", kind="qwen2_vl")
    eager = module.eager_attention_forward

    def listening(layer, *args, **kwargs):
        output, weights = eager(layer, *args, **kwargs)
        if layer is eager_model.model.visual.blocks[-1].attn:
            seen.append(weights[0])
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", listening)
    inputs = batch([MIXED[1]])  # a video of two frames of 4 x 6 tokens
    vision = plug(eager_model, "hiprune").encode(inputs)["video"]
    (group,) = vision.groups
    assert group.grid == (4, 6) and group.count == 24 and len(seen) == 2
    for item, weights in enumerate(seen):
        expected = weights.mean(1).unflatten(1, (24, 4)).mean(2)
        torch.testing.assert_close(group.signals["received_attention"][item], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_selecting_then_projecting_is_projecting_then_selecting(model):
    vision = plug(model).encode(batch([ROWS[0]]))["image"]
    (group,) = vision.groups
    chosen = torch.tensor([3, 8, 9, 21])
    again = family_of(model).project(model, group.features[0, chosen])
    torch.testing.assert_close(again, vision.slots[0][chosen], rtol=1e-5, atol=1e-6)
    whole = family_of(model).project(model, group.features.flatten(0, 1))
    assert torch.equal(whole, vision.slots[0])


def test_runs_that_are_no_images_are_refused(model):
    inputs = batch([Row((("image", (1, 8, 8), 3), ("image", (1, 8, 8), 4)), 5, 3)])
    ids = inputs["input_ids"]
    ids[0, 4] = 7
    with pytest.raises(PruningError, match="has 31 image placeholder tokens but its 2 images have 32") as error:
        plug(model).prepare(inputs)
    assert "\n" not in str(error.value)
    inputs = batch([Row((("image", (1, 8, 8), 3),), 5, 3)])
    inputs["input_ids"][0, [6, -1]] = inputs["input_ids"][0, [-1, 6]]  # a word between the placeholders of an image
    del inputs["mm_token_type_ids"]
    with pytest.raises(PruningError, match=r"runs of \[2, 13, 1\] tokens, but the images .* runs of \[16\]"):
        plug(model).prepare(inputs)


def test_grids_that_are_missing_or_disagree_are_named(model):
    inputs = batch([ROWS[0]])
    with pytest.raises(PruningError, match="pixel_values came without image_grid_thw"):
        plug(model).prepare({name: value for name, value in inputs.items() if name != "image_grid_thw"})
    with pytest.raises(PruningError, match="names 1 images of 64 patches in all, but pixel_values holds 96"):
        plug(model).prepare({**inputs, "image_grid_thw": torch.tensor([[1, 8, 8]])})
