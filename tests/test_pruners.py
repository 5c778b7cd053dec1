"""Every registered method keeps its contract, equals a slow version of itself, and agrees with published code."""

import threading
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from cases import cases
from conftest import GOLDEN, GOLDEN_NEWER
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunetune.pruning import PruningError, Selection, VisualTokens, build_pruner, register_pruner, registered_methods
from prunetune.pruning.budget import BudgetRule
from prunetune.pruning.methods.downsample import pooling
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.select import Candidates, candidates, choose
from prunetune.pruning.signals import signal_of
from prunetune.pruning.vision import of_equal_images
from prunetune.scripts.check_golden import CHECKS, check
from prunetune.testing import check_selection, expected_count, make_tokens, only, reading

NAMES = [name for name in registered_methods() if name != "identity"]


# ---- contract, over the registry -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_always_k_distinct_ascending_positions(name, case):
    tokens, keep = case
    pruner = build_pruner(name)
    check_selection(tokens, expected_count(pruner, tokens, keep), pruner(tokens, keep))


ATTENTIONS = ("cls_attention", "shallow_attention", "received_attention", "object_attention", "reader_attention")
PER_TOKEN = ("features", "projected", "keys", "reader_keys", "image_embeds")


def degenerate(kind: str) -> VisualTokens:
    tokens = make_tokens(2, 4, 5)
    by_token = [tokens.require(name) for name in PER_TOKEN]
    by_attention = [tokens.require(name) for name in ATTENTIONS]
    if kind == "duplicates":
        for value in by_token:
            value[:] = value[:, :1].clone()
    elif kind == "zeros":
        for value in by_token:
            value[:, ::2] = 0
    elif kind == "all zero":
        texts = [tokens.require(name) for name in ("text_embeds", "text_token_embeds", "general_embeds")]
        for value in [*by_token, *texts]:
            value.zero_()
    elif kind == "equal attention":
        for value in by_attention:
            value[:] = 1 / 21
    elif kind == "no attention":
        for value in by_attention:
            value.zero_()
    elif kind == "low rank":
        for value in by_token:
            value[:] = value[:, :, :1] * value[:, :1]
    return tokens


KINDS = ["duplicates", "zeros", "all zero", "equal attention", "no attention", "low rank"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_inputs_still_give_k_distinct_positions(name, kind):
    tokens, pruner = degenerate(kind), build_pruner(name)
    for keep in (1, 2, 7, 19, 20):
        selection = pruner(tokens, keep)
        for item in range(2):
            assert len(set(selection.of(item).tolist())) == expected_count(pruner, tokens, keep)
        for outputs in (selection.merged, selection.mixing):
            assert all(torch.isfinite(output).all() for output in outputs or ())


@pytest.mark.parametrize("kind", ["duplicates", "all zero"])
# VisPruner and ToMe drop by alternating places, so with equal tokens it is the place that decides.
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("random", "vispruner", "tome")])
def test_where_nothing_differs_the_lower_index_wins(name, kind):
    tokens = degenerate(kind)
    for name_ in ATTENTIONS:
        tokens.require(name_)[:] = 1 / 21
    pruner = build_pruner(name)
    kept = pruner(tokens, 1).of(0).tolist()
    first = list(range(expected_count(pruner, tokens, 1)))
    assert kept == ([12] if name == "downsample" else first)  # downsample's one region has its centre there


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_keeps_all(name):
    tokens = make_tokens(2, 3, 4)
    selection = build_pruner(name)(tokens, 12)
    assert selection.of(0).tolist() == selection.of(1).tolist() == list(range(12))
    assert selection.merged is selection.mixing is None  # so the features are the stock model's own, bit for bit


@pytest.mark.parametrize("name", NAMES)
def test_items_are_pruned_independently_and_half_precision_is_widened(name):
    tokens = make_tokens(3, 5, 5, dtype=torch.bfloat16)
    together = build_pruner(name)(tokens, 9)
    for item in range(3):
        alone = build_pruner(name)(only(tokens, item), 9)
        assert torch.equal(together.of(item), alone.of(0))
        if together.merged is not None:
            torch.testing.assert_close(together.merged[item].float(), alone.merged[0], atol=0.05, rtol=0.02)
        if together.mixing is not None:
            assert torch.equal(together.mixing[item], alone.mixing[0])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_nan_is_an_error_that_names_the_layer(name):
    video = registered_methods()[name].video  # of one frame, some of them keep everything unseen
    tokens = make_tokens(2, 4, 4, frames=6 if video else 1)
    needs = {signal_of(need).name for need in registered_methods()[name].needs}
    for signal in needs or {"features", "projected"}:
        broken = make_tokens(2, 4, 4, frames=tokens.frames)
        broken.require(signal).view(-1)[7] = float("nan")
        broken = replace(broken, layers={signal: "vision_tower.encoder.layers.22"})
        if signal == "projected" and name == "downsample":
            continue
        if signal == "features" and (video or name in ("divprune", "fps")):
            continue
        with pytest.raises(PruningError, match=rf"`{signal}` of vision_tower.encoder.layers.22 holds NaN"):
            build_pruner(name)(broken, tokens.count // 4)
    assert build_pruner(name)(tokens, tokens.count // 4)


@pytest.mark.parametrize("name", [n for n, m in registered_methods().items() if m.needs])
def test_a_missing_signal_is_named(name):
    tokens = VisualTokens(features=torch.randn(1, 9, 4), projected=torch.randn(1, 9, 4), grid=(3, 3))
    with pytest.raises(PruningError, match="needs"):
        build_pruner(name)(tokens, 4)


@pytest.mark.parametrize("name", NAMES)
def test_only_declared_signals_are_read(name):
    """What is not in `needs` is not computed by the families, so a method that reads it would break there."""
    tokens = make_tokens(2, 4, 4)
    build_pruner(name)(reading(tokens, registered_methods()[name].needs), 5)


# ---- oracles ---------------------------------------------------------------------------------------------------


def test_every_method_has_an_oracle():
    """Those for videos have theirs in test_video_methods.py."""
    assert {*oracles.KEEPING, *oracles.MERGING} == {n for n in NAMES if not registered_methods()[n].video}


@pytest.mark.parametrize("name", oracles.KEEPING)
@settings(max_examples=40, deadline=None)
@given(case=cases(side=6))
def test_method_equals_its_oracle(name, case):
    tokens, keep = case
    selection = build_pruner(name)(tokens, keep)
    # Of two tokens each is as far from their mean as the other; rounding, not the method, would decide.
    assume(not (name == "fps" and tokens.count == 2) and not (name == "trimtokenator" and tokens.count <= 3))
    for item in range(len(tokens.features)):
        assert selection.of(item).tolist() == oracles.KEEPING[name](tokens, item, keep)


def same_merge(tokens, selection, item, expected):
    places, features = expected
    if selection.origin is None:  # all are kept, as they are
        assert selection.of(item).tolist() == places == list(range(len(features)))
        return
    assert selection.origin[item].tolist() == list(places)
    if selection.mixing is None:
        merged = selection.merged[item]
    else:
        merged = selection.mixing[item] @ tokens.projected[item].float()
    step = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[
        merged.dtype
    ]  # written in the input's dtype
    np.testing.assert_allclose(merged.double().numpy(), features, atol=2e-4, rtol=2 * step)
    kept = set(selection.of(item).tolist())
    assert {place for place in places if place >= 0} <= kept and len(kept) == len(places)


@pytest.mark.parametrize("name", oracles.MERGING)
@settings(max_examples=40, deadline=None)
@given(case=cases(side=6))
def test_merging_method_equals_its_oracle(name, case):
    tokens, keep = case
    selection = build_pruner(name)(tokens, keep)
    for item in range(len(tokens.features)):
        same_merge(tokens, selection, item, oracles.MERGING[name](tokens, item, keep))


OPTIONS = [
    ("prismprune", {"fps_start": "top_variance"}, {"start": "top_variance"}),
    ("prismprune", {"fps_metric": "l2"}, {"metric": "l2"}),
    ("prismprune", {"salient_ratio": 0.25}, {"ratio": 0.25}),
    ("prismprune", {"salient_ratio": 0.0}, {"ratio": 0.0}),
    ("prismprune", {"salient_ratio": 1.0}, {"ratio": 1.0}),
    ("prismprune", {"pool_factor": 0}, {"factor": 0}),
    ("vispruner", {"important_ratio": 0.25}, {"share": 0.25}),
    ("vispruner", {"saliency": "received"}, {"saliency": "received"}),
    ("fps", {"start": "center"}, {"start": "center"}),
    ("fps", {"start": "first", "space": "features"}, {"start": "first", "space": "features"}),
    ("cdpruner", {"relevance_sign": 1}, {"sign": 1}),
    ("crisprune", {"alpha": 0.0}, {"alpha": 0.0}),
    ("crisprune", {"alpha": 1.0, "decay": 0.9}, {"alpha": 1.0, "decay": 0.9}),
    ("crisprune", {"quantile": 1.0}, {"tau": 1.0}),
    ("crisprune", {"relevance_sign": -1}, {"sign": -1}),
    ("crisprune", {"similarity": "features"}, {"space": "features"}),
    ("crisprune", {"similarity": "aligned"}, {"space": "image_embeds"}),
    ("crisprune", {"saliency": "received", "text": "llm"}, {"saliency": "received", "text": "llm"}),
    ("trimtokenator", {"stages": "align"}, {"stages": "align"}),
    ("trimtokenator", {"stages": "repmax"}, {"stages": "repmax"}),
    ("trimtokenator", {"stages": "repmax_align"}, {"stages": "repmax_align"}),
    ("trimtokenator", {"alignment_metric": "cosine"}, {"alignment": "cosine"}),
    ("trimtokenator", {"alignment_metric": "mutual_information"}, {"alignment": "mutual_information"}),
    ("trimtokenator", {"redundancy_metric": "l2", "n1_ratio": 0.5}, {"redundancy": "l2", "ratio": 0.5}),
    ("hiprune", {"alpha": 0.9}, {"alpha": 0.9}),
    ("gridprune", {"zones": 3, "alpha": 0.2}, {"zones": 3, "alpha": 0.2}),
    ("adaptive", {"erank_avg": 1.0, "tau_max": 1.0}, {"average": 1.0, "tau_max": 1.0}),
    ("adaptive", {"erank_avg": 2.0, "tau_max": 2.0}, {"average": 2.0, "tau_max": 2.0}),
    ("adaptive", {"erank_avg": 0.1, "order": "pick"}, {"average": 0.1, "count": "pick"}),
    ("adaptive", {"erank_avg": 0.1, "refill": "farthest"}, {"average": 0.1, "refill": "farthest"}),
    (
        "adaptive",
        {"erank_avg": 0.1, "tau_max": 0.9, "refill": "again"},
        {"average": 0.1, "tau_max": 0.9, "refill": "again"},
    ),
    ("random", {"seed": 7}, {"seed": 7}),
    ("tome", {"metric": "features"}, {"metric": "features"}),
    ("bat", {"attentive_ratio": 0.25, "neighbours": 3}, {"ratio": 0.25, "k": 3}),
    ("trim", {"relevance_sign": 1}, {"sign": 1}),
    ("holov", {"runs": 3}, {"runs": 3}),
    ("holov", {"runs": 36, "alpha": 0.0}, {"runs": 36, "alpha": 0.0}),
    ("scope", {"alpha": 0.3}, {"alpha": 0.3}),
    ("scope", {"combination": "add"}, {"combination": "add"}),
    ("promprune", {"mu": 0.95, "tau": 0.05}, {"mu": 0.95, "tau": 0.05}),
    ("promprune", {"mu": 0.5, "share_min": 0.4}, {"mu": 0.5, "low": 0.4}),
    ("promprune", {"mu": 1.0, "share_max": 0.7}, {"mu": 1.0, "high": 0.7}),
]


@pytest.mark.parametrize(("name", "options", "named"), OPTIONS, ids=lambda value: str(value))
def test_options_equal_their_oracle(name, options, named):
    for seed in range(3):
        tokens = make_tokens(2, 6, 6, heads=4, seed=seed)
        default = build_pruner(name)(tokens, 10)
        selection = build_pruner(name, options)(tokens, 10)
        for item in range(2):
            if name in oracles.KEEPING:
                assert selection.of(item).tolist() == oracles.KEEPING[name](tokens, item, 10, **named)
            else:
                same_merge(tokens, selection, item, oracles.MERGING[name](tokens, item, 10, **named))
        if not all(torch.equal(selection.of(item), default.of(item)) for item in range(2)):
            break
    else:
        pytest.fail("the option changed nothing in three tries")


# ---- adaptive counts and statistics over the crops of an image ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("prumerge", oracles.prumerge_outliers),
        ("prumerge_plus", oracles.prumerge_plus_outliers),
        ("trim", lambda tokens, item: oracles.trim(tokens, item, 1, count="outliers")),
    ],
)
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_outlier_counts_equal_their_oracle(name, oracle, case):
    tokens, _ = case
    selection = build_pruner(name, {"count": "outliers"})(tokens, 1)
    for item in range(len(tokens.features)):
        same_merge(tokens, selection, item, oracle(tokens, item))


def test_outliers_and_relevance_are_measured_over_all_crops_of_an_image():
    tokens = make_tokens(3, 6, 6)
    tokens.signals["cls_attention"][0] *= 3
    tokens.signals["reader_attention"][0] *= 3
    tokens.signals["image_embeds"][0] = (
        tokens.signals["text_embeds"][:1, 0] + 0.05 * tokens.signals["image_embeds"][0]
    )  # all alike relevant
    image = torch.tensor([0, 0, 1])
    pooled = replace(tokens, image=image)
    shares = oracles.outliers(
        torch.cat([tokens.signals["reader_attention"][0], tokens.signals["reader_attention"][1]]).numpy()
    )
    counts = build_pruner("prumerge", {"count": "outliers"})(pooled, 1).counts()
    assert counts[:2] == [int(36 * shares) + 1] * 2
    alone = build_pruner("prumerge", {"count": "outliers"})(tokens, 1)
    assert counts[2] == alone.counts()[2] and counts[:2] != alone.counts()[:2]
    joint, single = (build_pruner("cdpruner")(given_, 9).indices for given_ in (pooled, tokens))
    assert torch.equal(joint[2], single[2]) and not torch.equal(joint[:2], single[:2])


def test_adaptive_count_keeps_more_of_complex_images():
    tokens = make_tokens(3, 6, 6, channels=40)
    tokens.projected[0] = tokens.projected[0, :1] + 0.01 * tokens.projected[0]  # simple: nearly one token 36 times
    tokens.projected[1, 18:] = tokens.projected[1, :18]
    complexity = [oracles.erank(oracles.of(tokens, "projected", item)) for item in range(3)]
    average = complexity[1]
    selection = build_pruner("adaptive", {"count": "adaptive", "erank_avg": average})(tokens, 10)
    expected = [max(1, round(10 * max(0.8, c / average))) for c in complexity]
    assert selection.counts() == expected and expected[0] == 8 and expected[1] == 10 and expected[2] > 10
    for item, count in enumerate(expected):
        assert selection.of(item).tolist() == oracles.adaptive_threshold(tokens, item, count, average)


@pytest.mark.parametrize("refill", ["attention", "farthest", "again"])
@pytest.mark.parametrize("order", ["rank", "pick"])
def test_adaptive_notes_how_far_the_walk_went(order, refill):
    dry = set()
    for seed in range(4):
        tokens = make_tokens(3, 5, 6, seed=seed)
        tokens.projected[0] = tokens.projected[0, :1] + 0.1 * tokens.projected[0]  # alike, so that few are far enough
        average = oracles.erank(oracles.of(tokens, "projected", 1)) * (0.1 if order == "pick" else 1)
        options = {"erank_avg": average, "order": order, "refill": refill, "tau_max": 1.2}
        for keep in (3, 12, 29):
            selection = build_pruner("adaptive", options)(tokens, keep)
            for item in range(3):
                kept, walked = oracles.adaptive_walk(tokens, item, keep, average, 1.2, order, refill)
                assert selection.of(item).tolist() == kept
                assert int(selection.notes["walked"][item]) == walked
                assert bool(selection.notes["ran_dry"][item]) == (walked < keep)
                dry.add(walked < keep)
    assert dry == {True, False}


@pytest.mark.parametrize("count", ["fixed", "adaptive"])
@pytest.mark.parametrize("slope", [0.5, -0.5, 5.0])
@pytest.mark.parametrize("variant", ["vispruner", "bat", "divprune_fastervlm"])
def test_mixes_follow_complexity(variant, slope, count):
    for seed in range(6):
        tokens = make_tokens(3, 5, 6, seed=seed)
        tokens.projected[0] = tokens.projected[0, :1] + 0.05 * tokens.projected[0]
        average = oracles.erank(oracles.of(tokens, "projected", 1))
        options = {"variant": variant, "erank_avg": average, "slope": slope, "count": count}
        selection = build_pruner("adaptive", options)(tokens, 11)
        for item in range(3):
            relative = oracles.erank(oracles.of(tokens, "projected", item)) / average
            keep = 11 if count == "fixed" else min(30, max(1, round(11 * max(0.8, relative))))
            share = min(max(0.5 + slope * (1 - relative), 0), 1)
            if abs(keep * share - round(keep * share)) < 1e-3:
                continue  # rounding may go either way
            attended = int(keep * share)
            if variant == "bat":
                same_merge(tokens, selection, item, oracles.bat(tokens, item, keep, attended / keep + 1e-9))
                continue
            if variant == "vispruner":
                expected = oracles.vispruner(tokens, item, keep, attended / keep + 1e-9)
            else:
                x = oracles.of(tokens, "projected", item)
                distance = [[1 - oracles.cosine(a, b) for b in x] for a in x]
                head = oracles.by(oracles.of(tokens, "cls_attention", item).mean(0))[:attended]
                expected = sorted(oracles.max_min(distance, keep, head or oracles.divprune_places(x, 1)))
            assert selection.of(item).tolist() == expected


def test_entropy_can_stand_in_for_erank():
    tokens = make_tokens(1, 6, 6)
    p = oracles.of(tokens, "cls_attention", 0).mean(0)
    p = p / p.sum()
    entropy = float(-(p * np.log(p)).sum())
    options = {"complexity": "attention_entropy", "entropy_avg": 0.5}
    kept = build_pruner("adaptive", options)(tokens, 9).of(0).tolist()
    average = oracles.erank(oracles.of(tokens, "projected", 0)) / (entropy / 0.5)
    assert kept == oracles.adaptive_threshold(tokens, 0, 9, average)


VARIANTS = [
    ("adaptive", {"variant": variant, "count": count, "erank_avg": average, "slope": slope})
    for variant in ("threshold", "vispruner", "bat", "divprune_fastervlm")
    for count in ("fixed", "adaptive")
    for average in (5.0, 12.0)
    for slope in (0.5, -3.0)
]
VARIANTS += [(name, {"count": count}) for name in ("prumerge", "prumerge_plus", "trim") for count in ("outliers",)]
VARIANTS += [("prumerge_plus", {"count": "ratio", "ratio": ratio}) for ratio in (0.01, 0.125, 0.6)]
VARIANTS += [("trimtokenator", {"stages": stages}) for stages in ("repmax_align", "align", "repmax")]
VARIANTS += [("crisprune", {"alpha": alpha, "decay": decay}) for alpha in (0.0, 1.0) for decay in (0.0, 1.0)]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_every_variant_keeps_its_contract(name, options):
    for seed in range(4):
        tokens = make_tokens(3, 5, 6, seed=seed)
        tokens.projected[0] = tokens.projected[0, :1] + 0.05 * tokens.projected[0]  # simple and complex in one batch
        for keep in (1, 2, 11, 25, 29, 30):
            selection = build_pruner(name, options)(tokens, keep)
            for item in range(3):
                kept = selection.of(item).tolist()
                assert kept == sorted(set(kept)) and 1 <= len(kept) <= 30
                if options.get("count", "fixed") == "fixed":
                    assert len(kept) == keep
                if selection.merged is not None:
                    assert len(selection.merged[item]) == len(kept)
                    slots = selection.slots_of(item).tolist()
                    assert sorted(slots) == kept  # every output has a place of its own
            build_pruner(name, options)(reading(tokens, build_pruner(name, options).needs), keep)


def test_prumerge_plus_with_a_ratio_is_the_published_training_branch():
    tokens = make_tokens(1, 9, 16)
    selection = build_pruner("prumerge_plus", {"count": "ratio", "ratio": 0.125})(tokens, 1)
    order = oracles.by(oracles.of(tokens, "reader_attention", 0))[:18]
    samples = [n for n in range(4, 143, 8) if n not in order]
    same_merge(tokens, selection, 0, oracles.neighbour_merge(tokens, 0, order + samples, True))


@pytest.mark.parametrize("fill", ["global", "published"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_vscan_shares_the_local_budget_among_windows(ratio, fill):
    for rows, columns in ((8, 8), (6, 9), (3, 14), (1, 40)):
        tokens = make_tokens(2, rows, columns)
        for keep in (17, 33, 39):
            if keep >= tokens.count:
                continue
            options = {"local_ratio": ratio, "fill": fill}
            selection = build_pruner("vscan", options)(tokens, keep)
            for item in range(2):
                same_merge(tokens, selection, item, oracles.vscan(tokens, item, keep, ratio, fill))


@pytest.mark.parametrize("keep", [3, 9, 20, 35])
def test_prunesid_without_cls_keeps_k_patches(keep):
    tokens = make_tokens(2, 6, 6)
    selection = build_pruner("prunesid", {"count_cls": False})(tokens, keep)
    assert selection.merged is None
    for item in range(2):
        assert selection.of(item).tolist() == oracles.prunesid(tokens, item, keep, count_cls=False)


def handed_on(tokens, selection):
    """What the LLM gets, slot by slot: the features of the projected tokens, zeros for other slots."""
    slots = torch.zeros_like(tokens.projected)
    for item, weights in enumerate(selection.mixing):
        slots[item, selection.slots_of(item)] = weights @ tokens.projected[item]
    return [slots[item, selection.of(item)] for item in range(len(slots))]


def test_published_orders_fill_the_kept_slots_in_that_order():
    """The LLM reads slots from left to right: the first of them holds what the published code hands on first."""
    tokens = make_tokens(2, 6, 6)
    for name, options in (("holov", {"runs": 2}), ("promprune", {"mu": 0.95}), ("prunesid", {"count_cls": False})):
        plain = build_pruner(name, options)(tokens, 10)
        ordered = build_pruner(name, {**options, "order": "published"})(tokens, 10)
        for item in range(2):
            x, a = oracles.of(tokens, "features", item), oracles.of(tokens, "cls_attention", item).sum(0)
            salient, picks = oracles.promprune_parts(tokens, item, 10, mu=0.95)
            expected = {
                "holov": oracles.holov_order(tokens, item, 10, runs=2),
                "promprune": salient + picks,
                "prunesid": oracles.prunesid_patches(x, a, 10, 10),
            }[name]
            assert ordered.of(item).tolist() == plain.of(item).tolist() == sorted(expected) != expected
            assert torch.equal(handed_on(tokens, ordered)[item], tokens.projected[item, expected])
    ordered = build_pruner("prunesid", {"order": "published"})(tokens, 10)
    for item in range(2):
        assert ordered.slots_of(item).tolist() == ordered.of(item).tolist()
        assert torch.equal(ordered.merged[item][0], tokens.signals["cls_feature"][item])


@pytest.mark.parametrize("order", ["raster", "published"])
def test_holov_pads_with_zero_vectors_where_the_published_code_does(order):
    tokens = make_tokens(2, 4, 5)
    tokens.signals["cls_attention"][0, :, :4] += 5  # a run that draws more than it has
    selection = build_pruner("holov", {"runs": 5, "overflow": "published", "order": order})(tokens, 9)
    for item in range(2):
        expected = oracles.holov_order(tokens, item, 9, runs=5, overflow="published")
        assert (len(expected) < 9) == (item == 0)
        assert selection.origin[item].tolist() == expected + [-1] * (9 - len(expected))
        assert len(set(selection.of(item).tolist())) == 9
        rows = handed_on(tokens, selection)[item]
        real = (rows != 0).any(dim=1)
        assert int(real.sum()) == len(expected)
        if order == "published":
            assert torch.equal(rows[: len(expected)], tokens.projected[item, expected])
        else:
            assert torch.equal(rows[real], tokens.projected[item, sorted(expected)])
    whole = build_pruner("holov", {"runs": 5})(tokens, 9)
    assert whole.of(0).tolist() == oracles.holov(tokens, 0, 9, runs=5) and len(whole.of(0)) == 9


@settings(max_examples=60, deadline=None)
@given(case=cases(side=6), runs=st.integers(1, 12))
def test_holov_deals_what_overflows_to_runs_with_room(case, runs):
    tokens, keep = case
    tokens.signals["cls_attention"][:, :, : max(1, tokens.count // 5)] *= 20
    selection = build_pruner("holov", {"runs": runs})(tokens, keep)
    for item in range(len(tokens.features)):
        assert selection.of(item).tolist() == oracles.holov(tokens, item, keep, runs=runs)


def test_coverage_from_changed_rows_is_coverage_from_all_pairs(monkeypatch):
    """On a CPU the gains are kept up to date, on a GPU counted anew: the picks are the same."""
    from prunetune.pruning.ops import coverage

    for seed in range(5):
        tokens = make_tokens(3, 8, 8, seed=seed)
        some = build_pruner("scope")(tokens, 40).indices
        with monkeypatch.context() as patch:
            patch.setattr(coverage, "_where_changed", coverage._recounted)
            assert torch.equal(build_pruner("scope")(tokens, 40).indices, some)


def test_scope_goes_on_by_attention_where_everything_is_covered():
    tokens = make_tokens(1, 1, 12)
    tokens.features[:] = tokens.features[:, :2].repeat(1, 6, 1)  # two different tokens
    kept = build_pruner("scope")(tokens, 5).of(0).tolist()
    attention = oracles.of(tokens, "cls_attention", 0).sum(0)
    first = [max(range(start, 12, 2), key=lambda i: attention[i]) for start in (0, 1)]
    others = [i for i in oracles.by(attention) if i not in first][:3]
    assert kept == sorted(first + others)


def test_bat_finds_clusters_at_the_scale_of_real_features():
    """Wide features of large norm: three clusters of inattentive tokens, three centres, one in each."""
    g = torch.Generator().manual_seed(0)
    middle = 30 * torch.randn(3, 1024, generator=g)
    features = (middle.repeat_interleave(20, dim=0) + 8 * torch.randn(60, 1024, generator=g))[None]
    attention = torch.full((1, 1, 60), 0.001)
    tokens = VisualTokens(features, signals={"cls_attention": attention})
    kept = build_pruner("bat", {"attentive_ratio": 0.0})(tokens, 3).of(0)
    assert sorted((kept // 20).tolist()) == [0, 1, 2]


def test_duplicates_fill_the_budget_by_lower_index():
    g = torch.Generator().manual_seed(1)
    distinct = torch.randn(1, 30, 64, generator=g)
    projected = torch.cat([distinct, distinct, distinct], dim=1)
    for name in ("divprune", "fps"):
        kept = build_pruner(name)(VisualTokens(projected, projected), 38).of(0).tolist()
        assert kept == list(range(38))


def test_mixed_precision_settings_do_not_reach_the_selection():
    """Under autocast, as a trainer may run, the plug prunes as without."""
    tokens = make_tokens(2, 8, 8, channels=64)
    (among,) = candidates(of_equal_images(tokens), "item")
    for name in NAMES:
        ((_, plain),) = choose(build_pruner(name), among, BudgetRule(16), {})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ((_, mixed),) = choose(build_pruner(name), among, BudgetRule(16), {})
        assert torch.equal(plain.indices, mixed.indices), name


def test_exact_products_are_restored_when_the_last_thread_leaves():
    knob = torch.backends.cuda.matmul
    torch.backends.fp32_precision = "tf32"
    inside, leave = threading.Event(), threading.Event()

    def other():
        with exact_float32(torch.device("cpu")):
            inside.set()
            leave.wait(10)

    try:
        with exact_float32(torch.device("cpu")):
            assert knob.fp32_precision == "ieee"
            thread = threading.Thread(target=other)
            thread.start()
            assert inside.wait(10)
        assert knob.fp32_precision == "ieee"  # the other one still computes
        leave.set()
        thread.join()
        assert knob.fp32_precision == "tf32"
    finally:
        leave.set()
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_notes_are_collected_over_the_items_of_a_batch():
    from prunetune.pruning.rewrite import Chosen, Pruned

    selections = []
    for items in (2, 1):
        tokens = make_tokens(items, 5, 5)
        selections.append(build_pruner("adaptive", {"erank_avg": 0.1})(tokens, 9))
    vision = of_equal_images(tokens)
    pruned = Pruned({}, torch.ones(1, 1, dtype=torch.bool), {"image": Chosen(vision, [], selections)})
    assert set(pruned.notes) == {"walked", "ran_dry"}
    walked = [*selections[0].notes["walked"].tolist(), *selections[1].notes["walked"].tolist()]
    assert pruned.notes["walked"].tolist() == walked and len(walked) == 3
    assert pruned.notes["ran_dry"].tolist() == [float(number < 9) for number in walked]


def test_notes_of_an_image_are_the_mean_over_its_items():
    from prunetune.pruning.rewrite import Chosen

    vision = of_equal_images(make_tokens(3, 2, 2))
    numbers = torch.arange(12).view(3, 4)
    tokens = vision.groups[0]
    whole = torch.arange(4)[None]
    # Crops of images 2, 0, 2, and image 1, which is kept whole: nothing is noted of it.
    crops = Candidates(tokens, numbers, (2, 0, 2))
    rest = Candidates(only(tokens, 1), numbers[1:2], (1,))
    noted = {"ran_dry": torch.tensor([True, True, False]), "walked": torch.tensor([1, 2, 4])}
    selections = [Selection(whole.expand(3, 4), notes=noted), Selection(whole)]
    assert Chosen(vision, [crops, rest], selections).notes_per_image() == [
        {"ran_dry": 1.0, "walked": 2.0},
        {},
        {"ran_dry": 0.5, "walked": 2.5},
    ]


# ---- properties ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_downsample_pools_regions_of_equal_area(rows, columns, data):
    keep = data.draw(st.integers(1, rows * columns))
    weights, centers = pooling(rows, columns, keep)
    assert weights.shape == (keep, rows * columns)
    torch.testing.assert_close(weights.sum(1), torch.ones(keep))
    assert centers.tolist() == sorted(set(centers.tolist()))
    assert (weights[torch.arange(keep), centers] > 0).all()


def test_downsample_is_average_pooling_where_that_exists():
    tokens = make_tokens(2, 12, 12)
    merged = torch.stack(build_pruner("downsample")(tokens, 16).merged)
    grid = tokens.features.view(2, 12, 12, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(merged, torch.nn.functional.avg_pool2d(grid, 3).flatten(2).transpose(1, 2))


def test_random_is_uniform_seeded_and_its_own_for_every_picture():
    keys = torch.arange(4000)
    tokens = VisualTokens(features=torch.zeros(4000, 20, 1), signals={"image_key": keys})
    kept = build_pruner("random")(tokens, 5).indices
    share = torch.bincount(kept.flatten(), minlength=20) / 4000
    assert (share - 0.25).abs().max() < 0.035  # 5 standard errors of a fair draw
    assert len({tuple(row) for row in kept.tolist()}) > 3000
    assert torch.equal(kept, build_pruner("random")(tokens, 5).indices)


@settings(max_examples=200, deadline=None)
@given(count=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_divprune_breaks_the_tie_of_mutual_neighbours_to_the_lower_index(count, seed):
    """Two tokens that are each other's nearest are equally lonely, whatever the last bit of a matrix product says."""
    tokens = make_tokens(1, 1, count, seed=seed)
    assert build_pruner("divprune")(tokens, 1).of(0).tolist() == oracles.divprune(tokens, 0, 1)


# ---- golden cases ----------------------------------------------------------------------------------------------


def test_what_is_called_golden_is_checked():
    assert set(CHECKS) == {name for name, method in registered_methods().items() if method.golden}


QUIRKS = {"prumerge_plus": 1, "holov": 2, "vscan": 2}  # tokens kept twice; lost by runs, and by windows


@pytest.mark.parametrize("name", [name for name in CHECKS if not registered_methods()[name].video])
def test_published_code_agrees(name):
    lines, same, total = check(GOLDEN, name)
    more, *counts = check(GOLDEN_NEWER, name)
    lines, same, total = lines + more, same + counts[0], total + counts[1]
    if not total:
        pytest.skip("golden cases are not beside this checkout")
    assert same == total, lines
    different = [line for line in lines if "defined differently" in line]
    assert len(different) == QUIRKS.get(name, 0), different


def save(folder, name, **arrays):
    (folder / name).mkdir(exist_ok=True)
    np.savez(folder / name / "own.npz", **arrays)


def test_cases_of_other_shapes_are_compared_and_wrong_answers_are_seen(tmp_path):
    tokens = make_tokens(2, 4, 4)
    projected = tokens.projected.numpy()
    kept = build_pruner("divprune")(tokens, 5).indices.numpy()
    save(tmp_path, "divprune", projected=projected, keep=5, kept_indices=kept)
    assert check(tmp_path)[1:] == (1, 1)
    wrong = kept.copy()
    wrong[1] = [n for n in range(16) if n not in kept[1]][:5]
    save(tmp_path, "divprune", projected=projected, keep=5, kept_indices=wrong)
    lines, same, total = check(tmp_path)
    assert (same, total) == (0, 1) and "differs: kept_indices" in lines[0]
    wrong[1, 1] = wrong[1, 0]  # a repeat that no duplicate token explains is a wrong answer, not a quirk
    save(tmp_path, "divprune", projected=projected, keep=5, kept_indices=wrong)
    assert check(tmp_path)[1:] == (0, 1)
    save(tmp_path, "divprune", projected=projected, keep=5)  # broken: its answer is missing
    lines, same, total = check(tmp_path)
    assert (same, total) == (0, 1) and "differs: KeyError" in lines[0]


def test_quirks_are_told_by_their_condition(tmp_path):
    tokens = make_tokens(1, 4, 4)
    projected = tokens.projected.numpy()
    projected[:, 3:] = projected[:, :1]  # three different tokens
    save(tmp_path, "divprune", projected=projected, keep=5, kept_indices=np.array([[0, 1, 2]]))
    lines, same, total = check(tmp_path)
    assert (same, total) == (0, 0) and "defined differently: the published code runs out" in lines[0]


def test_a_quirk_that_its_option_does_not_give_is_a_difference(tmp_path):
    """A case is defined differently where the published answer is ours under the option, and not for its name."""
    tokens = make_tokens(1, 4, 5)
    tokens.signals["cls_attention"][0, :, :4] += 5
    pruner = build_pruner("holov", {"runs": 5, "overflow": "published", "order": "published"})
    order = torch.stack(pruner(tokens, 9).origin).numpy()
    stored = {
        "projected": tokens.projected.numpy(),
        "cls_attention": tokens.signals["cls_attention"].numpy(),
        "num_runs": 5,
        "keep": 9,
        "zero_vectors": (order < 0).sum(1),
    }
    save(tmp_path, "holov", **stored, selection_order=order)
    lines, same, total = check(tmp_path)
    assert (same, total) == (0, 0) and "overflow: published agrees" in lines[0]
    order[0, [0, 1]] = order[0, [1, 0]]
    save(tmp_path, "holov", **stored, selection_order=order)
    lines, same, total = check(tmp_path)
    assert (same, total) == (0, 1) and "differs: selection_order" in lines[0]


def test_several_text_segments_and_separate_items_of_equal_count(tmp_path):
    tokens = make_tokens(2, 6, 6)
    text = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    own = replace(tokens, signals={**tokens.signals, "text_embeds": text.expand(2, -1, -1)})
    relevance = []
    for item in range(2):
        r = [-np.mean([oracles.cosine(e, t) for t in text.double().numpy()])
             for e in oracles.of(tokens, "image_embeds", item)]  # fmt: skip
        relevance.append([(v - min(r) + 1e-6) / (max(r) - min(r)) for v in r])
    save(tmp_path, "cdpruner", projected=tokens.projected.numpy(), image_embeds=tokens.signals["image_embeds"].numpy(),
         text_embeds=text.numpy(), keep=7, eps=1e-6, relevance=np.array(relevance, dtype=np.float32),
         kept_indices=build_pruner("cdpruner")(own, 7).indices.numpy())  # fmt: skip
    score = tokens.signals["image_embeds"] @ tokens.signals["text_embeds"][:, 0, :, None]
    selection = build_pruner("trim")(tokens, 8)
    save(tmp_path, "trim", vision_hidden=tokens.features.numpy(), image_embeds=tokens.signals["image_embeds"].numpy(),
         text_embeds=tokens.signals["text_embeds"][:, 0].numpy(), ratio=7 / 36, keep=7,
         kept_indices=torch.stack([row[:-1] for row in selection.origin]).numpy(),
         aggregated_token=torch.stack([row[-1] for row in selection.merged]).numpy())  # fmt: skip
    assert check(tmp_path)[1:] == (2, 2) and score.shape == (2, 36, 1)


# ---- names -----------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(PruningError, match="did you mean 'divprune'"):
        build_pruner("divprun")
    with pytest.raises(PruningError, match="did you mean 'pool_factor'"):
        build_pruner("prismprune", {"pool_facter": 2})
    with pytest.raises(PruningError, match="important_ratio.*1.5"):
        build_pruner("vispruner", {"important_ratio": 1.5})
    with pytest.raises(PruningError, match=r"relevance_sign is one of 1, -1"):
        build_pruner("cdpruner", {"relevance_sign": 0})


def test_a_method_is_servable_where_its_count_is_known_beforehand():
    from prunetune.pruning.registry import servable

    varying = [
        ("adaptive", {"count": "adaptive"}),
        ("prumerge", {"count": "outliers"}),
        ("prumerge_plus", {"count": "outliers"}),
        ("prumerge_plus", {"count": "ratio"}),
        ("trim", {"count": "outliers"}),
        ("fastvid", {"count": "published"}),
        ("vidcom2", {"count": "published"}),
    ]
    for name, options in varying:
        assert servable(name, build_pruner(name)) and registered_methods()[name].servable
        assert not servable(name, build_pruner(name, options))
    for seed in range(3):  # and what is called servable keeps equally many of any image
        tokens = make_tokens(3, 6, 6, seed=seed)
        for name, method in registered_methods().items():
            if method.servable and name != "identity":
                pruner = build_pruner(name)
                assert pruner(tokens, 13).counts() == [expected_count(pruner, tokens, 13)] * 3, name


def test_registration_is_loud():
    with pytest.raises(PruningError, match="two methods are called 'random'"):
        register_pruner("random", paper="-")(type(build_pruner("random")))
    with pytest.raises(PruningError, match="lower-case"):
        register_pruner("DivPrune", paper="-")(type(build_pruner("random")))


def test_a_new_method_is_one_registered_class():
    """What the documentation promises: a frozen dataclass and a decorator, nothing else."""
    from dataclasses import dataclass
    from typing import ClassVar

    from prunetune.pruning import Selection, registry

    @register_pruner("first_tokens", paper="test")
    @dataclass(frozen=True)
    class FirstTokens:
        needs: ClassVar[frozenset] = frozenset()

        def __call__(self, tokens, keep):
            return Selection(torch.arange(keep).expand(len(tokens.features), -1))

    try:
        assert build_pruner("first_tokens")(make_tokens(1, 3, 3), 4).of(0).tolist() == [0, 1, 2, 3]
    finally:
        del registry._METHODS["first_tokens"]
