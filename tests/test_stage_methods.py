"""Each stage equals a slow version of itself, and agrees with published code where its answers are at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT

from prunetune.pruning import PruningError
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stages.base import Choice, Heard, Stage, best
from prunetune.pruning.stages.decoder import decoder_of
from prunetune.pruning.stages.methods.sparsevlm import clustered
from prunetune.pruning.stages.methods.vtw import search_boundary
from prunetune.pruning.stages.plan import PLAN, plan_of
from prunetune.pruning.stages.registry import build_stage, register_stage, registered_stages
from prunetune.pruning.stages.run import Stages
from prunetune.pruning.stages.schedule import Point, Schedule, schedule_of

GOLDEN = ROOT.parent / "shared" / "golden_stages"
published = pytest.mark.skipif(not GOLDEN.is_dir(), reason="answers of the published code are not here")


def made(rows=3, slots=12, heads=4, queries=2, seed=0, visual=7):
    """What a stage hears, at random: visual tokens in the middle of the first rows, fewer in the last."""
    generator = torch.Generator().manual_seed(seed)
    is_visual = torch.zeros(rows, slots, dtype=torch.bool)
    is_visual[:, 2 : 2 + visual] = True
    is_visual[-1, 4:6] = False
    question = torch.zeros(rows, slots, dtype=torch.bool)
    question[:, 2 + visual : -1] = True
    there = torch.ones(rows, queries, dtype=torch.bool)
    there[-1, 1:] = False
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Heard(
        is_visual,
        question,
        attention=draw(rows, heads, queries, slots).softmax(-1),
        rows=there,
        keys=draw(rows, slots, 8),
        states=draw(rows, slots, 6),
        normed=draw(rows, slots, 6),
        unit_scores=draw(rows, queries, slots),
    )


def highest(scores, slots, keep):
    """The ``keep`` slots with the highest scores, ties to the lower one."""
    return set(sorted(slots, key=lambda slot: (-scores[slot], slot))[:keep])


def kept_of(choice):
    return [set(row.nonzero()[:, 0].tolist()) for row in choice.kept]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("seed", range(4))
def test_attended_tokens_against_a_loop(name, seed):
    at, keep = made(seed=seed, queries=1 if name == "fastv" else 3), [3, 1, 5]
    found = kept_of(build_stage(name).choose(at, keep))
    for row in range(3):
        slots = at.visual[row].nonzero()[:, 0].tolist()
        asked = [q for q in range(at.rows.shape[1]) if at.rows[row, q]]
        score = {}
        for slot in slots:
            total = [float(at.attention[row, head, q, slot]) for q in asked for head in range(4)]
            score[slot] = math.fsum(total) / len(total)
        assert found[row] == highest(score, slots, keep[row])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [[7, 5, 3], [2, 7, 1]])
def test_dart_against_a_loop(seed, keep):
    at = made(seed=seed)
    found = kept_of(build_stage("dart", {"image_pivots": 2, "text_pivots": 1}).choose(at, keep))
    for row in range(3):
        visual = at.visual[row].nonzero()[:, 0].tolist()
        norm = {slot: sum(abs(float(x)) for x in at.keys[row, slot]) for slot in range(12)}
        by_norm = sorted(visual, key=lambda slot: -norm[slot])[: min(2, keep[row])]
        text = sorted(at.question[row].nonzero()[:, 0].tolist(), key=lambda slot: -norm[slot])[:1]
        taken, pivots = set(by_norm), by_norm + text
        left = min(keep[row], len(visual)) - len(taken)
        for number, pivot in enumerate(pivots):
            share = math.ceil(left / (len(pivots) - number))
            free = [slot for slot in visual if slot not in taken]
            cosine = {
                slot: float(torch.cosine_similarity(at.normed[row, slot], at.normed[row, pivot], dim=0))
                for slot in free
            }
            taken |= set(sorted(free, key=lambda slot: cosine[slot])[:share])
            left -= share
        assert found[row] == taken


def slow_clusters(states, count):
    """Density peaks with loops."""
    number, width = states.shape
    distance = [[float(((a - b) ** 2).sum()) ** 0.5 / width**0.5 for b in states] for a in states]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / min(count, number)) for row in distance]
    top = max(max(row) for row in distance)
    apart = []
    for i in range(number):
        denser = [distance[i][j] for j in range(number) if (-density[j], j) < (-density[i], i)]
        apart.append(min(denser, default=top))
    centres = sorted(range(number), key=lambda i: (-density[i] * apart[i], i))[:count]
    belongs = [centres.index(i) if i in centres else min(range(count), key=lambda c: distance[centres[c]][i])
               for i in range(number)]  # fmt: skip
    return centres, belongs


@pytest.mark.parametrize(("number", "count"), [(1, 1), (7, 1), (12, 2), (25, 3)])
def test_clusters_against_loops(number, count):
    states = torch.randn(number, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    centres, belongs = clustered(states.float(), count)
    slow = slow_clusters(states.float().double(), count)
    if count == 2:  # mutual nearest neighbours are equally dense but for rounding
        pair = {tuple(sorted(centres.tolist())), tuple(sorted(slow[0]))}
        assert len(pair) == 1
        return
    assert (centres.tolist(), belongs.tolist()) == slow


@pytest.mark.parametrize("seed", range(3))
def test_sparsevlm_against_a_loop(seed):
    at, keep = made(seed=seed, slots=50, visual=40), [5, 12, 3]
    stage = build_stage("sparsevlm")
    choice = stage.choose(at, keep)
    found = kept_of(choice)
    for row in range(3):
        visual = at.visual[row].nonzero()[:, 0].tolist()
        asked = [q for q in range(2) if at.rows[row, q]]
        score = {slot: float(at.attention[row][:, asked, slot].double().mean()) for slot in visual}
        assert found[row] == highest(score, visual, keep[row])
        dropped = sorted((slot for slot in visual if slot not in found[row]), key=lambda slot: -score[slot])
        recycled = dropped[: int(len(dropped) * 0.3) + 1]
        clusters = int(len(recycled) / 10) + 1
        assert choice.merged.counts[row] == clusters
        assert stage.after(len(visual), keep[row]) == keep[row] + clusters
        mixed = choice.merged.mixing[row, :clusters]
        used = mixed.sum(dim=0).nonzero()[:, 0].tolist()
        assert used == sorted(recycled)
        torch.testing.assert_close(mixed.sum(dim=1), torch.ones(clusters), rtol=1e-4, atol=1e-4)
        centres = choice.merged.centres[row, :clusters].tolist()
        assert all(mixed[number, centre] > 0 for number, centre in enumerate(centres))


def test_raters_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(2, 14, 6, generator=generator)
    visual = torch.zeros(2, 14, dtype=torch.bool)
    visual[0, 2:6] = visual[1, 3:9] = True
    question = torch.zeros(2, 14, dtype=torch.bool)
    question[0, 6:12] = question[1, 9:14] = True
    found = build_stage("sparsevlm").raters(embeddings, visual, question)
    for row in range(2):
        text = question[row].nonzero()[:, 0].tolist()
        share = dict.fromkeys(text, 0.0)
        for token in visual[row].nonzero()[:, 0].tolist():
            weights = [math.exp(float(embeddings[row, token] @ embeddings[row, word])) for word in text]
            for word, weight in zip(text, weights, strict=True):
                share[word] += weight / sum(weights) / int(visual[row].sum())
        mean = sum(share.values()) / len(share)
        assert found[row].nonzero()[:, 0].tolist() == [word for word in text if share[word] > mean]


def test_version_2_counts_the_strongest_half_of_the_heads():
    at, keep = made(seed=5), [3, 3, 2]
    found = kept_of(build_stage("sparsevlm", {"version": 2}).choose(at, keep))
    for row in range(3):
        visual = at.visual[row].nonzero()[:, 0].tolist()
        asked = [q for q in range(2) if at.rows[row, q]]
        divided = at.attention[row] / at.unit_scores[row][None]
        strength = [float(divided[head][asked][:, visual].sum()) for head in range(4)]
        heads = sorted(range(4), key=lambda head: -strength[head])[:2]
        score = {slot: float(divided[heads][:, asked][:, :, slot].mean()) for slot in visual}
        assert found[row] == highest(score, visual, keep[row])


def test_ties_go_to_the_lower_index_and_others_are_never_kept():
    visual = torch.tensor([[True, False, True, True]])
    assert best(torch.tensor([[0.5, 9.0, 0.5, 0.7]]), visual, [2]).tolist() == [[True, False, False, True]]
    assert best(torch.full((1, 4), float("-inf")), visual, [3]).tolist() == visual.tolist()


# ---- budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boundaries", "entering", "average", "keep"),
    [
        ([2], 576, 192, [166]),
        ([2], 576, 128, [98]),
        ([2], 576, 64, [29]),
        ([3], 576, 192, [152]),
        ([3], 576, 64, [11]),
        ([2], 2880, 640, [490]),
        ([3], 2880, 320, [55]),
        ([2, 6, 15], 576, 192, [334, 194, 112]),
        ([2, 6, 15], 576, 128, [258, 115, 51]),
        ([2, 6, 15], 576, 64, [131, 30, 6]),
        ([8, 16, 24], 576, 192, [146, 37, 9]),
    ],
)
def test_averages_are_solved_into_counts(boundaries, entering, average, keep):
    spec = StageSpec(name="pyramiddrop", boundaries=boundaries, average=average)
    counts = schedule_of([spec], 32).counts(entering)
    assert list(counts.keep) == keep
    assert counts.average <= average and len(counts.layers) == 32
    ends = [*boundaries[1:], 32]
    by_hand = boundaries[0] * entering + sum(n * (end - b) for n, b, end in zip(keep, boundaries, ends, strict=True))
    assert counts.average == by_hand / 32 and counts.final == keep[-1]


@pytest.mark.parametrize(("boundary", "entering", "least"), [(2, 576, 36), (3, 576, 54), (8, 576, 144), (2, 2880, 180)])
def test_averages_that_can_not_be_reached_are_refused_with_the_least(boundary, entering, least):
    spec = StageSpec(name="fastv", boundaries=[boundary], average=least - 1)
    with pytest.raises(PruningError, match=f"with {entering} that enter.*process {least} already"):
        schedule_of([spec], 32).counts(entering)
    assert schedule_of([spec], 32).counts(least - 1).average == least - 1  # fewer tokens than that are left alone


@pytest.mark.parametrize(
    ("name", "layers", "entering", "average"),
    [
        ("pyramiddrop", 32, 576, 270.0),
        ("pyramiddrop", 40, 576, 230.4),
        ("vtw", 32, 576, 270.0),
        ("dart", 32, 576, 159.75),
        ("fastv", 32, 576, 306.0),
    ],
)
def test_published_defaults_have_the_computed_averages(name, layers, entering, average):
    assert schedule_of([StageSpec(name=name)], layers).counts(entering).average == average


@pytest.mark.parametrize(
    ("keep", "after", "average", "version"),
    [
        ([300, 200, 110], [309, 204, 113], 206.5, 1),
        ([303, 110, 36], [312, 117, 39], 145.4, 1),
        ([66, 30, 17], [82, 32, 18], 82.2, 1),
        ([300, 200, 118], [300, 200, 118], 206.8, 2),
        ([66, 34, 20], [66, 34, 20], 81.8, 2),
    ],
)
def test_merged_tokens_count(keep, after, average, version):
    counts = schedule_of([StageSpec(name="sparsevlm", keep=keep, options={"version": version})], 32).counts(576)
    assert list(counts.after) == after
    assert round(counts.average, 1) == average


def test_an_average_counts_all_stages_together():
    specs = [StageSpec(name="fastv", average=100), StageSpec(name="vtw")]
    counts = schedule_of(specs, 32).counts(576)
    assert counts.keep == (157, 0) and counts.layers == (576,) * 2 + (157,) * 13 + (0,) * 17
    assert counts.average <= 100 < counts.average + 13 / 32
    with pytest.raises(PruningError, match="only one of pruning.stages"):
        schedule_of([StageSpec(name="fastv", average=9), StageSpec(name="dart", boundaries=[3], average=9)], 32)
    with pytest.raises(PruningError, match="both have boundary 2"):
        schedule_of([StageSpec(name="fastv"), StageSpec(name="dart")], 32)
    with pytest.raises(PruningError, match="b \\* N / L; set boundaries"):
        schedule_of([StageSpec(name="vtw", average=64)], 32)


def test_shares_round_as_published():
    assert build_stage("fastv").count(0.125, 36) == 4  # half to even
    assert build_stage("pyramiddrop").count(0.5, 37) == 18  # down
    assert build_stage("pyramiddrop").count("12.5%", 2880) == 360
    assert build_stage("fastv").count(700, 576) == 576


def test_stages_are_registered_once_and_by_contract():
    assert list(registered_stages()) == ["dart", "fastv", "pyramiddrop", "sparsevlm", "vtw"]
    with pytest.raises(PruningError, match="two stages are called 'fastv'"):
        register_stage("fastv", paper="-")(type(build_stage("vtw")))
    with pytest.raises(PruningError, match="frozen dataclass based on Stage"):
        register_stage("other", paper="-")(object)
    with pytest.raises(PruningError, match="option 'version' of stage 'sparsevlm' takes"):
        build_stage("sparsevlm", {"version": "two"})
    with pytest.raises(PruningError, match="version is one of 1, 2"):
        build_stage("sparsevlm", {"version": 3})


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "dart", "sparsevlm"])
def test_autocast_does_not_reach_the_scores(name):
    """Of the first layer, which sees the same whether autocast is on or off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape)).eval()
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[:, 4:20] = True
    embeddings, found = torch.randn(2, 30, 32), []
    for dtype in (None, torch.bfloat16):
        schedule = schedule_of([StageSpec(name=name, boundaries=[1], keep=[6])], 3)
        stages = Stages(schedule, decoder_of(model.model), ())
        plan = plan_of(schedule, visual)
        stage, heard_of = schedule.points[0].stage, []
        object.__setattr__(
            stage,
            "choose",
            lambda at, keep, seen=heard_of, own=stage: seen.append(at) or type(own).choose(own, at, keep),
        )
        with stages.attached(None), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            stages._enter(plan, embeddings, None)
            rotary = model.model.rotary_emb(embeddings, position_ids=torch.arange(30)[None])
            if stage.listens == -1:
                stages._listen(0, plan, None, 0, embeddings, rotary)
            stages._decide(0, plan, embeddings, rotary)
        found.append((heard_of[0], plan.kept_columns()))
    (plain, kept), (cast, same) = found
    assert torch.equal(kept, same) and int(kept.sum()) >= 12
    for tensor in sorted(schedule.points[0].stage.wants):
        assert torch.equal(getattr(plain, tensor), getattr(cast, tensor))


# ---- answers of the published code -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas():
    """The tiny model of the answers, by its number of heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not GOLDEN.is_dir():
        pytest.skip("answers of the published code are not here")
    weights = {name: torch.tensor(value).float() for name, value in np.load(GOLDEN / "tiny_llama.npz").items()}
    found = {}
    for heads in (4, 24):
        shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 18, "num_attention_heads": heads}
        config = LlamaConfig(vocab_size=40, num_key_value_heads=heads, tie_word_embeddings=False, **shape)
        found[heads] = LlamaForCausalLM(config).eval()
        found[heads].load_state_dict(weights)
    return found


@torch.no_grad()
def run_case(case, model, schedule):
    """The plan of a case, its logits (4, V) and cache lengths."""
    from transformers import DynamicCache

    embeddings = torch.tensor(case["inputs_embeds"]).float()
    begin, count = int(case["image_start"]), int(case["image_length"])
    visual = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    visual[:, begin : begin + count] = True
    plan = plan_of(schedule, visual)
    cache = DynamicCache(config=model.config)
    with Stages(schedule, decoder_of(model.model), ()).attached(None):
        logits = [model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **{PLAN: plan}).logits[0, -1]]
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        for token in case["decode_tokens"]:
            ids = torch.tensor([[int(token)]])
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1])
    return plan, torch.stack(logits), lengths


def cases(folder, pattern="run_*.npz"):
    return sorted(path.relative_to(GOLDEN).as_posix() for path in (GOLDEN / folder).glob(pattern)) or ["none"]


def spec_of_case(path, case):
    """The stage of a case, and its boundaries."""
    method = path.split("/")[0]
    options = {}
    if method == "pyramiddrop":
        return StageSpec(name=method, boundaries=case["layer_list"].tolist(), keep=case["keep"].tolist())
    if method == "sparsevlm":
        if "v2" in path:
            options = {"version": 2, "heads": 14}
        boundaries = (case["pruning_layers"] + 1).tolist()
        return StageSpec(name=method, boundaries=boundaries, keep=case["keep"].tolist(), options=options)
    keep = None
    if method == "fastv":
        keep = 1 - float(case["ratio_dropped"])
    if method == "dart":
        keep = int(case["keep"])
        options = {"image_pivots": int(case["pivots_image"]), "text_pivots": int(case["pivots_text"])}
    if method == "vtw":
        options = {"positions": str(case["positions"])}
    return StageSpec(name=method, boundaries=[int(case["layer"])], keep=keep, options=options)


@published
@pytest.mark.parametrize(
    "path", cases("fastv") + cases("vtw") + cases("pyramiddrop") + cases("dart") + cases("sparsevlm")
)
def test_published_answers(path, llamas):
    case = np.load(GOLDEN / path)
    model = llamas[int(case["num_heads"]) if "num_heads" in case else 4]
    schedule = schedule_of([spec_of_case(path, case)], 18)
    plan, logits, lengths = run_case(case, model, schedule)
    assert lengths == case["cache_lengths"].tolist()
    begin, count = int(case["image_start"]), int(case["image_length"])
    if "kept_indices" in case:
        assert (plan.kept_columns()[0].nonzero()[:, 0] - begin).tolist() == case["kept_indices"].tolist()
    if path.startswith(("pyramiddrop", "sparsevlm/run_v2")):
        entering = torch.arange(begin, begin + count)
        for number, point in enumerate(schedule.points):
            left = plan.kept_columns(point.boundary)[0].nonzero()[:, 0]
            kept = torch.isin(entering, left).nonzero()[:, 0]
            assert kept.tolist() == case[f"stage{number}_kept_indices"].tolist()
            entering = left
    if "raters" in case:
        (first, *_) = plan.raters.values()
        assert (first[0].nonzero()[:, 0] - begin - count).tolist() == case["raters"].tolist()
    if "logits" in case:
        torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=0, atol=1e-3)


@published
@pytest.mark.parametrize("path", cases("dart"))
def test_dart_with_the_published_order_of_pivots(path, llamas):
    """Kept tokens given as they were in that order: what follows is the published run."""
    case = np.load(GOLDEN / path)

    @dataclass(frozen=True)
    class Given(Stage):
        hears: ClassVar[frozenset[str]] = frozenset()

        def choose(self, at, keep):
            kept = torch.zeros_like(at.visual)
            kept[0, torch.tensor(case["kept_indices_published"]).long() + int(case["image_start"])] = True
            return Choice(kept)

    schedule = Schedule((Point(int(case["layer"]), Given(), "given", int(case["keep"]), 1),), 18)
    _, logits, _ = run_case(case, llamas[4], schedule)
    torch.testing.assert_close(logits, torch.tensor(case["logits_published"]), rtol=0, atol=1e-3)


@published
@pytest.mark.parametrize("path", cases("vtw", "search_*.npz"))
def test_published_searches_of_a_boundary(path):
    case = np.load(GOLDEN / path)
    full, withdrawn = torch.tensor(case["full_logits"]), torch.tensor(case["withdrawn_logits"])
    layer, change = search_boundary(full, withdrawn, int(case["first_layer"]), float(case["eta"]))
    assert layer == int(case["layer"])
    torch.testing.assert_close(change, torch.tensor(case["mean_kl"]), rtol=1e-3, atol=1e-5)
    with pytest.raises(PruningError, match="larger eta"):
        search_boundary(full, withdrawn, 5, 1e-9)


@published
def test_published_training_batch(llamas):
    """PyramidDrop's choice from a padded batch: two answers, no image, no answer."""
    case = np.load(GOLDEN / "pyramiddrop" / "train_batch4.npz")
    model, layer = llamas[4], int(case["rank_layer"])
    states = torch.tensor(case["features"]).float()
    mask, labels = torch.tensor(case["attention_mask"]), torch.tensor(case["labels"])
    visual = torch.zeros(mask.shape, dtype=torch.bool)
    for row, (begin, count) in enumerate(zip(case["image_start"], case["image_length"], strict=True)):
        visual[row, max(begin, 0) : max(begin, 0) + count] = True
    schedule = schedule_of([StageSpec(name="pyramiddrop", boundaries=[layer], keep=float(case["ratio"]))], 18)
    plan = plan_of(schedule, visual, mask, labels.long())
    stages = Stages(schedule, decoder_of(model.model), ())
    rotary = model.model.rotary_emb(states, position_ids=torch.arange(states.shape[1])[None])
    with torch.no_grad():
        stages._decide(0, plan, states, rotary)
    for row in (0, 1):
        kept = plan.kept_columns()[row].nonzero()[:, 0] - int(case["image_start"][row])
        assert kept.tolist() == case[f"kept_indices_{row}"].tolist()
    assert not plan.kept_columns()[2].any() and torch.equal(plan.kept_columns()[3], visual[3])
    segment = plan.segments[layer]
    assert segment.shown.sum(dim=1).tolist() == case["out_lengths"].tolist()
    positions = torch.tensor(case["out_position_ids"])
    real = torch.tensor(case["out_attention_mask"]).bool()
    assert torch.equal(segment.positions()[segment.shown], positions[real])
