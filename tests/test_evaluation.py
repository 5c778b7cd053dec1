"""Arms and their comparison: resumable to the same rows, honest intervals, and no table of unlike arms."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunetune.configs import EvaluateConfig, load_config
from prunetune.evaluation.metrics.intervals import bootstrap_interval
from prunetune.evaluation.records import read_manifest, read_results, results_hash, write_manifest, write_results
from prunetune.evaluation.report import plot
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.plot import plot_table
from prunetune.evaluation.report.quoted import beside, read_quoted
from prunetune.evaluation.report.tables.layouts.csv import to_csv
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.run import evaluate as evaluate_module
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError, get_task
from prunetune.models import load_model, wrap_projector, write_adapter
from prunetune.models.seal import sealed
from prunetune.models.stored import base_hashes
from prunetune.pruning import PruningSpec
from prunetune.train.trainer import gathered_projector


@pytest.fixture
def settings(untrained_folder, tmp_path):
    def make(name, *overrides):
        base = ["--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks", "[tiny_world_validation]",
                "--limit", "24", "--batch_size", "8", "--max_new_tokens", "3",
                "--output", str(tmp_path / name)]  # fmt: skip
        return load_config(EvaluateConfig, None, [*base, *overrides])

    return make


DIVPRUNE = ("--pruning.pruner", "divprune", "--pruning.keep", "16")
KEY = "tiny_world_validation/accuracy"


@pytest.fixture
def adapter(untrained_folder, tmp_path):
    model, _ = load_model(str(untrained_folder))
    peft_model = wrap_projector(model)
    tensors = {name: tensor * -1 for name, tensor in gathered_projector(peft_model).items()}
    pruning = PruningSpec(pruner="divprune", keep=16).model_dump()
    record = {**base_hashes(untrained_folder, ("multi_modal_projector",)).record(), "pruning": pruning}
    write_adapter(tmp_path / "adapter", tensors, peft_model, record)
    return str(tmp_path / "adapter")


def test_rows_carry_what_a_reader_needs(settings):
    folder = evaluate(settings("arm", *DIVPRUNE))
    rows = read_results(folder)
    assert [row.id for row in rows] == [item.id for item in get_task("tiny_world_validation").read(Path())[:24]]
    assert {row.kept for row in rows} == {16} and {row.source for row in rows} == {"describe", "ask", "read"}
    assert all(row.score == float(row.prediction.split() == row.answer.split()) for row in rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["kept_tokens"] == {"mean": 16.0, "min": 16, "max": 16}
    assert {"original_projector_hash", "prunetune", "results_hash", "seal"} <= manifest.keys()
    assert {"frozen_hash", "projector", "pruning", "tasks", "batch_size", "model", "versions"} <= manifest.keys()


def test_an_interrupted_arm_goes_on_to_the_same_results(settings, monkeypatch):
    whole = (evaluate(settings("whole", *DIVPRUNE)) / "results.jsonl").read_text()
    real, calls = evaluate_module._rows, []

    def dies_in_the_third_batch(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    config = settings("interrupted", *DIVPRUNE)
    monkeypatch.setattr(evaluate_module, "_rows", dies_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    results = evaluate_module.Path(config.output) / "results.jsonl"
    assert len(results.read_text().splitlines()) == 16
    lines = whole.splitlines(keepends=True)
    results.write_text("".join(lines[:19]) + lines[19][:30])  # killed inside a batch, inside a line
    with pytest.raises(TaskError, match="not finished"):
        compare([config.output])
    assert (evaluate(config) / "results.jsonl").read_text() == whole
    assert len(calls) == 3 + 1


def test_what_the_method_noted_is_in_the_rows_and_its_means_in_the_manifest(settings):
    options = "{erank_avg: 20.0, scale: 0.01, order: pick}"
    arm = ("--pruning.pruner", "adaptive", "--pruning.options", options, "--pruning.keep", "13", "--limit", "11")
    folder = evaluate(settings("arm", *arm, "--batch_size", "5"))
    rows, manifest = read_results(folder), json.loads((folder / "manifest.json").read_text())
    walked = [row.notes["walked"] for row in rows]
    assert len(set(walked[5:10])) > 1  # in one batch, so that a row with another's notes is noticed
    assert [row.notes["ran_dry"] for row in rows] == [float(number < 13) for number in walked]
    means = {"walked": sum(walked) / 11, "ran_dry": sum(number < 13 for number in walked) / 11}
    assert manifest["notes"] == {"tiny_world_validation": pytest.approx(means)} and 0 < means["ran_dry"] < 1
    assert read_manifest(folder).notes == manifest["notes"]
    alone = evaluate(settings("alone", *arm, "--batch_size", "1"))
    assert [row.notes for row in read_results(alone)] == [row.notes for row in rows]

    plain = evaluate(settings("plain", *DIVPRUNE, "--limit", "3"))  # notes nothing: the files are what they were
    assert "notes" not in json.loads((plain / "manifest.json").read_text())
    assert '"notes"' not in (plain / "results.jsonl").read_text()


def test_a_finished_arm_is_not_run_again(settings, monkeypatch):
    config = settings("arm", *DIVPRUNE)
    evaluate(config)
    monkeypatch.setattr(evaluate_module, "_rows", lambda *_: pytest.fail("ran again"))
    evaluate(config)


def test_a_folder_of_another_configuration_is_refused(settings):
    evaluate(settings("arm", *DIVPRUNE))
    with pytest.raises(TaskError, match=r"differs in pruning"):
        evaluate(settings("arm", "--pruning.pruner", "divprune", "--pruning.keep", "17"))


@pytest.fixture
def arms(settings, adapter):
    return {
        "dense": evaluate(settings("dense")),
        "free": evaluate(settings("free", *DIVPRUNE)),
        "tuned": evaluate(settings("tuned", *DIVPRUNE, "--adapter", adapter)),
    }


def rescore(folder, scores):
    """Have the arm say what scores so."""
    rows = []
    for row, score in zip(read_results(folder), scores, strict=True):
        said = {"prediction": row.answer if score else "nothing", "score": float(score)}
        rows.append(row.model_copy(update=said))
    write_results(folder, rows)
    write_manifest(folder, read_manifest(folder).model_copy(update={"results_hash": results_hash(folder)}))


def changed(folder, **fields):
    """Change a manifest's fields, dictionaries by their keys, and seal it anew: as if another arm had been run."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value in fields.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(sealed(manifest)))


def test_compare_computes_what_its_columns_say(arms):
    rng = np.random.default_rng(0)
    scores = {name: rng.random(24) < p for name, p in (("dense", 0.9), ("free", 0.4), ("tuned", 0.7))}
    for name, values in scores.items():
        rescore(arms[name], values)
    made = compare([arms["tuned"], arms["free"], arms["dense"]])
    assert [row.label for row in made.rows] == ["dense", "divprune", "divprune + tuned projector"]
    dense, free, tuned = made.rows
    sources = np.array([row.source for row in read_results(arms["dense"])])
    for row, name in ((dense, "dense"), (free, "free"), (tuned, "tuned")):
        assert row.values[KEY].value == row.pooled.value == pytest.approx(100 * scores[name].mean())
        assert row.relative.value == pytest.approx(100 * scores[name].mean() / scores["dense"].mean())
        for source, value in row.by_type[KEY].items():
            assert value.value == pytest.approx(100 * scores[name][sources == source].mean())
    gain = tuned.gains[KEY]
    assert gain.value == pytest.approx(100 * (scores["tuned"].mean() - scores["free"].mean()))
    assert gain.interval[0] < gain.value < gain.interval[1]
    assert free.gains == {} and dense.kept == 144 and tuned.kept == 16
    table = to_markdown(made).partition("\n\n")[0] + "\n"
    assert table.count("\n") == 5 and f"{gain.value:+.1f}" in table
    parsed = list(csv.DictReader(to_csv(made).splitlines()))
    assert float(parsed[2][f"{KEY} gain"]) == pytest.approx(gain.value, abs=1e-4)


def test_rows_say_how_they_came_about_and_quoted_rows_stay_out_of_computations(arms, tmp_path):
    table = compare([arms["dense"], arms["free"], arms["tuned"]])
    (tmp_path / "q.yaml").write_text(
        f"- {{arm: PrismPrune, kept: 64, values: {{{KEY}: 96.9, gqa/accuracy: 1.5}}, cite: 'supplement, table 5'}}\n"
    )
    quoted = beside(table, read_quoted(tmp_path / "q.yaml"))
    assert quoted.rows == table.rows  # nothing else changes
    lines, plain = to_markdown(quoted).splitlines(), to_markdown(table).splitlines()
    assert lines[:5] == plain[:5] and "PrismPrune (quoted: supplement, table 5) | 64 |" in lines[5]
    assert "| 96.9 |" in lines[5] and "1.5" not in lines[5]
    parsed = list(csv.DictReader(to_csv(quoted).splitlines()))
    manifest = json.loads((arms["tuned"] / "manifest.json").read_text())
    tuned = next(row for row in parsed if "tuned" in row["arm"])
    assert (tuned["items"], tuned["batch_size"], tuned["dtype"], tuned["quoted"]) == ("24", "8", "float32", "")
    assert tuned["projector_hash"] == manifest["projector"]["hash"][:16] != parsed[0]["projector_hash"]
    assert json.loads(tuned["pruning"])["keep"] == 16 and tuned["protocol"] and tuned["prompt"]
    assert parsed[-1]["quoted"] == "supplement, table 5" and parsed[-1][KEY] == "96.9"
    (tmp_path / "q.yaml").write_text("- {arm: x, kept: 1}\n")
    with pytest.raises(TaskError, match="row 1: a quoted row has exactly arm, kept, values and cite"):
        read_quoted(tmp_path / "q.yaml")


def test_the_difficulty_filter_compares_what_downsampling_gets_wrong(arms, settings):
    down = evaluate(settings("down", "--pruning.pruner", "downsample", "--pruning.keep", "16"))
    rng = np.random.default_rng(1)
    scores = {name: (rng.random(24) < p).astype(float) for name, p in (("dense", 0.9), ("free", 0.4), ("tuned", 0.7))}
    for name, values in scores.items():
        rescore(arms[name], values)
    easy = (np.arange(24) % 3 == 0).astype(float)
    rescore(down, easy)
    table = compare([arms["dense"], arms["free"], arms["tuned"]], hard_for=down)
    for row, name in zip(table.rows, ("dense", "free", "tuned"), strict=True):
        assert row.hard["tiny_world_validation"].value == pytest.approx(100 * scores[name][easy == 0].mean())
        assert row.values[KEY].value == pytest.approx(100 * scores[name].mean())
    assert any("16 of 24 items" in note for note in table.footnotes)
    with pytest.raises(TaskError, match="no training-free arm of downsample"):
        compare([arms["dense"]], hard_for=arms["free"])
    rescore(down, np.ones(24))
    with pytest.raises(TaskError, match="so no item is hard"):
        compare([arms["dense"]], hard_for=down)


@pytest.mark.parametrize(("change", "message"), [
    ({"batch_size": 4}, r"differ in batch_size \(8 and 4\)"),
    ({"frozen_hash": "x"}, "differ in frozen_hash"),
    ({"max_new_tokens": 9}, "differ in max_new_tokens"),
    ({"model": {"dtype": "bfloat16"}}, r"differ in model.dtype \('float32' and 'bfloat16'\)"),
    ({"versions": {"torch": "1"}}, "differ in versions.torch"),
])  # fmt: skip
def test_compare_refuses_arms_that_differ_and_names_the_field(arms, change, message):
    changed(arms["tuned"], **change)
    with pytest.raises(TaskError, match=message):
        compare([arms["dense"], arms["free"], arms["tuned"]])


def test_compare_refuses_other_items_and_a_tuned_arm_without_its_twin(arms, settings, adapter):
    other = evaluate(settings("limit", *DIVPRUNE, "--limit", "16"))
    with pytest.raises(TaskError, match=r"tasks.tiny_world_validation.hash|tasks.tiny_world_validation.items"):
        compare([arms["dense"], other])
    tuned = evaluate(settings("tuned9", "--pruning.pruner", "divprune", "--pruning.keep", "9", "--adapter", adapter))
    with pytest.raises(
        TaskError, match=r"no training-free arm with the same pruning: pruning.keep \(16 and 9\) differs"
    ):
        compare([arms["free"], tuned])
    with pytest.raises(TaskError, match="no evaluated arm"):
        compare([arms["free"].parent / "nothing"])


def test_a_projector_tuned_for_another_budget_says_so(arms, settings, adapter):
    other = ("--pruning.pruner", "divprune", "--pruning.keep", "9")
    free, tuned = evaluate(settings("free9", *other)), evaluate(settings("tuned9", *other, "--adapter", adapter))
    assert compare([free, tuned]).rows[1].label == "divprune + tuned projector (for divprune, 16)"


def test_an_edited_template_or_processor_is_a_difference(arms, settings, untrained_folder, tmp_path):
    edited = tmp_path / "edited"
    shutil.copytree(untrained_folder, edited)
    template = edited / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "USER USER"))
    arm = evaluate(settings("of_edited", "--model.path", str(edited)))
    changed(arm, model={"path": str(untrained_folder)})
    with pytest.raises(TaskError, match="differ in settings_hash"):
        compare([arms["free"], arm])


def test_rows_in_another_order_are_refused(arms):
    lines = (arms["free"] / "results.jsonl").read_text().splitlines(keepends=True)
    (arms["free"] / "results.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(TaskError, match="different order"):
        compare([arms["dense"], arms["free"]])


def test_compare_refuses_an_arm_that_lost_rows(arms):
    lines = (arms["free"] / "results.jsonl").read_text().splitlines(keepends=True)
    (arms["free"] / "results.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(TaskError, match="has 23 results, its manifest says 24"):
        compare([arms["dense"], arms["free"]])


def test_the_interval_resamples_whole_pictures():
    """Against a bootstrap written as loops, and wider than one that takes questions for independent."""
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 8)
    values = (rng.random(40)[clusters] > 0.5).astype(float)  # all questions of a picture stand or fall together
    low, high = bootstrap_interval(values, clusters)
    means = []
    for _ in range(4000):
        chosen = rng.integers(0, 40, 40)
        means.append(100 * np.mean([values[clusters == c].mean() for c in chosen]))
    assert low == pytest.approx(np.percentile(means, 2.5), abs=1.5)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=1.5)
    apart = bootstrap_interval(values, np.arange(320))
    assert high - low > 2 * (apart[1] - apart[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        truth = rng.random(100) * 0.6 + 0.2
        values = (rng.random((100, 8)) < truth[:, None]).astype(float).ravel()
        low, high = bootstrap_interval(values, np.repeat(np.arange(100), 8))
        hits += low <= 50 <= high
    assert hits >= 51  # 95 % of 60 is 57; fewer than 51 has probability below 1 %


def test_the_plot_shows_every_arm(arms, tmp_path):
    plot_table(compare(list(arms.values())), tmp_path / "plot.png")
    picture = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_a_name_in_the_plot_is_no_formula(arms, tmp_path):
    table = compare(list(arms.values()))
    rows = [row.model_copy(update={"label": row.label.replace("divprune", "a$_{$ b")}) for row in table.rows]
    assert any("$" in row.label for row in rows)
    plot_table(table.model_copy(update={"rows": rows}), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_plot_names_a_projector_tuned_for_another_budget(arms, settings, adapter, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    other = ("--pruning.pruner", "divprune", "--pruning.keep", "9")
    more = [evaluate(settings("free9", *other)), evaluate(settings("tuned9", *other, "--adapter", adapter))]
    monkeypatch.setattr(plt, "close", lambda _figure: None)
    plot_table(compare([*arms.values(), *more]), tmp_path / "plot.png")
    names = {text.get_text() for text in plt.gcf().axes[0].get_legend().get_texts()}
    tuned = "divprune + tuned projector"
    assert names == {"divprune", tuned, f"{tuned} (for divprune, 16)"}


def test_kinds_of_projectors_have_marks_of_their_own_beside_the_budget():
    kinds = ["", " + tuned projector", " + elastic projector", " + projector tuned without pruning"]
    marks = plot._marks([f"{method}{kind}" for method in ("divprune", "fps") for kind in kinds])
    for kind in kinds:
        assert marks[f"divprune{kind}"] == marks[f"fps{kind}"]
    shapes, _, places = zip(*(marks[f"fps{kind}"] for kind in kinds), strict=True)
    assert len(set(shapes)) == len(set(places)) == 4
    assert shapes[:2] == ("o", "*") and places[0] == 1 and max(places) < 1.2  # far from half or twice the budget


def test_the_figure_of_answers_lights_exactly_the_kept_patches():
    mask = plot._mask(np.arange(72), (12, 12), (84, 84, 3))
    assert mask[:42].all() and not mask[42:].any()
    uneven = plot._mask(np.array([0]), (3, 3), (10, 10, 3))  # sides that are no multiples of the grid's
    assert uneven[:4, :4].all() and uneven.sum() == 16


def test_unknown_tasks_are_answered_with_the_nearest():
    with pytest.raises(TaskError, match="did you mean 'tiny_world'"):
        get_task("tiny_word")


def test_an_adapter_folder_may_move(arms, tmp_path):
    shutil.move(arms["tuned"], tmp_path / "elsewhere")
    assert len(compare([arms["free"], tmp_path / "elsewhere"]).rows) == 2
