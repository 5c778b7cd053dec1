"""The shared loops: against what they mean, and the Triton kernels against the plain version."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.pruning.ops import duplicates
from prunetune.pruning.ops.duplicates import without_duplicates, without_duplicates_each
from prunetune.pruning.ops.greedy import pick_determinantal, pick_spread
from prunetune.pruning.ops.similarity import cosine_similarity


def features(seed, batch, count, channels):
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 24), update=st.sampled_from(["minimum", "add"]), data=st.data())
def test_spread_picks_the_highest_state_step_by_step(seed, count, update, data):
    matrix, state = features(seed, 2, count, count), features(seed + 1, 1, 2, count)[0]
    blocked = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.3
    keep = data.draw(st.integers(0, int((~blocked).sum(1).min())))
    picks = pick_spread(matrix, state, keep, update, blocked)
    for item in range(2):
        now = {i: float(state[item, i]) for i in range(count) if not blocked[item, i]}
        for step in range(keep):
            best = max(now, key=lambda i: now[i])
            assert picks[item, step] == best
            del now[best]
            row = matrix[item, best]
            now = {i: min(v, float(row[i])) if update == "minimum" else float(torch.tensor(v) + row[i])
                   for i, v in now.items()}  # fmt: skip


def test_a_used_up_rank_is_filled_by_quality():
    """Four directions in 20 tokens: after four picks no volume is left, and the best of the rest follow in order."""
    basis = torch.eye(4)
    tokens = basis[torch.arange(20) % 4][None]
    quality = torch.linspace(0.1, 1, 20)[None]
    picks = pick_determinantal(cosine_similarity(tokens), quality, 9)[0].tolist()
    assert sorted(picks[:4]) == [16, 17, 18, 19] and picks[4:] == [15, 14, 13, 12, 11]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), per_round=st.integers(1, 9), data=st.data())
def test_all_ways_to_remove_duplicates_agree(seed, count, per_round, data):
    """Whole rows (one item, many items), neighbour lists, and lists of different length are one algorithm."""
    similarity = cosine_similarity(features(seed, 2, count, 6))
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(seed + b)) for b in range(2)])
    head = data.draw(st.integers(0, count - 1))
    wanted = data.draw(st.integers(1, count - head))
    rest = order[:, head:]
    many = without_duplicates(similarity, rest, wanted, per_round)
    for item in range(2):
        alone = without_duplicates(similarity[item : item + 1], rest[item : item + 1], wanted, per_round)
        assert torch.equal(alone[0], many[item])
    short, duplicates.SHORT = duplicates.SHORT, 0
    try:
        assert torch.equal(without_duplicates(similarity, rest, wanted, per_round), many)
    finally:
        duplicates.SHORT = short
    heads, budgets = [head, min(head + 1, count - 1)], [wanted, 1]
    each = without_duplicates_each(similarity, order, heads, budgets, per_round)
    for item in range(2):
        own = without_duplicates(similarity[item : item + 1], order[item : item + 1, heads[item] :], budgets[item],
                                 per_round)  # fmt: skip
        assert each[item].nonzero()[:, 0].tolist() == sorted(own[0].tolist())


@pytest.mark.parametrize("short", [duplicates.SHORT, 0], ids=["rows", "neighbours"])
@pytest.mark.parametrize("kind", ["random", "duplicates", "nearly equal"])
def test_rounds_on_rounded_numbers_are_those_of_float64(kind, short, monkeypatch):
    """Where float32 can't tell two tokens apart, the rounds look at float64."""
    monkeypatch.setattr(duplicates, "SHORT", short)
    for seed in range(8):
        count = 11 + 9 * seed
        x = features(seed, 2, count, 8).double()
        if kind == "duplicates":
            x = x[:, torch.arange(count) % (count // 2)]
        similarity = cosine_similarity(x, dtype=torch.float64)
        similarity = (similarity + similarity.transpose(1, 2)) / 2
        if kind == "nearly equal":
            similarity = 0.5 + 1e-7 * similarity
        rest = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(b)) for b in range(2)])
        wanted = 3 + 5 * seed
        ours = without_duplicates(similarity, rest, wanted, 4)
        for item in range(2):
            left = rest[item].tolist()
            while len(left) > wanted:
                even, odd = left[0::2], left[1::2]
                alike = {a: max(float(similarity[item, a, b]) for b in odd) for a in even}
                drop = min(4, len(left) - wanted, len(even))
                left = sorted(even, key=lambda a: -alike[a])[drop:] + odd
            assert ours[item].tolist() == left


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 20), data=st.data())
def test_blocked_tokens_are_not_picked_and_the_others_as_if_they_were_all(seed, count, data):
    similarity = cosine_similarity(features(seed, 2, count, 6))
    quality = torch.rand(2, count, generator=torch.Generator().manual_seed(seed))
    free = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
    blocked = torch.ones(2, count, dtype=torch.bool)
    blocked[:, free] = False
    picks = pick_determinantal(similarity, quality, len(free), blocked)
    alone = pick_determinantal(similarity[:, free][:, :, free], quality[:, free], len(free))
    assert torch.equal(picks, torch.tensor(free)[alone])


KERNELS = """
import torch
from prunetune.pruning.ops import greedy, greedy_triton
from prunetune.pruning.ops.similarity import cosine_similarity
for seed in range(12):
    g = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 70, (1,), generator=g))
    keep = int(torch.randint(1, count + 1, (1,), generator=g))
    x = torch.randn(2, count, 5 if seed % 3 else 40, generator=g)
    if seed % 4 == 0:
        x[:, ::2] = x[:, :1]
    if seed % 5 == 0:
        x[:, 1] = 0
    similarity, quality = cosine_similarity(x), torch.rand(2, count, generator=g)
    for update in ("minimum", "add"):
        state = quality.clone()
        state[:, count // 2] = float("-inf")
        most = min(keep, count - 1)
        plain = greedy.pick_spread(similarity, state, most, update)
        assert torch.equal(plain, greedy_triton.pick_spread(similarity, state, most, update)), (seed, update)
    plain = greedy.pick_determinantal(similarity, quality, keep)
    greedy_triton.usable = lambda matrix: True
    assert torch.equal(plain, greedy.pick_determinantal(similarity, quality, keep)), seed
    greedy_triton.usable = lambda matrix: False
    blocked = torch.rand(2, count, generator=g) < 0.4
    blocked[:, 0] = False
    free = int((~blocked).sum(1).min())
    rank_by = torch.rand(2, count, generator=g)
    plain = greedy.pick_determinantal(similarity, quality, free, blocked, rank_by)
    greedy_triton.usable = lambda matrix: True
    assert torch.equal(plain, greedy.pick_determinantal(similarity, quality, free, blocked, rank_by)), seed
    greedy_triton.usable = lambda matrix: False
print("kernels agree")
"""


def test_triton_kernels_equal_the_plain_version():
    """In Triton's interpreter, so without a GPU; the compiled kernels are checked by benchmarks/pruners.py on one."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "kernels agree", run.stderr[-2000:]
