"""LlavaNextVideo: images as crops, videos as frames that are pooled before the projector."""

from __future__ import annotations

import pytest
import torch
from family_world import IMAGE, SHAPE, TEXT, VIDEO, WITH_CLS, lively, noise, padded, sentence

from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.testing import FamilyIdentity

SIDE, PATCH, FRAMES = 24, 4, 3
PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def tiny(attention="sdpa", side=SIDE, pool="average"):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    vision = CLIPVisionConfig(num_hidden_layers=4, image_size=side, patch_size=PATCH, **SHAPE)
    config = LlavaNextVideoConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_mode=pool,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    config._attn_implementation = attention
    return lively(lambda: LlavaNextVideoForConditionalGeneration(config))


MODEL = tiny()
ROWS = (
    (((20, 45), "video"), 7, 1),
    ((), 12, 2),
    (("video", (40, 41), "video", (24, 24)), 5, 3),
    (((45, 13),), 9, 4),
)
"""Visuals (the height and width of an image), words and a seed."""


def visuals(rows):
    """Return pixels and sizes of the images, and the pixels of videos."""
    images, sizes, videos = [], [], []
    for own, _, seed in rows:
        for number, kind in enumerate(own):
            if kind == "video":
                videos.append(noise(10 * seed + number, FRAMES, 3, SIDE, SIDE))
            else:
                images.append(noise(10 * seed + number, 5, 3, SIDE, SIDE))
                sizes.append(kind)
    found = {}
    if images:
        found |= {"pixel_values": torch.stack(images), "image_sizes": torch.tensor(sizes)}
    if videos:
        found |= {"pixel_values_videos": torch.stack(videos)}
    return found


@torch.no_grad()
def batch(rows, side="right", labels=True):
    inputs = visuals(rows)
    images = iter(())
    if "pixel_values" in inputs:  # as long as the model makes them
        sizes = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        images = iter([len(own) for own in MODEL.model.get_image_features(**sizes).pooler_output])
    ids = []
    for own, words, seed in rows:
        runs = [(VIDEO, FRAMES * 9) if kind == "video" else (IMAGE, next(images)) for kind in own]
        ids.append(sentence(runs, words, seed))
    return {**padded(ids, side, labels), **inputs}


class TestLlavaNextVideo(FamilyIdentity):
    suppressed = (2, IMAGE, VIDEO)
    options = WITH_CLS

    def make_model(self):
        return tiny()

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)


def plug(model, name="fastervlm", keep=4, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITH_CLS.get(name, {}), **fields))


@torch.no_grad()
@pytest.mark.parametrize("side", [24, 28])
def test_scores_of_a_frame_are_pooled_as_its_patches_are(side):
    """The eager attention, its mean over two by two patches in a loop; a seventh row and column belong to no token."""
    model = tiny("eager", side)
    pixels = noise(1, 2, FRAMES, 3, side, side)
    out = model.model.vision_tower(pixel_values=pixels.flatten(0, 1), output_attentions=True, output_hidden_states=True)
    patches = side // PATCH
    for name, signal, scores in (
        ("fastervlm", "cls_attention", out.attentions[-2][:, :, 0, 1:]),
        ("hiprune", "received_attention", out.attentions[-2].mean(2)[:, :, 1:]),
    ):
        vision = plug(model, name).encode({"pixel_values_videos": pixels})["video"]
        (tokens,) = vision.groups
        assert tokens.grid == (3, 3) and vision.owner == ((0, 0, 0, 1, 1, 1),)
        for token in range(9):
            row, column = 2 * (token // 3), 2 * (token % 3)
            own = [(row + r) * patches + column + c for r in (0, 1) for c in (0, 1)]
            torch.testing.assert_close(
                tokens.signals[signal][..., token], scores[..., own].mean(-1), rtol=1e-5, atol=1e-6
            )
            features = out.hidden_states[-2][:, 1:][:, own].mean(1)
            torch.testing.assert_close(tokens.features[:, token], features)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["average", "max", "conv"])
def test_projecting_kept_features_gives_the_tokens_the_model_makes_of_all(pool):
    model = tiny(pool=pool)
    inputs = visuals(ROWS)
    for kind, vision in plug(model, "divprune").encode(inputs).items():
        (tokens,) = vision.groups
        kept = tokens.features[:, ::2].flatten(0, 1)
        torch.testing.assert_close(family_of(model).project(model, kept), tokens.projected[:, ::2].flatten(0, 1))
        if kind == "video":
            stock = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
            assert torch.equal(torch.stack(list(vision.slots)), stock)


@torch.no_grad()
def test_every_frame_and_every_crop_keeps_its_budget():
    kept = plug(MODEL, newline="none").prepare(batch(ROWS)).kept
    assert kept["video"] == [4 * FRAMES] * 3 and all(4 < count <= 20 for count in kept["image"])
    kept = plug(MODEL, keep=7, newline="none", scope="image").prepare(batch(ROWS)).kept
    assert kept == {"image": [7] * 4, "video": [7] * 3}


@torch.no_grad()
def test_visuals_that_disagree_are_refused_in_one_line():
    inputs = batch(ROWS)
    videos = inputs["pixel_values_videos"]
    for change, message in (
        ({"pixel_values_videos": videos[:, :2]}, "video placeholder tokens.*visual tokens per video"),
        ({"pixel_values_videos": videos[:2]}, "video placeholder tokens.*visual tokens per video"),
        ({"pixel_values_videos": videos[0]}, r"must be \(videos, frames, 3, height, width\), got \(3, 3, 24, 24\)"),
        ({"image_sizes": inputs["image_sizes"][:3]}, "pixels of 4 images but `image_sizes` of 3"),
        ({"pixel_values": inputs["pixel_values"][:, :2]}, "do not hold the crops that `image_sizes` ask for"),
        ({"image_sizes": inputs["image_sizes"].flip(0)}, "image 1 would span rows 0 and 2"),
    ):
        with pytest.raises(PruningError, match=message) as error:
            plug(MODEL).prepare({**inputs, **change})
        assert "\n" not in str(error.value)
