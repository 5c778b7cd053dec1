"""Recalibration through stages inside the LLM: launched under ZeRO-2 and ZeRO-3, over settings, and gone on with."""

import json
import shutil

import pytest
import torch
from conftest import TINY_VLM
from launches import arguments, losses, run_several
from safetensors.torch import load_file

from prunetune.configs import ConfigError
from prunetune.configs.schema import ElasticConfig, MixedPruner
from prunetune.models.card import adapter_card
from prunetune.models.record import warning
from prunetune.pruning import PruningSpec
from prunetune.pruning.spec import StageSpec
from prunetune.train.elastic import Draws, settings_of, told
from prunetune.train.flops import layered, sequence, sequences
from prunetune.train.measured import Inside, inside_of_log

FASTV = StageSpec(name="fastv", boundaries=[1], average=56)
STAGES = ["--pruning.pruner", "identity", "--pruning.keep", "100%",
          "--pruning.stages", json.dumps([FASTV.model_dump(exclude_defaults=True)])]  # fmt: skip


def record_of(output):
    return json.loads((output / "adapter" / "prunetune.json").read_text())


def weights_of(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One launch: ZeRO-2, ZeRO-3, and a run over averages that is cut off at its middle."""
    folder = tmp_path_factory.mktemp("stages")
    elastic = ["--elastic.averages", "[52, 96]", "--train.deepspeed", "zero2"]
    runs = {"zero2": ["--train.deepspeed", "zero2"], "zero3": ["--train.deepspeed", "zero3"], "elastic": elastic}
    run_several([arguments(TINY_VLM, folder / name, *STAGES, *more) for name, more in runs.items()])
    shutil.copytree(folder / "elastic", folder / "cut")
    for name in ("adapter", "checkpoint-6", "finished.json"):
        path = folder / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    printed = run_several([arguments(TINY_VLM, folder / "cut", *STAGES, *elastic)])
    assert "resuming from" in printed and "elastic   dense 25%, fastv at 52 a layer, 96 a layer 75%" in printed
    assert "pruning   fastv (boundaries=[1]), 56 a layer" in printed
    return folder


def test_zero3_trains_what_zero2_trains(trained):
    assert losses(trained / "zero3") == pytest.approx(losses(trained / "zero2"), rel=1e-4)
    whole = weights_of(trained / "zero2")
    for name, tensor in weights_of(trained / "zero3").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)


def test_what_layers_saw_is_in_log_record_card_and_warning(trained):
    # 56 a layer of 144 and three layers: the first sees all, so two see (3 x 56 - 144) / 2 = 12.
    record = record_of(trained / "zero2")
    assert record["llm_tokens"] == {
        "samples": 24, "entering": 144.0, "final": 12.0, "average": 56.0, "layers": [144.0, 12.0, 12.0]
    }  # fmt: skip
    first = json.loads((trained / "zero2" / "log.jsonl").read_text().splitlines()[0])
    assert first["kept_mean"] == 144 and first["llm_average_tokens"] == 56 and first["llm_layers"] == [576, 48, 48]
    text = adapter_card(record)
    assert "tuned for fastv (boundaries=[1]), 56 a layer" in text and "by layer 144, 12, 12" in text
    assert "are no part of any file here" in text and "144.0 entered the LLM, 56.0 a layer, 12.0 in the last" in text
    assert "stages inside the LLM run here alone" in warning(record)


def test_a_run_over_averages_goes_on_to_the_same_projector(trained):
    assert losses(trained / "cut") == losses(trained / "elastic")
    first, again = weights_of(trained / "elastic"), weights_of(trained / "cut")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    record, other = record_of(trained / "elastic"), record_of(trained / "cut")
    assert record["llm_tokens"] == other["llm_tokens"]
    # Between those of the settings: 52, 96 and all 144.
    assert 52 < record["llm_tokens"]["average"] < 144 and record["elastic"]["averages"] == [52, 96]
    assert "one projector for `fastv` at 52 a layer, 96 a layer" in adapter_card(record)


def test_averages_are_drawn_beside_budgets():
    spec = PruningSpec("divprune", 64, stages=[FASTV])
    found = settings_of(spec, ElasticConfig(budgets=[16, 64], averages=[16, 32], dense=0.2))
    assert [(one.spec.method, one.spec.budget, one.share) for one in found] == [
        ("dense", "", 0.2),
        ("divprune+fastv", "16, 16 a layer", 0.2), ("divprune+fastv", "16, 32 a layer", 0.2),
        ("divprune+fastv", "64, 16 a layer", 0.2), ("divprune+fastv", "64, 32 a layer", 0.2),
    ]  # fmt: skip
    assert told(found).startswith("dense 20%, divprune+fastv at 16, 16 a layer")
    alone = settings_of(PruningSpec(stages=[FASTV]), ElasticConfig(averages=[52, 96], dense=0.5))
    assert [(one.spec.method, one.share) for one in alone] == [("dense", 0.5), ("fastv", 0.25), ("fastv", 0.25)]
    sandwich = ElasticConfig(averages=[96, 52], sandwich=True)
    drawn = Draws(settings_of(PruningSpec(stages=[FASTV]), sandwich), sandwich, 0).of(0, 0, 8)
    assert drawn.count(0) >= 2 and drawn.count(2) >= 2  # dense, and the smallest


@pytest.mark.parametrize(("spec", "elastic", "message"), [
    (PruningSpec(), ElasticConfig(averages=[8]), "pruning.stages has 0 such"),
    (PruningSpec(stages=[StageSpec(name="fastv", keep=4)]), ElasticConfig(averages=[8]), "has 0 such"),
    (PruningSpec(stages=[FASTV]), ElasticConfig(averages=[8, 8]), "elastic.averages names 8 twice"),
    (PruningSpec(stages=[FASTV]), ElasticConfig(budgets=[8]), "identity keeps all tokens at any budget"),
    (PruningSpec(stages=[FASTV]), ElasticConfig(budgets=[8], pruners=[MixedPruner(pruner="identity")]), "identity"),
])  # fmt: skip
def test_averages_that_are_of_no_stage_are_told(spec, elastic, message):
    with pytest.raises(ConfigError, match=message) as refused:
        settings_of(spec, elastic)
    assert "\n" not in str(refused.value)


def test_work_of_layers_is_that_of_their_mean():
    assert layered([[10, 7]] * 3) == sequences([10, 7])
    mixed = layered([[10], [4]])
    assert (mixed.tokens, mixed.pairs) == (7, (sequence(10).pairs + sequence(4).pairs) / 2)


def test_counts_of_a_log_add_up(tmp_path):
    assert inside_of_log(tmp_path / "log.jsonl") is None
    rows = [Inside.of([(8, 2), (8, 4)]), Inside.of([]), Inside.of([(4, 4)])]
    lines = [json.dumps({"step": number, **row.row()}) for number, row in enumerate(rows)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    found = inside_of_log(tmp_path / "log.jsonl")
    assert found["layers"] == [round(20 / 3, 4), round(10 / 3, 4)] and found["average"] == 5 and found["samples"] == 3
