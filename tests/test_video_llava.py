"""VideoLlava: images and videos through towers of their own; the [CLS] of each frame reaches the LLM."""

from __future__ import annotations

import pytest
import torch
from family_world import IMAGE, SHAPE, TEXT, VIDEO, WITH_CLS, lively, noise, padded, sentence

from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.testing import FamilyIdentity

SIDE, PATCH, FRAMES = 24, 4, 3
COUNT = (SIDE // PATCH) ** 2


def tiny(attention="sdpa"):
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    vision = CLIPVisionConfig(num_hidden_layers=4, image_size=SIDE, patch_size=PATCH, **SHAPE)
    config = VideoLlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO
    )
    config._attn_implementation = attention
    return lively(lambda: VideoLlavaForConditionalGeneration(config))


ROWS = (
    (("image", "video"), 7, 1),
    ((), 12, 2),
    (("video", "video", "image"), 5, 3),
    (("image",), 9, 4),
)
"""Visuals, words and a seed."""


def batch(rows, side="right", labels=True):
    ids, pixels = [], {"image": [], "video": []}
    for visuals, words, seed in rows:
        runs = []
        for number, kind in enumerate(visuals):
            frames = () if kind == "image" else (FRAMES,)
            runs.append((IMAGE, COUNT) if kind == "image" else (VIDEO, FRAMES * (COUNT + 1)))
            pixels[kind].append(noise(10 * seed + number, *frames, 3, SIDE, SIDE))
        ids.append(sentence(runs, words, seed))
    inputs = padded(ids, side, labels)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels[kind]:
            inputs[name] = torch.stack(pixels[kind])
    return inputs


class TestVideoLlava(FamilyIdentity):
    suppressed = (2, IMAGE, VIDEO)
    options = WITH_CLS

    def make_model(self):
        return tiny()

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)


@pytest.fixture(scope="module")
def model():
    return tiny()


def plug(model, name="fastervlm", keep=4, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITH_CLS.get(name, {}), **fields))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_signals_are_the_eager_attention_of_the_tower_that_ran(kind):
    model = tiny("eager")
    inputs = batch(ROWS)
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"].view(-1, 3, SIDE, SIDE)
    tower = getattr(model.model, f"{kind}_tower")
    out = tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    for name, signal, expected in (
        ("fastervlm", "cls_attention", out.attentions[-2][:, :, 0, 1:]),
        ("hiprune", "received_attention", out.attentions[-2].mean(2)[:, :, 1:]),
    ):
        (tokens,) = plug(model, name).encode(inputs)[kind].groups
        torch.testing.assert_close(tokens.signals[signal], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(tokens.features, out.hidden_states[-2][:, 1:]) and tokens.grid == (6, 6)


@torch.no_grad()
@pytest.mark.parametrize(("newline", "expected"), [("rows", 15), ("all", 15), ("none", 12)])
def test_the_cls_of_a_frame_stays_with_its_patches(model, newline, expected):
    prepared = plug(model, newline=newline).prepare(batch(ROWS))
    assert prepared.kept == {"image": [4, 4, 4], "video": [expected] * 3}
    stock = model.model.get_video_features(batch(ROWS)["pixel_values_videos"]).pooler_output
    kept = prepared.inputs["mm_encoder_outputs"]["video"].pooler_output[0, : expected // 3]
    assert torch.equal(kept[0], stock[0, 0]) == (newline != "none")


@torch.no_grad()
def test_a_budget_for_a_whole_video_drops_the_cls_of_frames_without_patches(model):
    prepared = plug(model, "fastervlm", 2, scope="image").prepare(batch(ROWS))
    for image, selection in enumerate(prepared.selections["video"][0].indices):
        frames = {int(index) // COUNT for index in selection}
        assert prepared.kept["video"][image] == 2 + len(frames)


@torch.no_grad()
def test_stored_videos_meet_the_projector_of_now_with_their_cls():
    model, inputs = tiny(), batch(ROWS)
    pruned = plug(model)
    stored = pruned.encode(inputs)
    model.model.multi_modal_projector.linear_1.bias.add_(0.3)
    fresh = pruned.encode(inputs)
    for kind, vision in stored.items():
        again = pruned.family.reproject(model, vision)
        for own, other in zip(again.slots, fresh[kind].slots, strict=True):
            assert torch.equal(own, other)
        assert torch.equal(again.groups[0].projected, fresh[kind].groups[0].projected)
        assert not torch.equal(vision.slots[0], again.slots[0])


@torch.no_grad()
def test_projecting_features_gives_the_projected_tokens(model):
    for vision in plug(model).encode(batch(ROWS)).values():
        (tokens,) = vision.groups
        torch.testing.assert_close(family_of(model).project(model, tokens.features), tokens.projected)


@torch.no_grad()
def test_pixels_under_the_name_of_older_processors_are_pruned(model):
    inputs = batch([ROWS[3]])
    renamed = {("pixel_values_images" if name == "pixel_values" else name): value for name, value in inputs.items()}
    assert torch.equal(plug(model).forward(**renamed).logits, plug(model).forward(**inputs).logits)
    with plug(model).attach():
        assert torch.equal(model(**renamed).logits, plug(model).forward(**inputs).logits)


@torch.no_grad()
def test_visuals_that_disagree_with_placeholders_are_refused(model):
    inputs = batch(ROWS)
    with pytest.raises(PruningError, match="video placeholder tokens.*visual tokens per video"):
        plug(model).prepare({**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :2]})
    with pytest.raises(PruningError, match="image placeholder tokens.*visual tokens per image"):
        plug(model).prepare({**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(PruningError, match=r"must be \(videos, frames, 3, height, width\), got \(3, 3, 24, 24\)"):
        plug(model).prepare({**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, 0]})
    with pytest.raises(PruningError, match=r"must be \(images, 3, height, width\), got \(1, 3, 3, 24, 24\)"):
        plug(model).prepare({**inputs, "pixel_values": inputs["pixel_values"][None]})
