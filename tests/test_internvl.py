"""InternVL: tiles of InternViT whose patches are shuffled to blocks of four; frames of videos are images."""

from __future__ import annotations

import pytest
import torch
from family_world import IMAGE, SHAPE, TEXT, WITH_CLS, lively, noise, padded, sentence

from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.testing import FamilyIdentity

SIDE, PATCH = 24, 4
COUNT = (SIDE // PATCH // 2) ** 2


def tiny(attention="sdpa", dtype=torch.float32, **vision):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    settings = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False, **vision}
    tower = InternVLVisionConfig(num_hidden_layers=3, image_size=SIDE, patch_size=PATCH, **SHAPE, **settings)
    text = Qwen2Config(num_key_value_heads=2, **TEXT)
    config = InternVLConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    config._attn_implementation = attention

    def build():
        model = InternVLForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_norm.weight" in name:  # of ones alone, a norm that is left out would hardly be seen
                    parameter.normal_(mean=1, std=0.5)
        return model

    return lively(build).to(dtype)


ROWS = (
    ((3, 1), 7, 1),
    ((), 12, 2),
    ((1, 1, 1), 5, 3),
    ((2,), 9, 4),
)
"""The tiles of each image (a video is one tile per frame), words and a seed."""


def batch(rows, side="right", labels=True):
    ids, tiles = [], []
    for images, words, seed in rows:
        ids.append(sentence([(IMAGE, COUNT * number) for number in images], words, seed))
        tiles += [noise(10 * seed + number, 3, SIDE, SIDE) for number in range(sum(images))]
    inputs = padded(ids, side, labels)
    if tiles:
        inputs["pixel_values"] = torch.stack(tiles)
    return inputs


class TestInternVL(FamilyIdentity):
    suppressed = (2, IMAGE)
    options = WITH_CLS

    def make_model(self):
        return tiny()

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)


def plug(model, name="fastervlm", keep=4, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITH_CLS.get(name, {}), **fields))


@pytest.fixture(scope="module")
def model():
    return tiny()


@torch.no_grad()
@pytest.mark.parametrize(
    "vision",
    [{}, {"use_qk_norm": False, "norm_type": "layer_norm", "attention_bias": True, "use_mean_pooling": False}],
    ids=["normed", "plain"],
)
def test_scores_are_the_eager_attention_of_the_four_patches_of_a_token(vision):
    model = tiny("eager", **vision)
    pixels = batch(ROWS)["pixel_values"]
    out = model.model.vision_tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    last = out.attentions[-1]
    layer, before = model.model.vision_tower.encoder.layer[-1], out.hidden_states[-2]
    keys = layer.attention.k_norm(layer.attention.k_proj(layer.layernorm_before(before)))
    keys = keys[:, 1:].unflatten(-1, (4, -1)).mean(2).transpose(1, 2)
    for name, signal, scores in (
        ("fastervlm", "cls_attention", last[:, :, 0, 1:]),
        ("hiprune", "received_attention", last.mean(2)[:, :, 1:]),
        ("hiprune", "object_attention", out.attentions[1].mean(2)[:, :, 1:]),
        ("tome", "keys", keys),
    ):
        (tokens,) = plug(model, name).encode(batch(ROWS))["image"].groups
        assert tokens.grid == (3, 3)
        found = tokens.signals[signal].transpose(1, 2) if signal == "keys" else tokens.signals[signal]
        for token in range(COUNT):
            row, column = 2 * (token // 3), 2 * (token % 3)
            own = [(row + r) * 6 + column + c for r in (0, 1) for c in (0, 1)]
            torch.testing.assert_close(found[..., token], scores[..., own].mean(-1), rtol=1e-5, atol=1e-6)
            block = torch.cat([out.last_hidden_state[:, 1:][:, patch] for patch in own], dim=-1)
            assert torch.equal(tokens.features[:, token].sort().values, block.sort().values)


@torch.no_grad()
def test_the_reader_is_the_layer_after_the_features():
    """Its keys are normed over all heads; as one head, [CLS] is compared with them at that head's scale."""
    model = tiny("eager")
    model.config.vision_feature_layer = -2
    pixels = batch(ROWS)["pixel_values"]
    out = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
    layer = model.model.vision_tower.encoder.layer[-1]
    before = layer.layernorm_before(out.hidden_states[-2])
    keys = layer.attention.k_norm(layer.attention.k_proj(before))
    query = layer.attention.q_norm(layer.attention.q_proj(before[:, :1]))
    scores = (query @ keys.transpose(1, 2) * 32**-0.5).softmax(-1)[:, 0, 1:]
    (tokens,) = plug(model, "prumerge").encode(batch(ROWS))["image"].groups
    for token in range(COUNT):
        row, column = 2 * (token // 3), 2 * (token % 3)
        own = [(row + r) * 6 + column + c for r in (0, 1) for c in (0, 1)]
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(tokens.signals["reader_attention"][:, token], scores[:, own].mean(-1), **close)
        torch.testing.assert_close(tokens.signals["reader_keys"][:, token], keys[:, 1:][:, own].mean(1), **close)


def test_what_puts_cls_among_the_tokens_is_refused(model):
    """The projector takes four patches side by side, and [CLS] is one."""
    with pytest.raises(PruningError, match="VisionZip reads cls_feature, which the vision tower 'internvl_vision'"):
        plug(model, "visionzip")
    for name in ("fastervlm", "hiprune", "tome", "vispruner"):
        plug(model, name)


@torch.no_grad()
def test_a_change_of_one_patch_moves_the_token_it_belongs_to(model):
    """In features, scores and slots alike: all in the order in which the LLM reads."""
    inputs = batch([((1,), 5, 1)])
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][0, :, 8:12, 20:24] += 20  # patch row 2, column 5: token row 1, column 2
    before, after = (plug(model).encode(own)["image"] for own in (inputs, changed))
    for of in (
        lambda vision: vision.groups[0].features[0].norm(dim=-1),
        lambda vision: vision.slots[0].norm(dim=-1),
    ):
        assert int((of(before) - of(after)).abs().argmax()) == 5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projecting_kept_features_gives_the_tokens_the_model_makes_of_all(dtype):
    model = tiny(dtype=dtype)
    (tokens,) = plug(model, "divprune").encode(batch(ROWS))["image"].groups
    again = family_of(model).project(model, tokens.features.flatten(0, 1))
    assert torch.equal(again, tokens.projected.flatten(0, 1))
    kept = family_of(model).project(model, tokens.features[:, ::2])
    torch.testing.assert_close(kept, tokens.projected[:, ::2])


@torch.no_grad()
def test_runs_of_placeholders_say_which_tiles_are_one_image(model):
    vision = plug(model).encode(batch(ROWS))["image"]
    assert vision.owner == ((0, 0, 0, 1, 2, 3, 4, 5, 5),)
    assert vision.lengths == [27, 9, 9, 9, 9, 18]
    kept = plug(model, keep=5, scope="image").prepare(batch(ROWS)).kept["image"]
    assert kept == [5] * 6
    assert plug(model).prepare(batch(ROWS)).kept["image"] == [12, 4, 4, 4, 4, 8]
    alone = plug(model).encode({"pixel_values": batch(ROWS)["pixel_values"]})["image"]
    assert alone.lengths == [9] * 9


@torch.no_grad()
def test_tiles_that_disagree_with_placeholders_are_refused(model):
    inputs = batch(ROWS)
    with pytest.raises(PruningError, match="81 image placeholder tokens.*72 visual tokens") as error:
        plug(model).prepare({**inputs, "pixel_values": inputs["pixel_values"][:8]})
    assert "\n" not in str(error.value)
    with pytest.raises(PruningError, match=r"must be \(tiles, 3, height, width\), got \(1, 9, 3, 24, 24\)"):
        plug(model).prepare({**inputs, "pixel_values": inputs["pixel_values"][None]})
    with pytest.raises(PruningError, match="prunes images.*'pixel_values_videos', which would run unpruned"):
        plug(model).prepare({**inputs, "pixel_values_videos": inputs["pixel_values"][None]})
