"""Gemma 3: pooled tokens, images that see themselves both ways, a projector of bare parameters."""

import pytest
import torch
from family_world import WITHOUT_CLS
from gemma_world import IMAGE, ROWS, Row, tiny_gemma3
from gemma_world import batch as world_batch

from prunetune.configs import EngineConfig
from prunetune.models import load_projector, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.testing import FamilyIdentity
from prunetune.train.engine.engine import Engine
from prunetune.train.freeze import freeze_all_but_projector

KEEP = 5


def batch(rows, side="right", labels=True):
    return world_batch(rows, side, labels, size=32, types="image")


class TestIdentity(FamilyIdentity):
    """The suite of every family, on rows of no, one, two and three images."""

    keep = KEEP
    options = WITHOUT_CLS
    suppressed = (2, IMAGE)

    def make_model(self):
        return tiny_gemma3()

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)

    def grown(self, inputs, ids):
        return {**super().grown(inputs, ids), "token_type_ids": (ids == IMAGE).int()}

    def sees(self, inputs):
        """Return the causal triangle, and both directions inside an image."""
        is_image = inputs["token_type_ids"][0] == 1
        number = (is_image & ~is_image.roll(1)).cumsum(0)  # the first token is no image's
        same = (number[:, None] == number[None]) & is_image[:, None] & is_image[None]
        return super().sees(inputs) | same

    def as_mask(self, visible):
        return {"full_attention": visible, "sliding_attention": visible}


@pytest.fixture
def model():
    return tiny_gemma3()


def plug(model, name="divprune", keep=KEEP, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields))


def test_token_types_are_cut_with_the_sequence(model):
    prepared = plug(model).prepare(batch(ROWS))
    ids, types = prepared.inputs["input_ids"], prepared.inputs["token_type_ids"]
    assert torch.equal(types, (ids == IMAGE).int()) and types.sum(1).tolist() == [5, 0, 15, 10]
    left = plug(model).prepare(batch(ROWS, "left", labels=False), padding_side="left").inputs
    assert torch.equal(left["token_type_ids"], (left["input_ids"] == IMAGE).int())


@torch.no_grad()
def test_images_see_themselves_both_ways_after_pruning(model):
    """With other types the model gives other logits: that is what missing ones would do without a word."""
    inputs = plug(model).prepare(batch([ROWS[2]])).inputs
    logits = model(**inputs).logits
    inputs["mm_encoder_outputs"] = dict(inputs["mm_encoder_outputs"])
    causal = model(**{**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])}).logits
    assert (causal - logits).abs().max() > 0.01


def test_missing_token_types_are_named(model):
    inputs = batch(ROWS)
    del inputs["token_type_ids"]
    with pytest.raises(PruningError, match="'gemma3' reads 'token_type_ids'.*another attention mask") as error:
        plug(model).prepare(inputs)
    assert "\n" not in str(error.value)


def test_packing_is_refused(model):
    with pytest.raises(PruningError, match="'gemma3' can't be packed"):
        Engine(plug(model), EngineConfig(packing=True))


@torch.no_grad()
def test_signals_are_pooled_as_the_patches_are(monkeypatch):
    from transformers.models.siglip import modeling_siglip as module

    seen = []
    eager_model = tiny_gemma3(attention="eager")
    eager = module.eager_attention_forward

    def listening(layer, *args, **kwargs):
        output, weights = eager(layer, *args, **kwargs)
        if layer is eager_model.model.vision_tower.encoder.layers[-1].self_attn:
            seen.append(weights)
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", listening)
    vision = plug(eager_model, "hiprune").encode(batch([ROWS[2]]))["image"]
    (group,) = vision.groups
    (weights,) = seen  # (3, H, 64, 64)
    received = weights.mean(2).unflatten(-1, (4, 2, 4, 2)).mean((-3, -1)).flatten(2)  # 2 x 2 patches to a token
    assert group.grid == (4, 4)
    torch.testing.assert_close(group.signals["received_attention"], received, rtol=1e-5, atol=1e-6)
    stock = eager_model.model.get_image_features(batch([ROWS[2]])["pixel_values"], return_dict=True)
    hidden = stock.last_hidden_state.unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(group.features, hidden, rtol=1e-5, atol=1e-6)
    assert torch.equal(group.projected, stock.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 5, 16, 40, 48])
def test_selecting_then_projecting_is_projecting_then_selecting(model, count):
    """By the module's own call, of any number of tokens; what the module pools again has the bits it had."""
    vision = plug(model).encode(batch([ROWS[2]]))["image"]
    (group,) = vision.groups
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:count].sort().values
    entered = []
    norm = model.model.multi_modal_projector.mm_soft_emb_norm
    handle = norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    projected = family_of(model).project(model, group.features.flatten(0, 1)[chosen])
    handle.remove()
    assert torch.equal(entered[0].flatten(0, 1)[:count], group.features.flatten(0, 1)[chosen])
    torch.testing.assert_close(projected, group.projected.flatten(0, 1)[chosen], rtol=1e-5, atol=1e-6)
    if count == 48:
        assert torch.equal(projected, group.projected.flatten(0, 1))


def test_the_projector_is_two_bare_parameters(model, tmp_path):
    """PEFT trains copies of them, the freeze step counts them, an adapter holds and loads them."""
    peft_model = wrap_projector(tiny_gemma3())
    assert freeze_all_but_projector(peft_model).trainable == {"multi_modal_projector": 32 * 32 + 32}
    base = peft_model.get_base_model()
    base.train()
    for name in ("divprune", "tome"):
        base.zero_grad()
        plug(base, name).forward(**batch(ROWS)).loss.backward()
        trained = {n: p for n, p in base.named_parameters() if p.requires_grad}
        assert len(trained) == 2 and all(p.grad.abs().sum() > 0 for p in trained.values())
    tensors = {name: tensor + 0.1 for name, tensor in projector_state(model).items()}
    assert {name.partition("projector.")[2] for name in tensors} == {
        "mm_input_projection_weight",
        "mm_soft_emb_norm.weight",
    }
    write_adapter(tmp_path / "tuned", tensors, peft_model, {"frozen_hash": ""})
    load_projector(model, tmp_path / "tuned")
    assert all(torch.equal(own, tensors[name]) for name, own in projector_state(model).items())


@pytest.mark.parametrize("name", ["divprune", "tome"])
def test_text_alone_gives_a_zero_gradient(model, name):
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    inputs = batch([ROWS[1]])
    with plug(model, name).attach():
        loss = model(**inputs).loss
    loss.backward()
    assert torch.equal(loss, model(**inputs).loss)
    assert all(p.grad is not None and not p.grad.any() for p in model.model.multi_modal_projector.parameters())


@torch.no_grad()
def test_windows_count_tokens_and_not_positions():
    """In a sequence longer than the window, a window of the pruned one reaches over more text, as documented."""
    short = tiny_gemma3(window=8)
    inputs = batch([Row((1,), 12, 0, 6)], labels=False)
    prepared = plug(short, position_policy="original").prepare(inputs)
    length, visible = inputs["input_ids"].shape[1], prepared.keep[0]
    suite = TestIdentity()
    distance = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
    full = (suite.sees(inputs) & visible[None] | torch.eye(length).bool())[None, None]
    masks = {"full_attention": full, "sliding_attention": full & (distance < 8)}
    whole = plug(short, "identity", "100%", position_policy="original").prepare(inputs).inputs
    whole |= {"attention_mask": masks, "position_ids": family_of(short).positions(short, inputs)}
    apart = (short(**prepared.inputs).logits[0] - short(**whole).logits[0, visible]).abs().max()
    assert apart > 0.01


def test_wrong_numbers_of_images_are_refused(model):
    inputs = batch(ROWS)
    with pytest.raises(PruningError, match="has 96 image placeholder tokens but its 5 images have 80") as error:
        plug(model).prepare({**inputs, "pixel_values": inputs["pixel_values"][:5]})
    assert "\n" not in str(error.value)
    moved = inputs["input_ids"].clone()
    moved[0, 2], moved[1, 3] = 9, IMAGE
    with pytest.raises(PruningError, match="would span rows 0 and 1 of the batch"):
        plug(model).prepare({**inputs, "input_ids": moved})
