"""`prunetune table`: what it is made of, what can't be, what is run again, and where it runs."""

import io
import json
import shutil
import time

import pytest
from conftest import ROOT
from rich.console import Console

from prunetune.configs import ConfigError, TableConfig, load_config
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.pruning import PruningSpec, registered_methods, registry
from prunetune.scripts.tables.cells import lay_out
from prunetune.scripts.tables.check import _of_options, impossible
from prunetune.scripts.tables.cost import plan_text, questions_of, sizes_of
from prunetune.scripts.tables.live import Progress
from prunetune.scripts.tables.make import make_table
from prunetune.scripts.tables.state import is_evaluated, is_trained
from prunetune.train.gpus import gpu_named

RECALIBRATION = "recalibrate/tiny_divprune_16"
ELASTIC = "recalibrate/tiny_elastic"


def table(output, **changes) -> TableConfig:
    values = {
        "models": [{"name": "tiny", "recalibrate": RECALIBRATION}],
        "methods": ["fastervlm", "divprune"],
        "budgets": [16],
        "tasks": ["tiny_world"],
        "limit": 24,
        "batch_size": 8,
        "max_new_tokens": 4,
        "layouts": ["json", "csv"],
        "examples": 0,
        "output": str(output),
        **changes,
    }
    return TableConfig.model_validate(values)


def names(config: TableConfig) -> list[str]:
    return [arm.name for arm in lay_out(config).arms]


def test_arms_are_dense_then_every_method_budget_and_projector(tmp_path):
    config = table(tmp_path, models=[{"name": "tiny", "recalibrate": RECALIBRATION, "elastic": ELASTIC}],
                   budgets=[36, "11.1%"], projectors=["training-free", "tuned", "elastic"],
                   methods=["fastervlm", {"pruner": "divprune", "budgets": [8], "projectors": ["tuned"]}])  # fmt: skip
    assert names(config) == [
        "tiny/dense",
        "tiny/fastervlm_36", "tiny/fastervlm_36_tuned", "tiny/fastervlm_36_elastic",
        "tiny/fastervlm_11.1pct", "tiny/fastervlm_11.1pct_tuned", "tiny/fastervlm_11.1pct_elastic",
        "tiny/divprune_8_tuned",
        "tiny/dense_elastic",
    ]  # fmt: skip
    plan = lay_out(config)
    # One elastic projector for all rows, one tuned one for each.
    assert [training.name for training in plan.trainings] == [
        "tiny/fastervlm_36", "tiny/elastic", "tiny/fastervlm_11.1pct", "tiny/divprune_8"]  # fmt: skip
    tuned = plan.trainings[0].config
    assert (tuned.pruning.pruner, tuned.pruning.keep) == ("fastervlm", 36)
    assert plan.trainings[1].config.pruning.pruner == "divprune"  # its own home setting, not a row's
    (cache,) = {cell.config.features for cell in plan.cells}  # one for all arms
    assert cache.startswith(str(tmp_path / "features" / "tiny" / "tiny_world-"))


FASTV = {"name": "fastv", "boundaries": [1]}


def test_a_method_with_stages_has_a_row_for_each_average(tmp_path):
    methods = ["divprune", {"stages": [FASTV]}, {"stages": [{"name": "vtw", "boundaries": [1]}]},
               {"pruner": "divprune", "pruning": {"keep": 64}, "stages": [FASTV], "budgets": [32]},
               {"pruner": "divprune", "stages": [{**FASTV, "keep": 8}], "name": "two", "budgets": [24]}]  # fmt: skip
    plan = lay_out(table(tmp_path, methods=methods, budgets=[56, 96], projectors=["training-free", "tuned"]))
    assert [arm.name for arm in plan.arms if arm.kind == "training-free"] == [
        "tiny/dense", "tiny/divprune_56", "tiny/divprune_96", "tiny/fastv_56-a-layer", "tiny/fastv_96-a-layer",
        "tiny/vtw", "tiny/divprune+fastv_64-32-a-layer", "tiny/two_24-8"]  # fmt: skip
    specs = {arm.name: arm.spec for arm in plan.arms}
    assert specs["tiny/fastv_56-a-layer"].stages[0].average == 56 and specs["tiny/two_24-8"].keep == 24
    tuned = {training.name: training.config.pruning for training in plan.trainings}
    assert tuned["tiny/fastv_96-a-layer"].stages[0].average == 96 and tuned["tiny/vtw"].stages[0].name == "vtw"
    # The tower's part of them is one: a cache of tables without stages has another name by its other rows alone.
    fewer = lay_out(table(tmp_path, methods=[{"stages": [FASTV]}], budgets=[56]))
    dense = lay_out(table(tmp_path, methods=[{"stages": [{"name": "vtw", "boundaries": [2]}]}]))
    assert {cell.config.features for cell in fewer.cells} == {cell.config.features for cell in dense.cells}


@pytest.mark.parametrize(("method", "message"), [
    ({"stages": [FASTV], "budgets": ["50%"]}, "fastv has stages that are solved for a budget"),
    ({"stages": [FASTV, {"name": "dart"}]}, r"fastv\+dart has 2 stages without keep"),
    ({"stages": [{"name": "fastw"}]}, "unknown stage 'fastw', did you mean 'fastv'"),
    ({"stages": [FASTV], "pruning": {"stages": []}}, "has stages and pruning.stages"),
])  # fmt: skip
def test_budgets_that_are_no_stages_are_told(tmp_path, method, message):
    with pytest.raises(ConfigError, match=message):
        lay_out(table(tmp_path, methods=[method]))


def test_an_average_that_can_not_be_reached_is_told_before_anything_starts(tmp_path):
    config = table(tmp_path, methods=[{"stages": [FASTV]}, {"pruner": "divprune", "pruning": {"keep": 36},
                                                            "stages": [FASTV]}], budgets=[20])  # fmt: skip
    (line,) = impossible(lay_out(config))  # of 36 that enter, 12 a layer can be had, and of 144 no less than 48
    assert "tiny, fastv_20-a-layer: an average of 20" in line and "process 48 already" in line and "\n" not in line
    fine = table(tmp_path, methods=[{"stages": [FASTV]}], budgets=[49, 96], tasks=["tiny_world"])
    plan = lay_out(fine)
    assert impossible(plan) == []
    (sizes,) = sizes_of(plan).values()
    dense, less, more = (sizes.question(arm.spec, 10) for arm in plan.arms)
    assert less < more < dense
    # One layer of three sees all 144, and the others one token.
    head = 2 * sizes.shape.language.head
    whole, text = (sizes.question(PruningSpec(), number) - head for number in (10, -133))
    assert less - head == pytest.approx((whole + 2 * text) / 3)


def test_what_can_not_be_kept_is_read_as_it_is(tmp_path):
    plan = lay_out(table(tmp_path, tasks=["tiny_world", "mmmu", "mvbench"]))
    kept = {cell.task: cell.config.features is not None for cell in plan.cells}
    assert kept == {"tiny_world": True, "mmmu": False, "mvbench": False}


def test_seeds_are_trainings_of_one_row(tmp_path):
    plan = lay_out(table(tmp_path, projectors=["training-free", "tuned"], seeds=[1, 2], methods=["divprune"]))
    assert [arm.name for arm in plan.arms] == [
        "tiny/dense", "tiny/divprune_16", "tiny/divprune_16_tuned_seed1", "tiny/divprune_16_tuned_seed2"]  # fmt: skip
    assert {arm.row for arm in plan.arms[2:]} == {"divprune_16_tuned"}
    assert [training.config.train.seed for training in plan.trainings] == [1, 2]
    assert len({training.config.output for training in plan.trainings}) == 2


def test_all_that_can_not_be_is_told_at_once_and_nothing_is_written(tmp_path):
    config = table(tmp_path / "out", methods=["fastervlm", "crisprune", "nonsense"], budgets=[16, 200],
                   projectors=["training-free", "elastic"], tasks=["tiny_world", "pope"], quoted=["vispruned"],
                   allow=["tasks"])  # fmt: skip
    with pytest.raises(ConfigError) as error:
        make_table(config)
    text = str(error.value)
    assert "asks for 200 visual tokens" in text and "fastervlm_200" in text
    assert "unknown pruner 'nonsense'" in text and "crisprune_16" in text and "text_tower" in text
    assert "benchmark pope: " in text and "no elastic row can be made" in text
    assert "quoted: vispruned is neither a file nor a paper" in text and "allow: tasks may never differ" in text
    assert not (tmp_path / "out").exists()


def test_quoted_rows_of_other_models_are_told_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="quoted: vispruner has no row of a model and a benchmark of this table"):
        make_table(table(tmp_path, quoted=["vispruner"]))


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": ["divprune", "divprune"]}, "two rows of the table are called 'tiny/divprune_16'; give one of the"),
    ({"models": [{"name": "a", "recalibrate": RECALIBRATION}] * 2}, "two models of the table are called 'a'"),
    ({"methods": [{"pruner": "divprune", "pruning": {"newlines": "all"}}]}, "methods: divprune: newlines: Extra"),
    ({"models": [{"recalibrate": RECALIBRATION, "model": {"path": "assets/tiny_vlm"}}]}, "dtype 'bfloat16' and 'fl"),
])  # fmt: skip
def test_a_yaml_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match="^.*" + message.replace("(", r"\(")):
        lay_out(table(tmp_path, **changes))


@pytest.mark.parametrize("text", ["tasks: []", "budgets: [16, 16]", "models: [{name: x}]", "engine: ray"])
def test_the_schema_names_the_key_that_is_wrong(tmp_path, text):
    (tmp_path / "table.yaml").write_text(
        f"models: [{{recalibrate: {RECALIBRATION}}}]\nmethods: [divprune]\nbudgets: [16]\ntasks: [tiny_world]\n"
        f"output: out\n".replace(text.partition(":")[0] + ":", "#")
        + text
        + "\n"
    )
    with pytest.raises(ConfigError, match=text.partition(":")[0]):
        load_config(TableConfig, tmp_path / "table.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tables").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_tables_can_be_laid_out(file):
    plan = lay_out(load_config(TableConfig, file))
    assert plan.impossible == [] and plan.arms[0].row == "dense"
    assert len(plan.cells) == len(plan.arms) * len(plan.config.tasks)
    assert list(_of_options(plan)) == []  # its quoted rows are of its model and benchmarks


def test_the_plan_says_what_is_missing_and_what_it_costs(tmp_path):
    plan = lay_out(table(tmp_path, projectors=["training-free", "tuned"]))
    text = plan_text(plan, questions_of(plan), gpu_named("h200"), 8)
    assert "5 of 5" in text and "tiny_world 24 questions" in text
    assert "to train: tiny/divprune_16: " in text and "predicted on 8 H200: trainings" in text


def test_a_table_under_way_shows_what_is_done_of_every_cell(tmp_path):
    plan = lay_out(table(tmp_path, tasks=["tiny_world", "hard_world"], methods=["fastervlm"]))
    begun = plan.cells[2].folder
    begun.mkdir(parents=True)
    (begun / "results.rank0.jsonl").write_text("{}\n" * 6)
    progress = Progress(plan, {"tiny_world": 24, "hard_world": 30}, began=time.monotonic() - 10)
    progress.done["tiny/dense/tiny_world"] = "100.0"
    progress.failed["tiny/fastervlm_16/hard_world"] = "out of memory"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(progress)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["dense", "100.0", "·"] in lines and ["fastervlm_16", "25", "%", "failed"] in lines
    # 24 and 6 of 24 + 30 + 24 answers in 10 seconds.
    assert progress.line().startswith("1 of 4 cells, 1 failed, 30 of 78 answers, 3.0 a second, about 16 s left")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table with two trainings, made once."""
    output = tmp_path_factory.mktemp("table") / "out"
    config = table(output, projectors=["training-free", "tuned"], hard=16,
                   training={"train.max_steps": 2, "train.save_steps": 2, "train.batch_size": 8})  # fmt: skip
    ended = make_table(config)
    assert ended.failed == {} and ended.status == 0
    return config


def test_cells_are_what_separate_evaluations_give(made, tmp_path):
    """From pixels, each with a model of its own: the same results to the byte."""
    for cell in lay_out(made).cells:
        if cell.arm.row not in ("dense", "divprune_16_tuned", "fastervlm_16"):
            continue
        alone = evaluate(cell.config.model_copy(update={"features": None, "output": str(tmp_path / cell.arm.row)}))
        assert (alone / "results.jsonl").read_bytes() == (cell.folder / "results.jsonl").read_bytes()


def test_a_finished_table_is_not_made_again(made):
    plan = lay_out(made)
    assert all(is_evaluated(cell) for cell in plan.cells) and all(is_trained(one) for one in plan.trainings)
    before = {cell.name: (cell.folder / "results.jsonl").stat().st_mtime_ns for cell in plan.cells}
    assert make_table(made).failed == {}
    assert before == {cell.name: (cell.folder / "results.jsonl").stat().st_mtime_ns for cell in plan.cells}


def test_what_a_kill_left_goes_on_to_the_same_bytes(made, tmp_path):
    copy = made.model_copy(update={"output": str(tmp_path / "copy")})
    shutil.copytree(made.output, copy.output)
    for file in (tmp_path / "copy").rglob("config.yaml"):  # a table knows its folders by their paths
        file.write_text(file.read_text().replace(made.output, copy.output))
    whole = {cell.name: (cell.folder / "results.jsonl").read_bytes() for cell in lay_out(made).cells}
    cell = next(cell for cell in lay_out(made).cells if cell.arm.row == "divprune_16")
    results = tmp_path / "copy" / "arms" / cell.name / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:11]) + b'{"task": "ti')
    manifest = results.parent / "manifest.json"
    unfinished = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(unfinished)[:-3])  # torn as well
    manifest.unlink()
    plan = lay_out(copy)
    begun = [one.name for one in plan.cells if not is_evaluated(one)]
    assert "tiny/divprune_16/tiny_world" in begun
    make_table(copy)
    assert whole == {one.name: (one.folder / "results.jsonl").read_bytes() for one in plan.cells}


def test_a_table_grows_by_what_is_added(tmp_path):
    """A budget and a benchmark more: what was there stays as it is, from another cache, and stands in one table."""
    config = table(tmp_path / "out", methods=["fastervlm"], limit=8)
    assert make_table(config).failed == {}
    before = {cell.folder: (cell.folder / "results.jsonl").stat().st_mtime_ns for cell in lay_out(config).cells}
    more = config.model_copy(update={"budgets": [16, 36], "tasks": ["tiny_world", "tiny_world_validation"]})
    assert make_table(more).failed == {}
    assert before == {folder: (folder / "results.jsonl").stat().st_mtime_ns for folder in before}
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [column["task"] for column in found["columns"]] == ["tiny_world", "tiny_world_validation"]
    assert {row["kept"] for row in found["rows"]} == {144, 36, 16}


def test_results_of_other_settings_are_named_and_made_anew_when_asked(tmp_path):
    config = table(tmp_path / "out", methods=["fastervlm"], features=False, limit=8)
    assert make_table(config).failed == {}
    other = config.model_copy(update={"limit": 16})
    with pytest.raises(ConfigError, match=r"holds 2 cells of other settings, .*first tiny/dense/tiny_world.*--remake"):
        make_table(other)
    assert all(is_evaluated(cell) for cell in lay_out(config).cells)
    assert make_table(other.model_copy(update={"remake": True})).failed == {}
    assert all(is_evaluated(cell) for cell in lay_out(other).cells)


def test_a_training_of_other_settings_or_an_edited_adapter_is_named(made):
    other = made.model_copy(update={"training": {**made.training, "train.max_steps": 3}})
    with pytest.raises(ConfigError, match="holds 2 trainings of other settings, or changed since .first tiny/fastervl"):
        make_table(other)
    file = lay_out(made).trainings[0].adapter / "adapter_model.safetensors"
    stored = file.read_bytes()
    try:
        file.write_bytes(stored[:-4] + bytes(4))
        with pytest.raises(ConfigError, match="holds 1 trainings of other settings, or changed since"):
            make_table(made)
    finally:
        file.write_bytes(stored)


def test_an_edited_cell_is_not_taken_for_finished(made, tmp_path):
    cell = lay_out(made).cells[0]
    text = (cell.folder / "results.jsonl").read_text()
    try:
        (cell.folder / "results.jsonl").write_text(text.replace('"score": 1.0', '"score": 0.0', 1))
        assert not is_evaluated(cell)
    finally:
        (cell.folder / "results.jsonl").write_text(text)
    assert is_evaluated(cell)


BROKEN = """
from prunetune.pruning.methods.fastervlm import FasterVLM
from prunetune.pruning.registry import register_pruner

@register_pruner("broken", paper="none")
class Broken(FasterVLM):
    def __call__(self, tokens, keep):
        raise ValueError("no such thing")
"""


@pytest.fixture
def _registry(monkeypatch):
    """What a test registers goes with it."""
    registered_methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_an_arm_that_fails_does_not_stop_the_others_and_is_told(tmp_path, _registry, capsys):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    config = table(tmp_path / "out", methods=["broken", "fastervlm"], features=False, limit=8, plugins=[str(plugin)])
    ended = make_table(config)
    assert list(ended.failed) == ["tiny/broken_16/tiny_world"]
    assert "ValueError: no such thing" in ended.failed["tiny/broken_16/tiny_world"]
    assert (tmp_path / "out" / "failures" / "cell-tiny-broken_16-tiny_world.txt").is_file()
    written = (tmp_path / "out" / "table.csv").read_text()
    assert "fastervlm" in written and "broken" not in written.replace("broken_16 failed", "")


def test_an_unfinished_training_fails_its_own_rows_alone(tmp_path, monkeypatch):
    from prunetune.scripts.tables import train

    config = table(tmp_path / "out", projectors=["training-free", "tuned"])
    plan = lay_out(config)
    launches = []

    def launch(devices, runs, folder, grace):
        launches.append([run[run.index("--output") + 1] for run in runs])
        return 1

    monkeypatch.setattr(train, "launch_several", launch)

    class Folder:
        path = tmp_path

    failed, status = train.train_missing(config, plan.trainings, Folder())
    # The first ends the launch, the next one goes on with the others.
    assert status == 0 and set(failed) == {"tiny/fastervlm_16", "tiny/divprune_16"}
    assert [len(launch) for launch in launches] == [2, 1]
    assert "status 1" in failed["tiny/divprune_16"]
