"""Methods for videos: their contract, slow versions of themselves, the published code's answers, clips of a batch."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import video_oracles as oracles
from conftest import GOLDEN, TINY_VLM
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.models import load_model
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, VisualTokens, build_pruner, registered_methods
from prunetune.pruning.methods.dycoke import DyCoke
from prunetune.pruning.methods.evs import EVS
from prunetune.pruning.methods.fastvid import FastVID
from prunetune.pruning.methods.vidcom2 import VidCom2
from prunetune.pruning.registry import merges
from prunetune.scripts.check_golden import check
from prunetune.testing import PrunerContract, check_selection, expected_count, make_tokens

GOLDEN2 = GOLDEN.parent / "golden2"
NAMES = [name for name, method in registered_methods().items() if method.video]
every_method = pytest.mark.parametrize("name", NAMES)


class TestEVS(PrunerContract):
    pruner = EVS
    frames = 5


class TestVidCom2(PrunerContract):
    pruner = VidCom2
    frames = 4


class TestDyCoke(PrunerContract):
    pruner = DyCoke
    frames = 7


class TestFastVID(PrunerContract):
    pruner = FastVID
    frames = 4


class TestFastVIDByItsHead(PrunerContract):
    pruner = FastVID
    options = {"frames": "pooling_head", "segments": 2, "threshold": -1.0}
    frames = 3


def test_all_are_here():
    assert NAMES == ["dycoke", "evs", "fastvid", "vidcom2"]


@st.composite
def clips(draw):
    frames, rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    channels, seed = draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    tokens = make_tokens(draw(st.integers(1, 3)), rows, columns, channels, seed=seed, dtype=dtype, frames=frames)
    return alike(tokens, draw(st.sampled_from([0.0, 0.3, 1.0]))), draw(st.integers(1, frames * rows * columns))


def alike(tokens, noise):
    """The same clips with frames that resemble the frame before, half of them, so that there are cuts and runs."""

    def drifting(values):
        by_frame = values.float().unflatten(1, (tokens.frames, -1)).clone()
        for t in range(1, tokens.frames):
            if t % 2:
                by_frame[:, t] = by_frame[:, t - 1] + noise * by_frame[:, t]
        return by_frame.flatten(1, 2).to(values)

    signals = {**tokens.signals}
    if tokens.frames > 1:
        for t in range(1, tokens.frames, 2):
            signals["head_feature"][:, t] = signals["head_feature"][:, t - 1] + noise * signals["head_feature"][:, t]
    return replace(tokens, features=drifting(tokens.features), projected=drifting(tokens.projected), signals=signals)


ORACLES = {
    "dycoke": [({}, {}), ({"groups": "published"}, {"groups": "published"}), ({"merge_ratio": 0.7}, {"ratio": 0.7})],
    "evs": [({}, {})],
    "vidcom2": [
        ({}, {}),
        ({"count": "published"}, {"count": "published"}),
        ({"retention_ratio": 0.3}, {"ratio": 0.3}),
    ],
}


@pytest.mark.parametrize(
    ("name", "options", "named"), [(name, *case) for name, cases in ORACLES.items() for case in cases], ids=str
)
@settings(max_examples=30, deadline=None)
@given(case=clips())
def test_method_equals_its_oracle(name, options, named, case):
    tokens, keep = case
    if keep == tokens.count and name == "vidcom2":
        return  # keeping all is a rule of its own
    if keep == tokens.count and options.get("groups") == "published":
        return
    selection = build_pruner(name, options)(tokens, keep)
    for item in range(len(tokens.features)):
        assert selection.of(item).tolist() == getattr(oracles, name)(tokens, item, keep, **named)


FASTVID = [
    ({}, {}),
    ({"count": "published"}, {"count": "published"}),
    ({"segments": 2, "threshold": -1.0}, {"segments": 2, "tau": -1.0}),
    ({"segments": 1, "threshold": 0.0, "anchor_step": 2}, {"segments": 1, "tau": 0.0, "step": 2}),
    ({"context_ratio": 1.0, "own_weight": 0.1}, {"share": 1.0, "beta": 0.1}),
    ({"context_ratio": 1.0, "segments": 1, "threshold": -1.0}, {"share": 1.0, "segments": 1, "tau": -1.0}),
    ({"frames": "pooling_head", "segments": 3}, {"frames_by": "pooling_head", "segments": 3}),
]


def mixed(tokens, selection, item):
    assert selection.merged is None
    return selection.mixing[item] @ tokens.projected[item].float()


@pytest.mark.parametrize(("options", "named"), FASTVID, ids=str)
@settings(max_examples=25, deadline=None)
@given(case=clips())
def test_fastvid_equals_its_oracle(options, named, case):
    tokens, keep = case
    if keep == tokens.count:
        return
    if tokens.features.dtype != torch.float32:  # what rounding leaves of duplicates would decide their cosines
        tokens = tokens.map(lambda values: values.float() if values.is_floating_point() else values)
    selection = build_pruner("fastvid", options)(tokens, keep)
    for item in range(len(tokens.features)):
        places, features = oracles.fastvid(tokens, item, keep, **named)
        assert selection.of(item).tolist() == selection.origin[item].tolist() == places
        np.testing.assert_allclose(mixed(tokens, selection, item).double().numpy(), features, atol=2e-5)


@pytest.mark.parametrize("frames", [3, 5])
def test_fastvid_merges_an_anchors_own_frame_alone_where_its_share_is_one_frames(frames):
    """The published code tells a segment of one frame by its anchor's share, which longer ones can have too."""
    tokens = alike(make_tokens(2, 3, 4, frames=frames), 0.3)
    options = {"segments": 1, "threshold": -1.0, "anchor_step": 2}
    selection = build_pruner("fastvid", options)(tokens, 3 * frames)  # one context token a frame
    for item in range(2):
        places, features = oracles.fastvid(tokens, item, 3 * frames, segments=1, tau=-1.0, step=2)
        assert selection.of(item).tolist() == places
        np.testing.assert_allclose(mixed(tokens, selection, item).double().numpy(), features, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(case=clips(), name=st.sampled_from(NAMES))
def test_budgets_are_kept_for_any_clip(name, case):
    tokens, keep = case
    pruner = build_pruner(name)
    check_selection(tokens, expected_count(pruner, tokens, keep), pruner(tokens, keep))


@pytest.mark.parametrize("name", NAMES)
def test_published_code_agrees(name):
    lines, same, total = check(GOLDEN2, name)
    if not total:
        pytest.skip("golden cases are not beside this checkout")
    assert same == total >= 5 and not any("defined differently" in line for line in lines), lines


# ---- what the methods are for ------------------------------------------------------------------------------------


def still(frames, noise=0.0):
    """A clip of one picture, with noise and a token that jumps in the last frame."""
    picture = make_tokens(1, 4, 4).projected
    clip = picture.repeat(1, frames, 1) + noise * torch.randn(
        1, 16 * frames, 16, generator=torch.Generator().manual_seed(3)
    )
    clip[0, 16 * (frames - 1) + 5] = -clip[0, 5]
    attention = torch.full((1, 2, 16 * frames), 1 / 16)
    return VisualTokens(clip, clip, signals={"received_attention": attention}, grid=(4, 4), frames=frames)


@pytest.mark.parametrize("name", ["evs", "dycoke", "vidcom2"])
def test_what_changes_in_a_still_video_is_kept(name):
    frames = 6
    jump = 16 * (frames - 1) + 5
    keep = max(20, expected_count(build_pruner(name), still(frames), 20))
    assert jump in build_pruner(name)(still(frames, 0.01), keep).of(0).tolist()


def test_fastvid_merges_equal_frames_of_a_segment_into_one():
    """Each context token of the one anchor is the mean of its place in all frames, which are equal: itself."""
    tokens = still(4)
    selection = build_pruner("fastvid", {"segments": 1, "threshold": -1.0, "context_ratio": 1.0})(tokens, 16)
    assert selection.of(0).tolist() == list(range(48, 64))  # all of the last frame
    moved = torch.arange(16) == 5  # it has no equals in the other frames, so they join others
    outputs = mixed(tokens, selection, 0)
    torch.testing.assert_close(outputs[5], tokens.projected[0, 53])
    near = (outputs - tokens.projected[0, 48:]).norm(dim=-1)
    assert (near[~moved] < 1e-5).sum() >= 14


def test_equal_frames_tie_and_the_lower_index_wins():
    tokens = still(4)
    assert build_pruner("evs")(tokens, 19).of(0).tolist() == [*range(18), 53]  # the first frame, the jump, the lowest


def test_dycoke_and_evs_say_what_they_keep_at_least():
    assert EVS().least(8, 10) == 10 and DyCoke().least(8, 10) == 2 * 10 + 6 and DyCoke().least(1, 10) == 10
    tokens = make_tokens(2, 2, 5, frames=8)
    assert DyCoke()(tokens, 1).counts() == [26, 26] and DyCoke()(tokens, 33).counts() == [33, 33]
    assert EVS()(tokens, 4).of(0).tolist() == list(range(10))
    image = make_tokens(2, 2, 5)
    for name in ("evs", "dycoke"):
        assert build_pruner(name)(image, 3).counts() == [10, 10]
    for name in ("vidcom2", "fastvid"):
        assert build_pruner(name)(image, 3).counts() == [3, 3]


@pytest.mark.parametrize("options", [{}, {"merge_ratio": 0.7, "groups": "published"}], ids=str)
@pytest.mark.parametrize("frames", [1, 5, 8])
def test_dycoke_hands_tokens_on_in_the_published_order(options, frames):
    tokens = make_tokens(2, 3, 4, frames=frames)
    named = {"ratio": options.get("merge_ratio"), "groups": options.get("groups", "full")}
    pruner = build_pruner("dycoke", {**options, "order": "published"})
    ordered, plain = pruner(tokens, 7 * frames), build_pruner("dycoke", options)(tokens, 7 * frames)
    assert merges("dycoke", pruner) and not merges("dycoke", build_pruner("dycoke", options)) and ordered.in_order
    for item in range(2):
        expected = oracles.dycoke(tokens, item, 7 * frames, **named, order="published")
        assert ordered.of(item).tolist() == plain.of(item).tolist() == sorted(expected)
        assert (sorted(expected) != expected) == (frames > 1)
        assert torch.equal(ordered.mixing[item] @ tokens.projected[item], tokens.projected[item, expected])


def test_published_counts_are_those_of_the_published_code():
    tokens = make_tokens(1, 2, 5, frames=8)
    assert EVS(prune_rate=0.9)(tokens, 80).counts() == [10]  # never less than a frame
    assert EVS(prune_rate=0.75)(tokens, 80).counts() == [20]
    wide = make_tokens(1, 6, 10, frames=16)
    assert EVS(prune_rate=0.9)(wide, 1).counts() == [95]  # 960 * (1 - 0.9) is 95.99... in doubles
    assert VidCom2(retention_ratio=0.1)(wide, 1).counts() == [95]
    odd = make_tokens(1, 2, 5, frames=5)
    assert DyCoke(merge_ratio=0.5, groups="published")(odd, 1).of(0).max() < 40  # the last frame is gone
    assert DyCoke(merge_ratio=0.5)(odd, 1).counts() == [10 + 5 + 5 + 5 + 10]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("evs", {"prune_rate": 1.0}, r"prune_rate is a share in \[0, 1\), got 1.0"),
        ("vidcom2", {"count": "most"}, "count is one of fixed, published"),
        ("dycoke", {"groups": "half"}, "groups is one of full, published"),
        ("fastvid", {"frames": "cls"}, "frames is one of received, pooling_head"),
        ("fastvid", {"anchor_step": 0}, "anchor_step is at least 1"),
    ],
)
def test_options_out_of_range_say_so(name, options, message):
    with pytest.raises(PruningError, match=message):
        build_pruner(name, options)


@every_method
def test_a_family_without_videos_refuses_them(name):
    model, processor = load_model(str(TINY_VLM))
    with pytest.raises(
        PruningError, match=f"^{name} compares the frames of a video, and family 'llava' takes no videos"
    ):
        PrunedModel(model, PruningSpec(name, 16), processor.tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_method
def test_a_clip_keeps_the_same_in_any_batch_and_with_any_number_of_threads(name, dtype):
    tokens = alike(make_tokens(5, 4, 5, channels=96, frames=6, dtype=dtype), 0.3)
    together = build_pruner(name)(tokens, 50)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for first, last in [*pairwise(range(6)), (1, 4)]:
                part = tokens.map(lambda values, first=first, last=last: values[first:last])
                alone = build_pruner(name)(part, 50)
                for item in range(last - first):
                    assert torch.equal(alone.of(item), together.of(first + item))
                    if name == "fastvid":
                        assert torch.equal(alone.mixing[item], together.mixing[first + item])
    finally:
        torch.set_num_threads(threads)


def test_vidcom2_compares_a_single_channel():
    tokens = make_tokens(1, 2, 3, frames=3)
    tokens = replace(tokens, projected=tokens.projected[..., :1])
    assert build_pruner("vidcom2")(tokens, 7).of(0).tolist() == oracles.vidcom2(tokens, 0, 7)
