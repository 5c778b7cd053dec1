"""Idefics3, and what SmolVLM has of it: several tiles per sample, patch masks, pixel shuffle."""

from types import SimpleNamespace

import pytest
import torch
from family_world import WITHOUT_CLS
from idefics_world import IMAGE, KEEP, ROWS, TOKENS, Row, Tiles, batch, tiny_idefics

from prunetune.data_recipes import Sample, Turn
from prunetune.models import Arm, wrap_projector
from prunetune.models.adapter import projector_state
from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.train.freeze import freeze_all_but_projector

kinds = pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])


class TestIdefics3(Tiles):
    """The suite of every family, on rows of no, one and several images of one or more tiles, one with padding."""

    kind = "idefics3"
    samples = ROWS


def plug(model, name="divprune", keep=KEEP, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields))


@torch.no_grad()
@kinds
def test_items_are_tiles_in_reading_order(kind):
    model = tiny_idefics(kind)
    inputs = batch(ROWS)
    prepared = plug(model).prepare(inputs)
    stock = model.model.get_image_features(
        inputs["pixel_values"], pixel_attention_mask=inputs["pixel_attention_mask"], return_dict=True
    )
    assert [len(own) for own in stock.pooler_output] == [3 * TOKENS, 0, 4 * TOKENS]  # one entry per sample
    vision = prepared.vision["image"]
    assert torch.equal(torch.cat(vision.slots), torch.cat(stock.pooler_output))
    assert prepared.kept["image"] == [KEEP] * 7 and vision.groups[0].grid == (4, 4)
    assert plug(model, scope="image").prepare(inputs).kept["image"] == [KEEP] * 7


@kinds
def test_an_answer_counts_the_tokens_of_all_its_tiles(kind):
    """Three tiles, text alone, and four: each sample's kept are all of its own, in the order of the samples."""
    model = tiny_idefics(kind)
    pruned, prompts = plug(model), batch(ROWS, "left", False)
    assert pruned.prepare(prompts).rows == {"image": [0, 0, 0, 2, 2, 2, 2]}
    processor = SimpleNamespace(batch_decode=lambda tokens, skip_special_tokens: [f" {row} " for row in range(3)])
    formatter = SimpleNamespace(prompt_batch=lambda samples: prompts)
    arm = Arm(SimpleNamespace(processor=processor), pruned, pruned.spec)
    samples = [Sample(name, "test", None, (Turn("what ?", None),)) for name in "abc"]
    answers = arm.answer(formatter, samples, max_new_tokens=1)
    assert [(answer.id, answer.text, answer.kept) for answer in answers] == [
        ("a", "0", 3 * KEEP),
        ("b", "1", 0),
        ("c", "2", 4 * KEEP),
    ]
    assert {answer.kept_per_frame for answer in answers} == {None}


@torch.no_grad()
@kinds
def test_signals_are_shuffled_and_averaged_and_padding_counts_for_nothing(kind, monkeypatch):
    """The model's own eager attention; of a tile with padding, over the queries that are none."""
    import importlib

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    seen = []
    model = tiny_idefics(kind, attention="eager")
    eager = module.eager_attention_forward

    def listening(layer, *args, **kwargs):
        output, weights = eager(layer, *args, **kwargs)
        if layer is model.model.vision_model.encoder.layers[-1].self_attn:
            seen.append(weights)
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", listening)
    vision = plug(model, "hiprune").encode(batch([ROWS[2]]))["image"]
    (group,) = vision.groups
    (weights,) = seen  # (4 tiles, H, 64, 64)
    is_query = torch.ones(4, 8, 8, dtype=torch.bool)
    is_query[1, :, 5:] = False
    is_query[1, 7:] = False  # the seventh patch row holds two rows of pixels
    is_query = is_query.flatten(1)
    shares = is_query / is_query.sum(1, keepdim=True)
    received = torch.einsum("bhqk,bq->bhk", weights, shares)
    expected = received.unflatten(-1, (4, 2, 4, 2)).mean((-3, -1)).flatten(2)
    torch.testing.assert_close(group.signals["received_attention"], expected, rtol=1e-5, atol=1e-6)
    hidden = group.signals["received_attention"][1].unflatten(-1, (4, 4))
    assert not hidden[:, :, 3].any() and (hidden[:, :, :3] > 0).all()


@torch.no_grad()
@kinds
def test_a_token_is_the_block_of_patches_at_its_place(kind):
    """A change of one patch of the picture changes the token at its place, in features and in slots."""
    model = tiny_idefics(kind)
    inputs = batch([Row(((1, 8),), 5)])
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][0, 0, :, 12:16, 20:24] += 5  # patch row 3 and column 5: token row 1 and column 2
    before, after = (plug(model).encode(own)["image"] for own in (inputs, changed))
    moved = (before.groups[0].features - after.groups[0].features)[0].norm(dim=-1)
    slots = (before.slots[0] - after.slots[0]).norm(dim=-1)
    assert int(moved.argmax()) == int(slots.argmax()) == 1 * 4 + 2


@torch.no_grad()
@kinds
def test_selecting_then_projecting_is_projecting_then_selecting(kind):
    model = tiny_idefics(kind)
    (group,) = plug(model).encode(batch(ROWS))["image"].groups
    chosen = torch.tensor([0, 7, 18, 60, 111])
    flat = group.features.flatten(0, 1)
    again = family_of(model).project(model, flat[chosen])
    torch.testing.assert_close(again, group.projected.flatten(0, 1)[chosen], rtol=1e-5, atol=1e-6)
    assert torch.equal(family_of(model).project(model, flat), group.projected.flatten(0, 1))


@pytest.mark.parametrize("name", ["divprune", "tome"])
@kinds
def test_text_alone_gives_a_zero_gradient(kind, name):
    """A blank tile is none that the model takes for padding: the projector is in the graph."""
    model = tiny_idefics(kind).requires_grad_(False)
    model.model.connector.requires_grad_(True)
    model.train()
    inputs = batch([ROWS[1]])
    with plug(model, name).attach():
        loss = model(**inputs).loss
    loss.backward()
    assert torch.equal(loss, model(**inputs).loss)
    assert all(p.grad is not None and not p.grad.any() for p in model.model.connector.parameters())


@kinds
def test_the_projector_is_the_connectors_projection(kind):
    peft_model = wrap_projector(tiny_idefics(kind))
    assert freeze_all_but_projector(peft_model).trainable == {"connector.modality_projection": 4 * 32 * 32}
    base = peft_model.get_base_model()
    base.train()
    plug(base, "tome").forward(**batch(ROWS)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in base.parameters() if p.requires_grad)
    assert set(projector_state(tiny_idefics(kind))) == {"model.connector.modality_projection.proj.weight"}
    assert hasattr(base.model, family_of(base).language_model)


@kinds
def test_wrong_numbers_of_tiles_and_empty_pixels_are_refused(kind):
    model = tiny_idefics(kind)
    inputs = batch(ROWS)
    fewer = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    fewer["pixel_values"][0, 2] = 0  # the last tile of the first sample is padding
    with pytest.raises(PruningError, match="has 112 image placeholder tokens but its 6 images have 96") as error:
        plug(model).prepare(fewer)
    assert "\n" not in str(error.value)
    with pytest.raises(PruningError, match="pixel_values holds zeros alone"):
        plug(model).prepare({**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
    moved = {**inputs, "pixel_values": inputs["pixel_values"].flip(0), "input_ids": inputs["input_ids"].clone()}
    moved["input_ids"][0, 5], moved["input_ids"][1, 2] = 9, IMAGE
    with pytest.raises(PruningError, match="would span rows 0 and 1 of the batch"):
        plug(model).prepare(moved)
