"""Elastic runs: each row in a setting of its own, and nothing else about it is another."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import scene_sample, spec_of
from launches import arguments, losses, run_several
from safetensors.torch import load_file

from prunetune.configs import ConfigError, EngineConfig, ModelConfig, RecalibrateConfig, load_config
from prunetune.configs.schema import ElasticConfig, MixedPruner
from prunetune.data_recipes import Sample, Turn
from prunetune.models import Arm, CheckpointError, wrap_projector, write_adapter
from prunetune.models.adapter import export_merged, projector_state
from prunetune.models.record import read_record
from prunetune.models.stored import base_hashes
from prunetune.pruning import ElasticModel, PrunedModel, PruningError, PruningSpec
from prunetune.train.elastic import Draws, settings_of, told
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.layout import Share, StepSampler
from prunetune.train.sampling import ShuffledSampler

METHODS = ("identity", "divprune", "vispruner", "prismprune", "cdpruner", "visionzip", "prumerge_plus", "random")
MIX = ElasticConfig(
    pruners=[MixedPruner(pruner="divprune", weight=3), MixedPruner(pruner="vispruner")], budgets=[8, 36], dense=0.2
)


def settings():
    return [spec_of(name, "100%" if name == "identity" else 8 * number + 4) for number, name in enumerate(METHODS)]


@pytest.fixture
def batch(reading):
    """A row for each method, and one of text alone in the middle."""
    rows = [scene_sample(10_000_001 + number // 2) for number in range(len(METHODS))]
    rows.insert(3, Sample("t", "text", None, (Turn("what number is shown ?", "red"),)))
    return reading.training_batch(rows)


CELLS = [0, 1, 2, 0, 3, 4, 5, 6, 7]


def elastic(model, processor, specs, home=None):
    home = home or spec_of("divprune", 16)
    return ElasticModel(model, home, specs, processor.tokenizer)


def features_of(pruned):
    """Return the features of all images, one tensor an image."""
    return list(pruned.inputs["mm_encoder_outputs"]["image"].pooler_output)


def test_a_row_keeps_what_it_would_keep_alone_in_its_setting(model, processor, batch):
    specs = settings()
    together = elastic(model, processor, specs).prepare({**batch, "cells": CELLS})
    kept = iter(features_of(together))
    for row, cell in enumerate(CELLS):
        alone = PrunedModel(model, specs[cell], processor.tokenizer).prepare(batch)
        assert torch.equal(together.keep[row], alone.keep[row]), specs[cell].pruner
        if row == 3:
            continue
        own = features_of(alone)[row - (row > 3)]
        torch.testing.assert_close(next(kept), own, rtol=1e-5, atol=1e-5)
    assert together.kept["image"][0] == 144


def test_without_settings_a_batch_is_pruned_as_the_arm_says(model, processor, batch):
    home = spec_of("vispruner", 20)
    plain = PrunedModel(model, home, processor.tokenizer).prepare(batch)
    own = elastic(model, processor, settings(), home).prepare(batch)
    assert torch.equal(own.inputs["input_ids"], plain.inputs["input_ids"])
    assert torch.equal(torch.cat(features_of(own)), torch.cat(features_of(plain)))


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradient_are_the_sum_of_those_of_each_row_alone(untrained_folder, processor, batch, packing):
    from transformers import LlavaForConditionalGeneration

    def loss_of(specs, batch, cells):
        model = LlavaForConditionalGeneration.from_pretrained(untrained_folder, dtype=torch.float64)
        model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
        model.train()
        pruned = elastic(model, processor, specs)
        config = EngineConfig(packing=packing)
        head = head_of(pruned, config, partitioned=False)
        engine = Engine(pruned, config)
        floats = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        with engine.attached(), engine.own_head(head):
            loss = engine.summed_loss(model, {**floats, "cells": cells})
            loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.model.multi_modal_projector.parameters()])

    specs = [
        spec for spec in settings() if spec.pruner != "random"
    ]  # which hashes features, other bits of other batches
    rows = [row for row, cell in enumerate(CELLS) if cell < len(specs)]
    part = rows_of(batch, rows)
    together = loss_of(specs, part, [CELLS[row] for row in rows])
    alone = [loss_of(specs, rows_of(batch, [row]), [CELLS[row]]) for row in rows]
    torch.testing.assert_close(together[0], sum(loss for loss, _ in alone), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(together[1], sum(gradient for _, gradient in alone), rtol=1e-9, atol=1e-9)


def rows_of(batch, rows):
    """Return some rows of a batch of which the fourth has no image."""
    cut = {name: value[rows] for name, value in batch.items() if torch.is_tensor(value) and name != "pixel_values"}
    images = [row - (row > 3) for row in rows if row != 3]
    if images:
        cut["pixel_values"] = batch["pixel_values"][images]
    return {**cut, **{name: [batch[name][row] for row in rows] for name in ("instructions", "sample_ids")}}


def test_settings_differ_in_pruner_and_budget_alone(model, processor):
    with pytest.raises(PruningError, match=r"newline is 'rows' in one and 'all' in another"):
        elastic(model, processor, [spec_of("divprune", 8, newline="all")])


def test_a_model_of_one_setting_refuses_settings(model, processor, batch):
    with pytest.raises(PruningError, match=r"prunes all rows alike; give it to an ElasticModel"):
        PrunedModel(model, spec_of("divprune", 8), processor.tokenizer).prepare({**batch, "cells": CELLS})


def test_what_is_drawn_from():
    found = settings_of(PruningSpec("prismprune", 16, scope="image"), MIX)
    assert [(own.spec.pruner, own.spec.keep) for own in found] == [
        ("identity", "100%"), ("divprune", 8), ("divprune", 36), ("vispruner", 8), ("vispruner", 36)]  # fmt: skip
    assert [own.share for own in found] == pytest.approx([0.2, 0.3, 0.3, 0.1, 0.1])
    assert {own.spec.scope for own in found} == {"image"}
    assert told(found) == "dense 20%, divprune at 8, 36 60%, vispruner at 8, 36 20%"
    (own,) = settings_of(PruningSpec("prismprune", 16), ElasticConfig(budgets=["5%"], dense=0.0))
    assert (own.spec.pruner, own.spec.keep, own.share) == ("prismprune", "5%", 1.0)
    assert settings_of(PruningSpec("prismprune", 16), ElasticConfig()) == []


@pytest.mark.parametrize(
    ("elastic", "error", "words"),
    [
        (ElasticConfig(budgets=[8, 8]), ConfigError, "elastic.budgets names 8 twice"),
        (ElasticConfig(budgets=[8], pruners=[MixedPruner(pruner="fps")] * 2), ConfigError, "elastic.pruners names"),
        (ElasticConfig(budgets=[8], pruners=[MixedPruner(pruner="fsp")]), PruningError, "unknown pruner 'fsp'"),
        (ElasticConfig(budgets=[0]), PruningError, "keep=0"),
        (ElasticConfig(budgets=[8, "50%"], sandwich=True), ConfigError, "write all as numbers, or all as shares"),
        (ElasticConfig(budgets=[8, 16], dense=0.0, sandwich=True), ConfigError, "elastic.dense is 0; raise it"),
    ],
)
def test_settings_that_can_not_be_drawn(elastic, error, words):
    with pytest.raises(error, match=words):
        settings_of(PruningSpec("divprune", 16), elastic)


def test_draws_are_by_seed_epoch_and_update_and_come_as_often_as_they_should():
    found = settings_of(PruningSpec("divprune", 16), MIX)
    draws = Draws(found, MIX, seed=3)
    assert draws.of(0, 5, 16) == Draws(found, MIX, seed=3).of(0, 5, 16)
    others = [draws.of(0, 6, 16), draws.of(1, 5, 16), Draws(found, MIX, seed=4).of(0, 5, 16)]
    assert draws.of(0, 5, 16) not in others
    counts = Counter(cell for update in range(500) for cell in draws.of(0, update, 16))
    for number, setting in enumerate(found):
        assert counts[number] / 8000 == pytest.approx(setting.share, abs=0.02)
    of_updates = Draws(found, MIX.model_copy(update={"draw": "update"}), seed=3)
    assert all(len(set(of_updates.of(0, update, 16))) == 1 for update in range(20))
    assert len({of_updates.of(0, update, 16)[0] for update in range(40)}) == len(found)


def test_a_sandwich_has_its_largest_and_smallest_in_every_update():
    elastic = MIX.model_copy(update={"sandwich": True})
    found = settings_of(PruningSpec("divprune", 16), elastic)
    for update in range(10):
        drawn = Draws(found, elastic, seed=0).of(0, update, 16)
        budgets = Counter(found[cell].spec.keep for cell in drawn)
        assert budgets["100%"] >= 4 and budgets[8] >= 4 and len(drawn) == 16


@pytest.mark.parametrize("budget", [None, 150])
def test_a_sample_has_its_setting_whatever_the_layout(budget):
    found = settings_of(PruningSpec("divprune", 16), MIX)
    lengths = [[20 + (144 if own.dense else own.spec.keep)] * 64 for own in found]
    lengths[0] = [149] * 64
    draws = Draws(found, MIX, seed=0)

    def layouts(ranks):
        share = [Share(rank, ranks, 16 // ranks, 1, budget, padded=False) for rank in range(ranks)]
        return [list(StepSampler(ShuffledSampler(64, 1), own, lengths, draws)) for own in share]

    def cells(layout):
        updates = zip(*layout, strict=True)
        return [{i: c for own in update for b in own if b.counts for i, c in zip(b.indices, b.cells, strict=True)}
                for update in updates]  # fmt: skip

    one, two = layouts(1), layouts(2)
    assert cells(one) == cells(two)
    assert {cell for update in cells(one) for cell in update.values()} == set(range(len(found)))
    if budget is not None:
        for batch in (batch for rank in two for update in rank for batch in update):
            assert sum(lengths[cell][index] for index, cell in zip(batch.indices, batch.cells, strict=True)) <= budget


@pytest.fixture
def config(untrained_folder):
    return ModelConfig(path=str(untrained_folder), dtype="float32")


@pytest.fixture
def adapter(config, untrained_folder, tmp_path):
    arm = Arm.load(config, device="cpu")
    torch.manual_seed(0)
    tensors = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in projector_state(arm.model).items()}
    record = {**base_hashes(untrained_folder, ("multi_modal_projector",)).record(), "trained_in": "float32"}
    write_adapter(tmp_path / "adapter", tensors, wrap_projector(arm.model), record)
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["divprune", "fps", "cdpruner"])
def test_the_original_projector_chooses_where_that_is_asked_for(config, adapter, batch, name):
    def kept(choose_with, adapter):
        arm = Arm.load(config, spec_of(name, 16, choose_with=choose_with), adapter, device="cpu")
        pruned = arm.pruned.prepare(arm.place(batch))
        return pruned.keep, torch.cat(features_of(pruned))

    before = kept("tuned", None)
    own, others = kept("original", adapter), kept("tuned", adapter)
    assert torch.equal(own[0], before[0])
    assert not torch.equal(others[0], before[0])  # or the choice would not depend on the projector
    assert torch.equal(kept("original", None)[1], before[1])
    tuned = Arm.load(config, PruningSpec(), adapter, device="cpu")
    whole = torch.cat(features_of(tuned.pruned.prepare(tuned.place(batch))))
    stays = own[0][batch["input_ids"] == tuned.pruned.family.token_id(tuned.model, "image")]
    torch.testing.assert_close(own[1], whole[stays], rtol=1e-5, atol=1e-5)


def test_training_does_not_move_a_choice_by_the_original_projector(config, batch):
    arm = Arm.load(config, spec_of("divprune", 16, choose_with="original"), device="cpu")
    inputs = arm.place(batch)
    before = arm.pruned.prepare(inputs).keep
    assert arm.pruned.can_project_kept()
    with torch.no_grad():
        for parameter in arm.model.model.multi_modal_projector.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert torch.equal(arm.pruned.prepare(inputs).keep, before)
    assert torch.equal(arm.pruned.prepare(inputs, project_kept=True).keep, before)


def test_where_the_original_projector_is_not_there(model, processor, config, adapter, tmp_path):
    with pytest.raises(PruningError, match=r"needs the base's projector beside the one that runs"):
        PrunedModel(model, spec_of("divprune", 16, choose_with="original"), processor.tokenizer)
    arm = Arm.load(config, PruningSpec(), adapter, device="cpu")
    export_merged(arm.model, arm.processor, tmp_path / "export", read_record(adapter))
    with pytest.raises(CheckpointError, match=r"an export, which holds the tuned projector alone"):
        Arm.load(ModelConfig(path=str(tmp_path / "export"), dtype="float32"),
                 spec_of("divprune", 16, choose_with="original"), device="cpu")  # fmt: skip


def test_a_launched_run_over_settings_goes_on_to_the_same_projector(untrained_folder, tmp_path):
    whole, cut, laid_out = tmp_path / "whole", tmp_path / "cut", tmp_path / "laid_out"
    elastic = ["--elastic.budgets", "[8, 36]", "--elastic.pruners", "[{pruner: divprune}, {pruner: vispruner}]"]
    budget = ["--engine.token_budget", "400"]
    run_several([arguments(untrained_folder, whole, *elastic),
                 arguments(untrained_folder, laid_out, *elastic, *budget)])  # fmt: skip
    shutil.copytree(whole, cut)
    for name in ("adapter", "checkpoint-6", "finished.json"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_several([arguments(untrained_folder, cut, *elastic)])
    assert "resuming from" in again and "dense 25%, divprune at 8, 36 38%, vispruner at 8, 36 38%" in again
    assert losses(cut) == losses(whole)
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    # The layout moves no sample into another setting.
    assert losses(laid_out) == pytest.approx(losses(whole), rel=1e-5)
    record = json.loads((whole / "adapter" / "prunetune.json").read_text())
    assert record["elastic"]["budgets"] == [8, 36] and record["pruning"]["keep"] == 16


@pytest.mark.parametrize("field", ["pruners: [{pruner: fps}]", "dense: 0.5", "sandwich: true"])
def test_a_section_that_draws_nothing_is_an_error(tmp_path, field):
    text = "model: {path: m}\npruning: {pruner: divprune, keep: 16}\ndata: {recipe: r}\noutput: o\n"
    (tmp_path / "c.yaml").write_text(f"{text}elastic: {{{field}}}\n")
    with pytest.raises(ConfigError, match="budgets is empty, and nothing else of elastic would count"):
        load_config(RecalibrateConfig, tmp_path / "c.yaml")


def test_no_pruning_is_no_method_to_draw():
    for mix in (ElasticConfig(budgets=[8]), ElasticConfig(budgets=[8], pruners=[MixedPruner(pruner="identity")])):
        with pytest.raises(ConfigError, match=r"elastic.dense is the share of the samples that do"):
            settings_of(PruningSpec(), mix)


def test_an_update_of_one_sample_can_be_drawn():
    elastic = MIX.model_copy(update={"sandwich": True})
    found = settings_of(PruningSpec("divprune", 16), elastic)
    assert len(Draws(found, elastic, seed=0).of(0, 0, 1)) == 1


def test_who_chooses_otherwise_than_in_training_is_told(config, adapter, capsys):
    Arm.load(config, spec_of("divprune", 16), adapter, device="cpu")
    assert "chose" not in capsys.readouterr().out
    Arm.load(config, spec_of("divprune", 16, choose_with="original"), adapter, device="cpu")
    assert "was trained on tokens that the tuned projector chose, and the original one chooses here" in (
        capsys.readouterr().out
    )
