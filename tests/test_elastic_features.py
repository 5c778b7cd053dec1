"""Feature caches where the projector decides the choice: all tokens are stored, and methods choose from them anew."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import test_idefics3
import test_llava
import test_llava_next
import test_qwen2_5_vl
import torch
from conftest import TINY_VLM
from launches import arguments, losses, run_several
from test_features import data, made, some_samples, two_steps, unshared

from prunetune.cli import main
from prunetune.configs import ModelConfig
from prunetune.data_recipes import Turn
from prunetune.errors import PrunetuneError
from prunetune.models import Arm
from prunetune.models.features import FeatureFormatter, FeatureStore
from prunetune.models.features.kept import check_can_be_stored, choose_before_projector, joined, kept_images, kept_slots
from prunetune.models.features.shard import Entry, Shard, write_shard
from prunetune.models.features.store import stored_images
from prunetune.pruning import PruningError, PruningSpec
from prunetune.pruning.stored import choice_of
from prunetune.tiny_world.recipe import SceneImages

ALL = PruningSpec()
PRISM = PruningSpec("prismprune", 16)
MERGING = PruningSpec("visionzip", 16)
TEXT_ALONE = {"alpha": 1.0, "text": "llm"}
ANEW = [
    PruningSpec("divprune", 16),
    PruningSpec("fps", "10%"),
    PruningSpec("crisprune", 16, TEXT_ALONE),  # reads the question
    PruningSpec("trimtokenator", 12),
]


@pytest.fixture(scope="module")
def base():
    return Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), PRISM, device="cpu")


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    return made(tmp_path_factory.mktemp("features") / "cache", base, [PRISM, MERGING, ALL])


@pytest.mark.parametrize("spec", [*ANEW, ALL], ids=lambda spec: spec.pruner)
def test_training_from_all_tokens_equals_training_from_pixels(base, cache, spec):
    """After a step the projector is another one, and so is the choice: the second step's is the new one."""
    samples = some_samples()
    groups = [samples[:5], [samples[-1], *samples[5:8]], samples[:5]]
    plain, cached = unshared(base, spec), unshared(base, spec)
    formatter = plain.formatter(SceneImages())
    expected = two_steps(plain, [formatter.training_batch(group) for group in groups])
    store = FeatureStore.open(cache, cached, data(), trains=True)
    batches = [FeatureFormatter(store, cached).training_batch(group) for group in groups]
    cached.model.base_model.vision_tower = None  # nothing may ask for it
    losses, gradients, kept = two_steps(cached, batches)
    for (keep, counts, notes), (keep2, counts2, notes2) in zip(kept, expected[2], strict=True):
        assert torch.equal(keep, keep2) and counts == counts2 and notes == notes2
    if spec.pruner == "divprune":
        assert not torch.equal(kept[0][0], kept[2][0])
    assert losses == pytest.approx(expected[0], rel=0, abs=1e-6)
    for own, other in zip(gradients, expected[1], strict=True):
        for name in other:
            torch.testing.assert_close(own[name], other[name], rtol=1e-5, atol=1e-6)
    (sample,) = samples[:1]
    assert store.kept(sample) == int(kept[0][1]["image"][0])


def test_a_tuned_arm_is_answered_for_from_all_tokens(base, cache):
    """The choice of the projector that runs, not of the one that the cache was made with."""
    arm = unshared(base, ANEW[0])
    projector = arm.model.base_model.multi_modal_projector
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    samples = [replace(sample, turns=(Turn(sample.turns[0].question, None),)) for sample in some_samples()]
    store = FeatureStore.open(cache, arm, data())
    plain = arm.answer(arm.formatter(SceneImages()), samples, 4)
    assert arm.answer(FeatureFormatter(store, arm), samples, 4) == plain
    assert [answer.kept for answer in plain] == [16] * 10 + [0]


SETTINGS = [ALL, PRISM, ANEW[0], MERGING, ANEW[2], PruningSpec("divprune", 8)]


def test_every_sample_of_a_batch_may_have_a_setting_of_its_own(base, cache):
    store = FeatureStore.open(cache, base, trains=True, settings=SETTINGS)
    samples = some_samples()
    cells = [1, 0, 2, 3, 1, 5, 4, 0, 1, 1, 0]
    stored = store.batch(samples, cells=cells)
    read = [choice_of(PRISM), choice_of(ALL), choice_of(MERGING)]
    of_cell = [read[number] for number in (1, 0, 1, 2, 1, 1)]
    assert list(stored.choices) == [of_cell[cell] for cell in cells[:10]]  # the last is text alone
    rows = [16, 144, 144, 16, 16, 144, 144, 144, 16, 16]
    assert len(stored.rows) == sum(rows) and stored.lengths == (144,) * 10
    first = 0
    for sample, cell, count in zip(samples, cells, rows, strict=False):
        alone = store.batch([sample], cells=[cell])
        assert torch.equal(stored.rows[first : first + count], alone.rows)
        first += count
    budgets = [144, 16, 16, 16, 16, 8]
    assert [store.kept(sample, cell) for sample, cell in zip(samples, cells, strict=True)][:-1] == [
        budgets[cell] for cell in cells[:10]
    ]
    with pytest.raises(PruningError, match="those that all tokens keeps, and prismprune 16 runs: .* reads"):
        batch = base.formatter(SceneImages()).training_batch(samples[:2])
        del batch["pixel_values"]
        base.pruned.prepare(batch, stored=store.batch(samples[:2], cells=[1, 0]))


@pytest.mark.parametrize("choose_with", ["tuned", "original"])
def test_an_elastic_batch_equals_the_one_from_pixels(base, tmp_path, choose_with):
    """Each row in a setting of its own, two steps, so that the second chooses by a projector that has moved."""
    settings = [setting.model_copy(update={"choose_with": choose_with}) for setting in SETTINGS]
    first = settings[1]
    kept = settings if choose_with == "original" else SETTINGS[:2] + SETTINGS[3:4]
    folder = made(tmp_path / "cache", base.with_pruning(first), kept)
    samples = some_samples()
    groups = [samples[:6], [samples[-1], *samples[5:8]], samples[:6]]
    cells = [[0, 1, 2, 3, 4, 5], [2, 2, 4, 1], [0, 1, 2, 3, 4, 5]]
    plain, cached = (unshared(base, first).elastic(settings) for _ in range(2))
    formatter = plain.formatter(SceneImages())
    pixels = [{**formatter.training_batch(group), "cells": own} for group, own in zip(groups, cells, strict=True)]
    expected = two_steps(plain, pixels)
    without_pixels = FeatureFormatter(FeatureStore.open(folder, cached, data(), trains=True), cached)
    batches = []
    for group, own in zip(groups, cells, strict=True):
        batches.append({**without_pixels.training_batch(group, own), "cells": own})
    cached.model.base_model.vision_tower = None
    losses, gradients, kept = two_steps(cached, batches)
    for (keep, counts, notes), (keep2, counts2, notes2) in zip(kept, expected[2], strict=True):
        assert torch.equal(keep, keep2) and counts == counts2 and notes == notes2
    assert kept[0][1]["image"] == [144, 16, 16, 16, 16, 8]
    assert losses == pytest.approx(expected[0], rel=0, abs=1e-6)
    for own, other in zip(gradients, expected[1], strict=True):
        for name in other:
            torch.testing.assert_close(own[name], other[name], rtol=1e-5, atol=1e-6)
    moved = not torch.equal(kept[0][0][2], kept[2][0][2])
    assert moved == (choose_with == "tuned")  # divprune's row


def test_choices_of_the_two_projectors_are_never_mixed(base, tmp_path):
    original = ANEW[0].model_copy(update={"choose_with": "original"})
    arm = base.with_pruning(original)
    folder = made(tmp_path / "cache", arm, [original])
    store = FeatureStore.open(folder, arm, trains=True)
    there = r"holds what divprune 16 \(chosen with the original projector\) keeps"
    with pytest.raises(PrunetuneError, match=there + r", not divprune 16 \(choose_with 'original' there, None here\)"):
        FeatureStore.open(folder, base.with_pruning(ANEW[0]))
    batch = FeatureFormatter(store, arm).training_batch(some_samples()[:2])
    with pytest.raises(PruningError, match="choose_with is 'original' there and None here"):
        base.with_pruning(ANEW[0]).pruned.prepare(batch)
    tuned = made(tmp_path / "tuned", base, [ANEW[0]])
    with pytest.raises(PrunetuneError, match="choose_with None there, 'original' here"):
        FeatureStore.open(tuned, arm)


def test_the_dense_model_reads_all_tokens_whatever_runs(base, cache, tmp_path):
    samples = some_samples()[:3]
    store = FeatureStore.open(cache, base, trains=True)
    dense = base.with_pruning(ALL)
    batch = FeatureFormatter(store, base).training_batch(samples)
    plain = dense.formatter(SceneImages()).training_batch(samples)
    with torch.no_grad():
        logits = dense.pruned.forward(**{**batch, "stored": store.all_tokens(samples)}).logits
        torch.testing.assert_close(logits, dense.pruned.forward(**plain).logits, rtol=1e-5, atol=1e-5)
    assert store.all_tokens(some_samples()[-1:]).lengths == ()
    without = FeatureStore(made(tmp_path / "without", base, [PRISM]))
    with pytest.raises(PrunetuneError, match="does not hold all tokens of its images.* --all-tokens"):
        without.all_tokens(samples)


def test_what_can_not_choose_anew_is_refused_by_name(base, cache, tmp_path):
    crisprune = PruningSpec("crisprune", 16, {"text": "llm"})
    with pytest.raises(PrunetuneError, match="holds .* all tokens keeps, not crisprune 16.* reads cls_attention"):
        FeatureStore.open(cache, base.with_pruning(crisprune), trains=True)
    own = made(tmp_path / "own", base, [ANEW[0]])
    with pytest.raises(PrunetuneError, match="which training changes.* `prunetune cache --all-tokens` stores"):
        FeatureStore.open(own, base.with_pruning(ANEW[0]), trains=True)
    with pytest.raises(PrunetuneError, match="holds .* keeps, not fastervlm 16; make the features for it"):
        FeatureStore.open(cache, base, settings=[ALL, PruningSpec("fastervlm", 16)])
    FeatureStore.open(own, base.with_pruning(ANEW[0]))  # training-free, with the projector it was made with


FAMILIES = {
    "llava": (test_llava.TestLlava, "divprune"),
    "tiles": (test_idefics3.TestIdefics3, "divprune"),
    "tiles, their grid": (test_idefics3.TestIdefics3, "tome"),
    "native resolution": (test_qwen2_5_vl.TestImages, "fps"),
    "crops and row ends": (test_llava_next.TestLlavaNext, "divprune"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_choose_anew_as_from_pixels(name, tmp_path):
    make_suite, method = FAMILIES[name]
    suite = make_suite()
    model = suite.make_model()
    inputs = suite.asked(suite.rows())
    plug, dense = suite.plug(model, method, 3), suite.plug(model, "identity", "100%")
    plain = plug.prepare(inputs)
    rows = plain.rows["image"]
    with torch.inference_mode():
        vision = check_can_be_stored(model, plug.family, plug.encode(inputs))
        choice, _ = choose_before_projector(dense, vision, (), rows, "100%", {})
        images = kept_images(vision, [kept_slots(choice, vision, "identity", "rows", False)])
    entries = []
    # All tiles of a row are one image to the cache, of another size than those of other rows.
    tiles = name.startswith("tiles")
    where = rows if tiles else list(range(len(images)))
    for place in sorted(set(where)):
        own = [image for image, own in zip(images, where, strict=True) if own == place]
        entries.append(Entry(bytes([place]) * 16, (1, 1), bytes(16), joined(own)))
    write_shard(tmp_path / "shard.safetensors", entries, vision.slots[0][0], [False], "", all_tokens=True)
    shard = Shard(tmp_path / "shard.safetensors")
    found = [(shard, number) for number in range(len(entries))]
    stored = stored_images(found, [0] * len(found), [choice_of(dense.spec)], shard)
    without = {key: value for key, value in inputs.items() if key != "pixel_values"}
    if method == "tome":
        with pytest.raises(PruningError, match="since tome "):
            plug.prepare(without, stored=stored)
        return
    if name == "crops and row ends":
        assert not shard.can_choose_anew
        with pytest.raises(PruningError, match="no method can choose anew from these stored images: they are cut"):
            plug.prepare(without, stored=stored)
        return
    cached = plug.prepare(without, stored=stored)
    assert torch.equal(cached.keep, plain.keep) and not plain.keep.all()
    features = [torch.cat(list(own.inputs["mm_encoder_outputs"]["image"].pooler_output)) for own in (cached, plain)]
    torch.testing.assert_close(*features, rtol=1e-6, atol=1e-6)


# ---- the command -----------------------------------------------------------------------------------------------------


def choices_in(folder):
    return [
        (own["choice"]["pruner"], own["choice"]["keep"])
        for own in json.loads((folder / "features.json").read_text())["choices"]
    ]


def test_the_command_stores_every_setting_that_is_drawn(untrained_folder, tmp_path, capsys):
    pruners = [{"pruner": "vispruner"}, {"pruner": "divprune", "weight": 3.0}]
    options = arguments(untrained_folder, tmp_path / "made", "--pruning.pruner", "vispruner")
    options = [*options, "--data.max_samples", "4"]
    for name, more, expected in (
        ("plain", [], [("vispruner", 16)]),
        ("teacher", ["--objective.terms", '{"hidden": 1.0}'], [("vispruner", 16), ("identity", "100%")]),
        ("asked", ["--all-tokens"], [("vispruner", 16), ("identity", "100%")]),
        ("anew", ["--pruning.pruner", "divprune", "--also-keep", "8"], [("identity", "100%")]),
        (
            "elastic",
            ["--elastic.budgets", "[8, 16]", "--elastic.pruners", json.dumps(pruners)],
            [("vispruner", 16), ("identity", "100%"), ("vispruner", 8)],
        ),
    ):
        main(["cache", *options, *more, "--features", str(tmp_path / name)])
        assert choices_in(tmp_path / name) == expected
    assert "divprune choose by the projector's output, so all tokens are stored" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="crisprune chooses by the projector's output.* reads cls_attention"):
        more = ["--pruning.pruner", "crisprune", "--pruning.options", '{"text": "llm"}']
        main(["cache", *options, *more, "--features", str(tmp_path / "refused")])


def test_an_elastic_recalibration_from_features_has_the_losses_of_one_from_pixels(untrained_folder, tmp_path):
    """Two ranks and a token budget, so that lengths of every setting come from the cache."""
    pruners = json.dumps([{"pruner": "prismprune"}, {"pruner": "divprune"}])
    more = ("--pruning.pruner", "prismprune", "--elastic.budgets", "[8, 16]", "--elastic.pruners", pruners)
    features = ("--features", str(tmp_path / "cache"))
    main(["cache", *arguments(untrained_folder, tmp_path / "made", *more), *features])
    runs = []
    for name, own in (("pixels", ()), ("features", features)):
        limits = ("--engine.token_budget", "400", "--train.max_steps", "3")
        runs.append(arguments(untrained_folder, tmp_path / name, *more, *limits, *own))
    run_several(runs)
    assert losses(tmp_path / "features") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5)
