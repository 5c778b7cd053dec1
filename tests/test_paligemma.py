"""PaliGemma: a prefix that sees itself both ways, positions from 1."""

import pytest
import torch
from family_world import WITHOUT_CLS
from gemma_world import IMAGE, ROWS, tiny_paligemma
from gemma_world import batch as world_batch

from prunetune.configs import EngineConfig
from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.testing import FamilyIdentity
from prunetune.train.engine.engine import Engine

KEEP = 5


def batch(rows, side="right", labels=True):
    return world_batch(rows, side, labels, size=16, types="suffix")


class TestIdentity(FamilyIdentity):
    """The suite of every family, on rows of no, one, two and three images."""

    keep = KEEP
    options = WITHOUT_CLS
    suppressed = (2, IMAGE)

    def make_model(self):
        return tiny_paligemma()

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)

    def grown(self, inputs, ids):
        """The prompt is the prefix, what was generated the suffix."""
        types = torch.ones_like(ids)
        types[:, : inputs["token_type_ids"].shape[1]] = inputs["token_type_ids"]
        return {**super().grown(inputs, ids), "token_type_ids": types}

    def sees(self, inputs):
        """Return the causal triangle, and both directions inside the prefix."""
        is_prefix = inputs["token_type_ids"][0] == 0
        return super().sees(inputs) | is_prefix[:, None] & is_prefix[None]


class TestPaliGemma2(TestIdentity):
    """The same with Gemma 2, some of whose layers have windows: these are longer than the sequences."""

    def make_model(self):
        return tiny_paligemma(attention="eager", text="gemma2")  # it has no other

    def as_mask(self, visible):
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)  # eager adds it


@pytest.fixture
def model():
    return tiny_paligemma()


def plug(model, name="divprune", keep=KEEP, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields))


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_positions_begin_at_one(model, policy):
    inputs = batch(ROWS)
    prepared = plug(model, position_policy=policy).prepare(inputs)
    positions, mask = prepared.inputs["position_ids"], prepared.inputs["attention_mask"].bool()
    row = positions[0][mask[0]]
    if policy == "compact":
        assert torch.equal(row, torch.arange(1, len(row) + 1))
    else:
        assert torch.equal(row, prepared.keep[0, : int(inputs["attention_mask"][0].sum())].nonzero()[:, 0] + 1)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["compact", "original"])
def test_stock_generation_counts_from_one_once(model, policy, monkeypatch):
    """It adds the 1 by itself: what reaches the model in a prefill is what forward is given."""
    pruned = plug(model, position_policy=policy)
    prompts = batch(ROWS, "left", labels=False)
    expected = pruned.prepare(prompts, padding_side="left").inputs
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    pruned.generate(**prompts, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    handle.remove()
    mask = expected["attention_mask"].bool()
    assert torch.equal(seen[0][mask], expected["position_ids"][mask])
    assert torch.equal(seen[1][:, 0], expected["position_ids"][:, -1] + 1)


def test_token_types_are_cut_with_the_sequence(model):
    inputs = batch(ROWS)
    prepared = plug(model).prepare(inputs)
    for row in range(len(ROWS)):
        mask = prepared.inputs["attention_mask"][row].bool()
        labels = prepared.inputs["labels"][row]
        assert torch.equal(prepared.inputs["token_type_ids"][row][mask], (labels[mask] != -100).long())
        assert not prepared.inputs["token_type_ids"][row][~mask].any()


@torch.no_grad()
def test_the_prefix_sees_itself_both_ways_after_pruning(model):
    inputs = plug(model).prepare(batch([ROWS[2]])).inputs
    logits = model(**inputs).logits
    causal = model(**{**inputs, "token_type_ids": torch.ones_like(inputs["token_type_ids"])}).logits
    assert (causal - logits).abs().max() > 0.01


def test_missing_token_types_and_packing_are_refused(model):
    inputs = batch(ROWS)
    del inputs["token_type_ids"]
    with pytest.raises(PruningError, match="'paligemma' reads 'token_type_ids'.*another attention mask") as error:
        plug(model).prepare(inputs)
    assert "\n" not in str(error.value)
    with pytest.raises(PruningError, match="'paligemma' can't be packed"):
        Engine(plug(model), EngineConfig(packing=True))


@torch.no_grad()
def test_signals_equal_the_eager_attention():
    eager_model = tiny_paligemma(attention="eager")
    inputs = batch([ROWS[2]])
    out = eager_model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    (group,) = plug(eager_model, "hiprune").encode(inputs)["image"].groups
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(group.signals["received_attention"], out.attentions[-1].mean(2), **close)
    torch.testing.assert_close(group.signals["object_attention"], out.attentions[1].mean(2), **close)
    assert torch.equal(group.features, out.last_hidden_state) and group.grid == (4, 4)


@torch.no_grad()
def test_selecting_then_projecting_is_projecting_then_selecting(model):
    (group,) = plug(model).encode(batch([ROWS[2]]))["image"].groups
    chosen = torch.tensor([0, 3, 17, 40])
    again = family_of(model).project(model, group.features.flatten(0, 1)[chosen])
    torch.testing.assert_close(again, group.projected.flatten(0, 1)[chosen], rtol=1e-5, atol=1e-6)


def test_wrong_numbers_of_images_are_refused(model):
    inputs = batch(ROWS)
    with pytest.raises(PruningError, match="has 96 image placeholder tokens but its 5 images have 80"):
        plug(model).prepare({**inputs, "pixel_values": inputs["pixel_values"][:5]})
