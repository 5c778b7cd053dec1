"""Stages inside the LLM in what is written down: rows, manifests, comparisons, seals, caches, labels, likelihoods."""

import json

import pytest
import torch
from conftest import TINY_VLM
from stage_world import llava_batch, masked_run, plan_for, staged, tiny_llava
from test_dial import tuned

from prunetune.cli import main
from prunetune.configs import EvaluateConfig, load_config
from prunetune.evaluation.records import read_manifest, read_results
from prunetune.evaluation.report.arms import read_arm
from prunetune.evaluation.report.comparable import twin_of
from prunetune.evaluation.report.comparison import read_table
from prunetune.evaluation.report.tables.layouts.csv import to_csv
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.run.bridge import Bridge, Question
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError, get_task
from prunetune.models.record import told_pruning
from prunetune.pruning import PruningSpec
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stored import choice_of
from prunetune.scripts.verify import verify

FASTV = {"name": "fastv", "boundaries": [1]}
DIVPRUNE = ["--pruning.pruner", "divprune", "--pruning.keep", "64"]


def inside(**more):
    return ["--pruning.stages", json.dumps([{**FASTV, **more}])]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")

    def make(name, *more):
        base = ["--model.path", str(TINY_VLM), "--model.dtype", "float32", "--tasks", "[tiny_world]", "--limit", "12",
                "--batch_size", "6", "--max_new_tokens", "3", "--output", str(folder / name)]  # fmt: skip
        return load_config(EvaluateConfig, None, [*base, *more])

    return make


@pytest.fixture(scope="module")
def arms(settings, tmp_path_factory):
    adapter = tuned(TINY_VLM, tmp_path_factory.mktemp("tuned"), pruner="divprune", keep=64)
    asked = {
        "dense": [],
        "divprune": DIVPRUNE,
        "both": [*DIVPRUNE, *inside(average=32)],
        "both, more": [*DIVPRUNE, *inside(average=40)],
        "fastv": inside(average=56),
        "tuned": [*DIVPRUNE, *inside(average=32), "--adapter", str(adapter)],
    }
    return {name: evaluate(settings(name.replace(", ", "_"), *more), bar=False) for name, more in asked.items()}


def test_rows_and_manifest_say_what_each_layer_saw(arms):
    # 64 enter, three layers, 32 each on average: (3 x 32 - 64) / 2 = 16 behind the first.
    rows, manifest = read_results(arms["both"]), read_manifest(arms["both"])
    assert all(row.layers == [64, 16, 16] and row.kept == 64 for row in rows)
    assert all(row.notes["llm_average_tokens"] == 32 and row.notes["llm_final_tokens"] == 16 for row in rows)
    assert manifest.llm_tokens.model_dump() == {"final": 16.0, "average": 32.0, "layers": [64.0, 16.0, 16.0]}
    assert manifest.pruning.stages[0].average == 32 and "stages" in json.dumps(manifest.settings())
    for name in ("dense", "divprune"):
        text = (arms[name] / "manifest.json").read_text() + (arms[name] / "results.jsonl").read_text()
        assert "layers" not in text and "llm_tokens" not in text and "stages" not in text


def test_a_finished_arm_goes_on_as_itself_and_never_as_another_budget(arms, settings):
    before = (arms["both"] / "results.jsonl").read_bytes()
    assert evaluate(settings("both", *DIVPRUNE, *inside(average=32)), bar=False) == arms["both"]
    assert (arms["both"] / "results.jsonl").read_bytes() == before
    for other in ([], inside(average=40), ["--pruning.stages", "[{name: fastv, boundaries: [2], average: 64}]"]):
        with pytest.raises(TaskError, match="pruning"):
            evaluate(settings("both", *DIVPRUNE, *other), bar=False)


def test_a_comparison_has_a_column_of_tokens_per_layer_and_seals_hold(arms, tmp_path):
    main(["compare", *map(str, arms.values()), "--output", str(tmp_path / "all")])
    table = read_table(tmp_path / "all")
    rows = {row.label: row for row in table.rows}
    assert {name: (row.kept, row.per_layer, row.method) for name, row in rows.items() if "tuned" not in name} == {
        "dense": (144, None, "dense"),
        "divprune": (64, None, "divprune"),
        "divprune then fastv (boundaries=[1])": (64, pytest.approx(32, abs=8.1), "divprune+fastv"),
        "fastv (boundaries=[1])": (144, 56, "fastv"),
    }
    # By what the LLM pays for, the most first, and a tuned row below its twin.
    assert [row.tokens for row in table.rows] == [144, 64, 56, 40, 32, 32]
    assert table.rows[-1].twin == table.rows[-2].id and table.rows[-1].projector == "other"
    assert "(for divprune, 64)" in table.rows[-1].label
    header, _, *lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert header.startswith("| arm | visual tokens | tokens per layer |")
    assert "| 144 | 56.0 |" in lines[2]
    assert "per_layer" in to_csv(table).splitlines()[0]
    assert all(check.holds is not False for check in verify(tmp_path / "all"))
    assert all(check.holds is not False for check in verify(arms["tuned"]))
    main(["compare", str(arms["dense"]), str(arms["divprune"]), "--output", str(tmp_path / "without")])
    plain = to_markdown(read_table(tmp_path / "without")) + to_csv(read_table(tmp_path / "without"))
    assert "per layer" not in plain and "per_layer" not in plain


def test_a_twin_has_the_same_stages_with_the_same_budgets(arms):
    read = {name: read_arm(folder) for name, folder in arms.items()}
    others = [read[name] for name in ("dense", "divprune", "both, more")]
    assert twin_of(read["tuned"], [*others, read["both"]]) is read["both"]
    assert twin_of(read["tuned"], others) is None
    with pytest.raises(SystemExit):
        main(["compare", str(arms["tuned"]), str(arms["both, more"]), "--output", str(arms["tuned"].parent / "none")])


def test_a_feature_cache_without_stages_serves_them(arms, settings, tmp_path):
    evaluating = ["--model.path", str(TINY_VLM), "--model.dtype", "float32", "--tasks", "[tiny_world]", "--limit", "12",
                  *DIVPRUNE]  # fmt: skip
    cache = tmp_path / "cache"
    (tmp_path / "c.yaml").write_text("tasks: [tiny_world]\nmodel: {path: none}\noutput: none\n")
    main(["cache", "--config", str(tmp_path / "c.yaml"), *evaluating, "--features", str(cache)])
    folder = evaluate(settings("cached", *DIVPRUNE, *inside(average=32), "--features", str(cache)), bar=False)
    assert (folder / "results.jsonl").read_bytes() == (arms["both"] / "results.jsonl").read_bytes()
    with_stages = PruningSpec("divprune", 64, stages=[StageSpec(**FASTV, average=32)])
    assert choice_of(with_stages) == choice_of(PruningSpec("divprune", 64))


@torch.no_grad()
def test_prepared_batches_run_through_stages_and_labels_say_who_is_asked():
    model = tiny_llava()
    pruned = staged(model, {**FASTV, "keep": 3})
    batch = llava_batch([(1, 9, 1), (1, 4, 2)], labels=True)
    plan, _ = plan_for(pruned, batch)
    prepared = pruned.prepare(batch)
    without = {name: value for name, value in prepared.inputs.items() if name != "labels"}
    found = pruned.run(prepared, without).logits
    assert pruned.run(prepared).loss is not None and not model._forward_pre_hooks
    stock = {name: value for name, value in batch.items() if name != "labels"}
    real = plan.real & (~plan.visual | plan.kept_columns())
    torch.testing.assert_close(found[real], masked_run(model, stock, plan).logits[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[real], model(**stock).logits[real], atol=1e-3)
    # Without labels at all the last column is asked, which is part of the answer here.
    other, _ = plan_for(pruned, stock)
    assert not torch.equal(other.queries, plan.queries)


@pytest.mark.parametrize(("spec", "method", "budget", "told"), [
    (PruningSpec(), "dense", "", "identity, 100%"),
    (PruningSpec("divprune", 64), "divprune", "64", "divprune, 64"),
    (PruningSpec(stages=[StageSpec(name="fastv", average=56)]), "fastv", "56 a layer", "fastv, 56 a layer"),
    (PruningSpec("divprune", "50%", stages=[StageSpec(name="fastv", keep=["50%"]), StageSpec(name="vtw")]),
     "divprune+fastv+vtw", "50%, 50%", "divprune, 50%, then fastv, 50%, then vtw"),
])  # fmt: skip
def test_what_a_pruning_is_called(spec, method, budget, told):
    assert (spec.method, spec.budget, told_pruning(spec.model_dump())) == (method, budget, told)
    assert spec.dense == (method == "dense")


def test_stages_of_another_version_are_told_by_their_name():
    assert told_pruning({"pruner": "identity", "stages": [{"name": "late", "depth": 3}, None]}) == "late, then ?"


def test_bridges_score_answers_through_stages(settings):
    """What is answered greedily is likeliest by the same scores, whose stages ask the same token."""
    questions = get_task("tiny_world").open(None)
    images = questions.open_images()
    items = questions.items[:8]
    asked = [Question(item.id, "x", item.question, (images.open(item.image, item.id),)) for item in items]
    bridge = Bridge(settings("bridge", *DIVPRUNE, *inside(average=24)), "cpu")
    answers = bridge.answers(asked, [4] * len(asked))
    found = bridge.likelihoods(asked, answers)
    assert all(likeliest for _, likeliest in found)
    dense = Bridge(settings("bridge"), "cpu").likelihoods(asked, answers)
    assert not all(likeliest for _, likeliest in dense)  # of which some are other answers than these few tokens give
