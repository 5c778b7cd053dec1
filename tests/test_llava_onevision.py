"""LlavaOnevision: crops, several images in one row, grids and frames that are interpolated behind the projector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_world import IMAGE, SHAPE, TEXT, VIDEO, WITHOUT_CLS, lively, noise, padded, sentence

from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Vision, build_pruner
from prunetune.pruning.families import family_of
from prunetune.testing import FamilyIdentity

SIDE, PATCH, FRAMES = 20, 4, 2  # an odd number of patches, so that frames are not pooled two by two
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def tiny(attention="sdpa", aspect="anyres_max_9"):
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(num_hidden_layers=3, image_size=SIDE, patch_size=PATCH, vision_use_head=False, **SHAPE)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(num_key_value_heads=2, **TEXT),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=aspect,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    config._attn_implementation = attention
    return lively(lambda: LlavaOnevisionForConditionalGeneration(config))


SMALL = "anyres_max_2"
"""An aspect ratio under which grids of more than two crops are interpolated."""
MODELS = {aspect: tiny(aspect=aspect) for aspect in ("anyres_max_9", SMALL)}
ROWS = (
    (((20, 37), "video"), 7, 1),
    ((), 12, 2),
    (((60, 60), (13, 40), (20, 20)), 5, 3),
    (("video", "video"), 4, 5),
    (((38, 21),), 9, 4),
)
"""Visuals (the height and width of an image), words and a seed."""
LARGE = (
    (((59, 43),), 6, 1),
    (((20, 37), "video"), 7, 2),
    ((), 11, 3),
    (((60, 60),), 5, 4),
    (((43, 60), (20, 20), "video"), 5, 5),
    (((40, 60),), 5, 6),
)
"""Images of which those of rows 0, 3 and 5 are cut into more crops than ``anyres_max_2`` has room for."""


def visuals(rows):
    images, sizes, videos, per_row = [], [], [], []
    for own, _, seed in rows:
        own_images = 0
        for number, kind in enumerate(own):
            if kind == "video":
                videos.append(noise(10 * seed + number, FRAMES, 3, SIDE, SIDE))
            else:
                images.append(noise(10 * seed + number, 10, 3, SIDE, SIDE))
                sizes.append(kind)
                own_images += 1
        if own_images:
            per_row.append(own_images)
    found = {}
    if images:
        found |= {
            "pixel_values": torch.stack(images),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor(per_row),
        }
    if videos:
        found |= {"pixel_values_videos": torch.stack(videos)}
    return found


@torch.no_grad()
def batch(rows, side="right", labels=True, aspect="anyres_max_9"):
    inputs = visuals(rows)
    images = iter(())
    if "pixel_values" in inputs:  # as long as the model makes them
        own = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        images = iter([len(own) for own in MODELS[aspect].model.get_image_features(**own).pooler_output])
    ids = []
    for own, words, seed in rows:
        runs = [(VIDEO, FRAMES * 9 + 1) if kind == "video" else (IMAGE, next(images)) for kind in own]
        ids.append(sentence(runs, words, seed))
    return {**padded(ids, side, labels), **inputs}


class TestLlavaOnevision(FamilyIdentity):
    suppressed = (2, IMAGE, VIDEO)
    options = WITHOUT_CLS
    aspect = "anyres_max_9"
    samples = ROWS

    def make_model(self):
        return tiny(aspect=self.aspect)

    def rows(self):
        return list(self.samples)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels, self.aspect)


class TestInterpolated(TestLlavaOnevision):
    """Grids that are too large: the pruner sees what the model makes of them, which is no grid."""

    aspect = SMALL
    samples = LARGE

    @pytest.fixture
    def methods(self, model):
        found = []
        for name in ("divprune", "tome", "random", "vispruner", "trimtokenator", "crisprune"):
            self.plug(model, name)
            found.append(name)
        return found

    @torch.no_grad()
    def test_methods_that_need_a_grid_say_why_there_is_none(self, model):
        large, small = batch(LARGE[3:4], aspect=SMALL), batch([(((20, 20),), 5, 1)], aspect=SMALL)
        for name in ("hiprune", "downsample"):  # the tower has no [CLS], which vscan and gridprune need as well
            pruned = plug(model, name)
            pruned.prepare(small)
            with pytest.raises(
                PruningError, match=f"^{name} .* grid, and this image has none: the model interp"
            ) as error:
                pruned.prepare(large)
            assert "'anyres_max_2'" in str(error.value) and "\n" not in str(error.value)
            assert "scope" not in str(error.value)
        (tokens,) = plug(model).encode(large)["image"].groups
        signals = {"cls_attention": tokens.features.new_ones(1, 2, tokens.count)}
        signals |= {"shallow_attention": signals["cls_attention"]}
        for name in ("vscan", "gridprune"):
            with pytest.raises(PruningError, match=f"^{name} cuts .* of a patch grid, and this image has none: the mo"):
                build_pruner(name)(replace(tokens, signals=signals), 4)


def plug(model, name="divprune", keep=4, **fields):
    return PrunedModel(model, PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields))


def bilinear(size, out):
    """Return the weights (out, size) of bilinear interpolation that leaves corners where they are."""
    weights = torch.zeros(out, size, dtype=torch.float64)
    for place in range(out):
        source = max((place + 0.5) * size / out - 0.5, 0)
        low = int(source)
        weights[place, low] += 1 - (source - low)
        weights[place, min(low + 1, size - 1)] += source - low
    return weights


@torch.no_grad()
def test_scores_of_a_frame_are_interpolated_as_its_patches_are():
    model = tiny("eager")
    pixels = noise(1, 2, FRAMES, 3, SIDE, SIDE)
    out = model.model.vision_tower(pixel_values=pixels.flatten(0, 1), output_attentions=True, output_hidden_states=True)
    received = out.attentions[-1].mean(2)  # (frames, H, patches)
    weights = bilinear(5, 3).float()
    expected = torch.einsum("rp,cq,bhpq->bhrc", weights, weights, received.unflatten(-1, (5, 5))).flatten(2)
    vision = plug(model, "hiprune").encode({"pixel_values_videos": pixels})["video"]
    (tokens,) = vision.groups
    assert tokens.grid == (3, 3) and vision.owner == ((0, 0, 1, 1),)
    torch.testing.assert_close(tokens.signals["received_attention"], expected, rtol=1e-5, atol=1e-6)
    features = out.hidden_states[-1].unflatten(1, (5, 5))
    expected = torch.einsum("rp,cq,bpqd->brcd", weights, weights, features)
    torch.testing.assert_close(tokens.features, expected.flatten(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scores_of_a_large_image_are_interpolated_as_its_crops_are():
    """Four crops of 5 x 5 patches are one grid of 10 x 10, of which the model makes 7 x 7."""
    model = tiny("eager", SMALL)
    inputs = batch([(((40, 40),), 5, 1)], aspect=SMALL)
    out = model.model.vision_tower(
        pixel_values=inputs["pixel_values"][0, :5], output_attentions=True, output_hidden_states=True
    )
    received = out.attentions[-1].mean(2)  # (crops, H, 25)
    grid = received[1:].unflatten(0, (2, 2)).unflatten(-1, (5, 5))  # rows, columns of crops, H, rows, columns
    grid = grid.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    weights = bilinear(10, 7).float()
    merged = torch.einsum("rp,cq,hpq->hrc", weights, weights, grid).flatten(1)
    vision = plug(model, "vispruner").encode(inputs)["image"]
    (tokens,) = vision.groups
    assert tokens.features.shape[:2] == (1, 25 + 49) and tokens.grid is None and vision.owner == ((0,),)
    expected = torch.cat([received[0], merged], dim=1)
    torch.testing.assert_close(tokens.signals["received_attention"][0], expected, rtol=1e-5, atol=1e-6)
    # A newline ends each of the seven rows.
    ends = (vision.origin[0] < 0).nonzero()[:, 0].tolist()
    assert ends == [25 + 8 * row + 7 for row in range(7)]
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    assert torch.equal(stock[vision.origin[0] >= 0], tokens.projected[0]) and torch.equal(vision.slots[0], stock)


@torch.no_grad()
@pytest.mark.parametrize(("aspect", "rows"), [("anyres_max_9", ROWS), (SMALL, LARGE)])
def test_stored_visuals_meet_the_projector_of_now(aspect, rows, tmp_path):
    """Slots and projected tokens are those of a fresh run, bit for bit, also where they were interpolated."""
    model = tiny(aspect=aspect)
    inputs = batch(rows, aspect=aspect)
    pruned = plug(model, "vispruner")
    stored = pruned.encode(inputs)
    for kind, vision in stored.items():
        vision.save(tmp_path / kind)
    model.model.multi_modal_projector.linear_1.bias.add_(0.3)
    for kind, fresh in pruned.encode(inputs).items():
        again = pruned.family.reproject(model, Vision.load(tmp_path / kind))
        for own, other, before in zip(again.slots, fresh.slots, stored[kind].slots, strict=True):
            assert torch.equal(own, other) and not torch.equal(own, before)
        for own, other in zip(again.groups, fresh.groups, strict=True):
            assert torch.equal(own.projected, other.projected) and torch.equal(own.features, other.features)


def test_gradients_reach_the_projector_through_stored_and_interpolated_tokens():
    for name in ("divprune", "tome"):
        for aspect, rows in (("anyres_max_9", ROWS[3:4]), (SMALL, LARGE[:1])):
            model = tiny(aspect=aspect).requires_grad_(False)
            model.model.multi_modal_projector.requires_grad_(True)
            inputs = batch(rows, aspect=aspect)
            pruned = plug(model, name)
            with torch.no_grad():
                stored = pruned.encode(inputs)
            without_pixels = {key: value for key, value in inputs.items() if "pixel" not in key}
            gradients = []
            for given in ({"vision": stored, **without_pixels}, inputs):
                model.zero_grad()
                pruned.forward(**given).loss.backward()
                gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
            assert gradients[0].abs().sum() > 0
            torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_several_images_in_a_row_have_no_crops():
    model = MODELS["anyres_max_9"]
    vision = plug(model).encode(batch(ROWS))["image"]
    assert vision.lengths[1:4] == [26, 26, 26]
    assert vision.owner == ((0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 4),)
    assert plug(model, newline="none").prepare(batch(ROWS)).kept["image"][1:4] == [4, 4, 4]


@torch.no_grad()
def test_large_images_are_one_item_and_the_others_their_crops():
    model = MODELS[SMALL]
    vision = plug(model).encode(batch(LARGE, aspect=SMALL))["image"]
    first, *large = vision.owner
    assert first == (1, 1, 1, 3, 4) and sorted(sum(large, ())) == [0, 2, 5]
    kept = plug(model, newline="none").prepare(batch(LARGE, aspect=SMALL)).kept["image"]
    assert [kept[image] for image in (0, 2, 3, 4, 5)] == [4] * 5
    kept = plug(model, keep=12, scope="image", newline="none").prepare(batch(LARGE, aspect=SMALL)).kept
    assert kept == {"image": [12] * 6, "video": [12, 12]}


@torch.no_grad()
@pytest.mark.parametrize(("newline", "expected"), [("rows", 9), ("all", 9), ("none", 8)])
def test_the_newline_of_a_video_is_a_row_end(newline, expected):
    prepared = plug(MODELS["anyres_max_9"], newline=newline).prepare(batch(ROWS))
    assert prepared.kept["video"] == [expected] * 3


@torch.no_grad()
def test_visuals_that_disagree_are_refused_in_one_line():
    model, inputs = MODELS["anyres_max_9"], batch(ROWS)
    videos = inputs["pixel_values_videos"]
    for change, message in (
        ({"pixel_values_videos": videos[:, :1]}, "video placeholder tokens.*visual tokens per video"),
        ({"pixel_values_videos": videos[0]}, r"must be \(videos, frames, 3, height, width\)"),
        ({"image_sizes": inputs["image_sizes"][:3]}, "`batch_num_images` .1, 3, 1. are 5 images, but .* hold 3"),
        ({"pixel_values": inputs["pixel_values"][:4]}, "pixels of 4 images but `image_sizes` of 5"),
        ({"batch_num_images": None}, "image placeholder tokens.*visual tokens per image"),
    ):
        with pytest.raises(PruningError, match=message) as error:
            plug(model).prepare({**inputs, **change})
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_projecting_kept_features_gives_the_tokens_of_crops():
    """Claimed of crops alone: frames and interpolated grids are interpolated behind the projector."""
    model = MODELS["anyres_max_9"]
    (tokens,) = plug(model).encode(batch(ROWS))["image"].groups
    kept = family_of(model).project(model, tokens.features[:, ::2])
    torch.testing.assert_close(kept, tokens.projected[:, ::2])
