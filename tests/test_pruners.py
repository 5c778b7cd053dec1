"""Every registered method keeps its contract, and each equals a slow, obvious version of itself."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import PruningError, VisualTokens, build_pruner, register_pruner, registered_methods
from pruning.budget import resolve_budget
from pruning.methods.downsample import pooling

NAMES = [name for name in registered_methods() if name != "identity"]


def make_tokens(batch, rows, columns, channels=12, heads=3, seed=0, dtype=torch.float32) -> VisualTokens:
    g = torch.Generator().manual_seed(seed)
    count = rows * columns
    attention = torch.randn(batch, heads, count + 1, generator=g).mul(2).softmax(-1)[..., 1:]
    return VisualTokens(
        features=torch.randn(batch, count, channels, generator=g).to(dtype),
        projected=torch.randn(batch, count, channels + 4, generator=g).to(dtype),
        cls_attention=attention,
        image_key=torch.randint(0, 2**31 - 1, (batch,), generator=g),
        grid=(rows, columns),
    )


shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))


@st.composite
def cases(draw):
    batch, rows, columns, heads, seed = draw(shapes)
    keep = draw(st.integers(1, rows * columns))
    return make_tokens(batch, rows, columns, heads=heads, seed=seed), keep


# ---- contract, over the registry -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_always_k_distinct_ascending_positions(name, case):
    tokens, keep = case
    selection = build_pruner(name)(tokens, keep)
    for item in range(len(tokens.features)):
        kept = selection.of(item).tolist()
        assert len(kept) == keep and kept == sorted(set(kept)) and 0 <= kept[0] and kept[-1] < tokens.count
        if selection.merged is not None:
            assert selection.merged[item].shape == (keep, tokens.features.shape[-1])


def degenerate(kind: str) -> VisualTokens:
    tokens = make_tokens(2, 4, 5)
    features, projected, attention = tokens.features.clone(), tokens.projected.clone(), tokens.cls_attention.clone()
    if kind == "duplicates":
        features[:], projected[:] = features[:, :1], projected[:, :1]
    elif kind == "zeros":
        features[:, ::2], projected[:, ::2] = 0, 0
    elif kind == "all zero":
        features.zero_(), projected.zero_()
    elif kind == "equal attention":
        attention[:] = 1 / 21
    return VisualTokens(features, projected, attention, tokens.image_key, tokens.grid)


@pytest.mark.parametrize("keep", [1, 2, 7, 19, 20])
@pytest.mark.parametrize("kind", ["duplicates", "zeros", "all zero", "equal attention"])
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_inputs_still_give_k_distinct_positions(name, kind, keep):
    selection = build_pruner(name)(degenerate(kind), keep)
    for item in range(2):
        assert len(set(selection.of(item).tolist())) == keep
    if selection.merged is not None:
        assert all(torch.isfinite(merged).all() for merged in selection.merged)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_keeps_all(name):
    tokens = make_tokens(2, 3, 4)
    selection = build_pruner(name)(tokens, 12)
    assert selection.of(0).tolist() == list(range(12))
    if selection.merged is not None:
        torch.testing.assert_close(selection.merged[1], tokens.features[1])


@pytest.mark.parametrize("name", NAMES)
def test_items_are_pruned_independently_and_half_precision_is_widened(name):
    tokens = make_tokens(3, 5, 5, dtype=torch.bfloat16)
    together = build_pruner(name)(tokens, 9)
    for item in range(3):
        part = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
        part |= {key: value[item : item + 1].float() for key, value in part.items() if isinstance(value, torch.Tensor)}
        part["image_key"] = tokens.image_key[item : item + 1]
        assert torch.equal(together.of(item), build_pruner(name)(VisualTokens(**part), 9).of(0))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_nan_is_an_error_and_not_a_selection(name):
    tokens = make_tokens(2, 4, 4)
    for value in (tokens.features, tokens.projected, tokens.cls_attention):
        value[1, 2] = float("nan")
    with pytest.raises(PruningError, match="NaN"):
        build_pruner(name)(tokens, 4)


@pytest.mark.parametrize("name", [n for n, m in registered_methods().items() if m.needs])
def test_a_missing_signal_is_named(name):
    with pytest.raises(PruningError, match="needs"):
        build_pruner(name)(VisualTokens(features=torch.randn(1, 9, 4), grid=(3, 3)), 4)


# ---- oracles: loops, one item at a time ------------------------------------------------------------------------


def cosine(a, b):
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    return float(a @ b / (na * nb)) if na and nb else 0.0


def oracle_fastervlm(tokens, item, keep):
    attention = tokens.cls_attention[item].double().numpy().mean(0)
    return sorted(sorted(range(len(attention)), key=lambda i: (-attention[i], i))[:keep])


def oracle_divprune(tokens, item, keep):
    x = tokens.projected[item].double().numpy()
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    nearest_other = [min((distance[i][j] for j in range(n) if j != i), default=math.inf) for i in range(n)]
    picked = [max(range(n), key=lambda i: nearest_other[i])]
    while len(picked) < keep:
        left = [i for i in range(n) if i not in picked]
        picked.append(max(left, key=lambda i: min(distance[i][j] for j in picked)))
    return sorted(picked)


def oracle_vispruner(tokens, item, keep):
    x = tokens.features[item].double().numpy()
    attention = tokens.cls_attention[item].double().numpy().mean(0)
    order = sorted(range(len(x)), key=lambda i: (-attention[i], i))
    important = int(keep * 0.5)
    chosen, rest = order[:important], order[important:]
    while len(rest) > keep - important:
        even, odd = rest[0::2], rest[1::2]
        drop = min(8, len(rest) - (keep - important), len(even))
        ranked = sorted(even, key=lambda a: -max((cosine(x[a], x[b]) for b in odd), default=0.0))
        rest = ranked[drop:] + odd
    return sorted(chosen + rest)


def oracle_prismprune(tokens, item, keep, start="salient", metric="cosine", ratio=0.5, factor=4):
    x = tokens.features[item].double().numpy()
    attention = tokens.cls_attention[item].double().numpy()
    mean, variance = attention.mean(0), attention.var(0)
    diverse = int(keep * (1 - ratio))
    kept = sorted(range(len(x)), key=lambda i: (-mean[i], i))[: keep - diverse]
    rest = [i for i in range(len(x)) if i not in kept]
    pool = sorted(rest, key=lambda i: (-variance[i], i))[: (factor * diverse or len(rest))]

    def measure(i, j):
        return 1 - cosine(x[i], x[j]) if metric == "cosine" else np.linalg.norm(x[i] - x[j])

    reference = list(kept) if start == "salient" and kept else []
    picked = []
    while len(picked) < diverse:
        if not reference:
            new = pool[0]
        else:
            left = sorted(i for i in pool if i not in picked)
            new = max(left, key=lambda i: min(measure(i, j) for j in reference))
        picked.append(new)
        reference.append(new)
    return sorted(kept + picked)


ORACLES = {
    "fastervlm": oracle_fastervlm,
    "divprune": oracle_divprune,
    "vispruner": oracle_vispruner,
    "prismprune": oracle_prismprune,
}


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_method_equals_its_oracle(name, case):
    tokens, keep = case
    selection = build_pruner(name)(tokens, keep)
    for item in range(len(tokens.features)):
        assert selection.of(item).tolist() == ORACLES[name](tokens, item, keep)


@pytest.mark.parametrize(
    "options",
    [
        {"fps_start": "top_variance"},
        {"fps_metric": "l2"},
        {"salient_ratio": 0.25},
        {"salient_ratio": 0.0},
        {"salient_ratio": 1.0},
        {"pool_factor": 0},
    ],
)
def test_prismprune_options_equal_their_oracle(options):
    names = {"fps_start": "start", "fps_metric": "metric", "salient_ratio": "ratio", "pool_factor": "factor"}
    tokens = make_tokens(2, 6, 6, heads=4, seed=5)
    selection = build_pruner("prismprune", options)(tokens, 10)
    for item in range(2):
        expected = oracle_prismprune(tokens, item, 10, **{names[key]: value for key, value in options.items()})
        assert selection.of(item).tolist() == expected


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
    tokens = VisualTokens(features=torch.zeros(4000, 20, 1), image_key=keys)
    kept = build_pruner("random")(tokens, 5).indices
    share = torch.bincount(kept.flatten(), minlength=20) / 4000
    assert (share - 0.25).abs().max() < 0.035  # 5 standard errors of a fair draw
    assert len({tuple(row) for row in kept.tolist()}) > 3000
    assert torch.equal(kept, build_pruner("random")(tokens, 5).indices)
    assert not torch.equal(kept, build_pruner("random", {"seed": 1})(tokens, 5).indices)


# ---- golden cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastervlm", "vispruner", "divprune"])
def test_published_code_agrees(name):
    files = sorted((GOLDEN / name).glob("*.npz"))
    if not files:
        pytest.skip("golden cases are not beside this checkout")
    for file in files:
        data = np.load(file)
        arrays = {key: torch.from_numpy(data[key]) for key in data.files if data[key].ndim > 1}
        attention = arrays.get("cls_attention")
        features = arrays.get("vision_hidden", arrays.get("projected"))
        if features is None:
            features = torch.zeros(attention.shape[0], attention.shape[2], 1)
        options = {}
        if name == "vispruner":
            options["important_ratio"] = float(data["important_ratio"])
            options["removed_per_round"] = int(data["remove_per_iter"])
        tokens = VisualTokens(features, arrays.get("projected"), attention)
        kept = build_pruner(name, options)(tokens, int(data["keep"])).indices.numpy()
        assert np.array_equal(kept, data["kept_indices"].reshape(kept.shape)), file.name


# ---- names, options, budgets -----------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(PruningError, match="did you mean 'divprune'"):
        build_pruner("divprun")
    with pytest.raises(PruningError, match="did you mean 'pool_factor'"):
        build_pruner("prismprune", {"pool_facter": 2})
    with pytest.raises(PruningError, match="important_ratio.*1.5"):
        build_pruner("vispruner", {"important_ratio": 1.5})


def test_registration_is_loud():
    with pytest.raises(PruningError, match="two methods are called 'random'"):
        register_pruner("random", paper="-")(type(build_pruner("random")))
    with pytest.raises(PruningError, match="lower-case"):
        register_pruner("DivPrune", paper="-")(type(build_pruner("random")))


@pytest.mark.parametrize(
    ("keep", "count", "wanted"),
    [
        (64, 576, 64),
        (0.111, 576, 64),
        ("50%", 144, 72),
        ("11.1%", 576, 64),
        (1.0, 9, 9),
        (1, 9, 1),
        (0.5, 5, 2),
        ("100%", 7, 7),
    ],
)
def test_budgets(keep, count, wanted):
    assert resolve_budget(keep, count) == wanted


@pytest.mark.parametrize("keep", [0, -3, 577, 0.0, 1.5, -0.1, "0%", "101%", "64", "many%", 0.0001, True, None])
def test_budgets_out_of_range_say_so(keep):
    with pytest.raises(PruningError, match=r"keep="):
        resolve_budget(keep, 576)


def test_a_new_method_is_one_registered_class():
    """What the documentation promises: a frozen dataclass and a decorator, nothing else."""
    from dataclasses import dataclass
    from typing import ClassVar

    from pruning import Selection, registry

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


@settings(max_examples=200, deadline=None)
@given(count=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_divprune_breaks_the_tie_of_mutual_neighbours_to_the_lower_index(count, seed):
    """Two tokens that are each other's nearest are equally lonely, whatever the last bit of a matrix product says."""
    tokens = make_tokens(1, 1, count, seed=seed)
    assert build_pruner("divprune")(tokens, 1).of(0).tolist() == oracle_divprune(tokens, 0, 1)
