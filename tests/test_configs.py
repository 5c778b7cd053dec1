"""Configuration: strict, all errors at once, nearest names, overrides, and shipped files that all load."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from prunetune.configs import ConfigError, EvaluateConfig, RecalibrateConfig, load_config, to_yaml
from prunetune.data_recipes.chat_templates import registered_templates
from prunetune.data_recipes.recipe import read_recipe
from prunetune.evaluation.tasks import get_task
from prunetune.models.blueprint import model_without_weights
from prunetune.pruning import PruningSpec
from prunetune.train.deepspeed_settings import deepspeed_config, deepspeed_file
from prunetune.train.visual import visual_layers

RECALIBRATE = sorted((ROOT / "configs" / "recalibrate").glob("*.yaml"))
EVALUATE = sorted((ROOT / "configs" / "evaluate").glob("*.yaml"))


def write(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


GOOD = "model: {path: m}\npruning: {pruner: divprune, keep: 16}\ndata: {recipe: tiny_world}\noutput: o\n"


@pytest.mark.parametrize("path", RECALIBRATE, ids=lambda p: p.stem)
def test_shipped_recalibrations_load_and_name_real_things(path):
    config = load_config(RecalibrateConfig, path)
    config.pruning.build()
    read_recipe(config.data.recipe)
    assert deepspeed_file(config.train.deepspeed).is_file()
    header = path.read_text().split("model:")[0]
    assert f"--config configs/recalibrate/{path.name}" in header and "Hardware:" in header and "Cost:" in header
    if not path.stem.startswith("tiny"):
        # What trains has 17 to 160 M weights, and every base fits one card with 80 GB in bfloat16.
        assert config.train.deepspeed == "zero1" and config.train.loss == "token_mean"
        engine = config.engine
        assert engine.token_budget is not None and (engine.packing, engine.checkpointing) == ("auto", "auto")
        assert f"prunetune plan --config recalibrate/{path.stem} " in header and "planned, not measured" in header
    if "llava1" in path.name:
        world = 8 * config.train.batch_size * config.train.accumulation
        assert world == 128 and config.train.learning_rate == 2e-5 and config.train.epochs == 1
        budget = path.stem.removesuffix("_quick").rsplit("_", 1)[1]
        if config.pruning.stages:
            (stage,) = config.pruning.stages
            assert (stage.average, config.pruning.pruner) == (int(budget), "identity")
            spec = load_config(EvaluateConfig, ROOT / "configs" / "evaluate" / path.name).pruning
            assert spec == config.pruning
            model = model_without_weights(config.model.path)
            assert visual_layers(model, spec, 576) == [576] * 2 + [166] * 30
        elif budget == "elastic":
            assert config.elastic.on and config.pruning.keep in config.elastic.budgets
        else:
            assert config.pruning.keep == (int(budget) if "llava15" in path.name else int(budget) // 5)


def test_every_published_budget_is_there():
    names = {path.stem for path in RECALIBRATE}
    wanted = {f"llava15_{size}_prismprune_{keep}" for size in ("7b", "13b") for keep in (128, 64, 32)}
    wanted |= {f"llava16_{size}_prismprune_{keep}" for size in ("7b", "13b") for keep in (640, 320, 160)}
    assert wanted <= names


def test_the_quick_configuration_differs_from_the_full_one_in_its_data_alone():
    quick, full = (
        load_config(RecalibrateConfig, f"recalibrate/llava15_7b_prismprune_64{end}") for end in ("_quick", "")
    )
    train = quick.train.model_copy(update={"save_steps": full.train.save_steps})
    recipe = read_recipe(quick.data.recipe)
    assert recipe.max_samples == 20_000 and getattr(recipe, "sources", None) == ["gqa"]
    same = {"data": full.data, "train": train, "output": full.output}
    assert quick.model_copy(update=same) == full and train == full.train


OTHERS = {
    "qwen25_vl_7b": "crisprune",
    "qwen3_vl_8b": "divprune",
    "internvl3_8b": "divprune",
    "llava_onevision_7b": "divprune",
    "llava_next_video_7b": "prismprune",
}


@pytest.mark.parametrize(("model", "pruner"), OTHERS.items())
def test_other_models_have_a_pair_of_files_with_their_budgets_as_overrides(model, pruner):
    """Both arms of a comparison agree in everything that decides numbers, at every budget of the header."""
    stem = f"{model}_{pruner}"
    recalibrate, evaluate = ROOT / "configs/recalibrate" / f"{stem}.yaml", ROOT / "configs/evaluate" / f"{stem}.yaml"
    tuned, free = load_config(RecalibrateConfig, recalibrate), load_config(EvaluateConfig, evaluate)
    assert tuned.model == free.model and tuned.pruning == free.pruning and tuned.pruning.keep == "33.3%"
    assert tuned.pruning.pruner == pruner and tuned.model.template in registered_templates()
    assert 8 * tuned.train.batch_size * tuned.train.accumulation == 128 and tuned.train.learning_rate == 2e-5
    for file, kind in ((recalibrate, RecalibrateConfig), (evaluate, EvaluateConfig)):
        header = file.read_text().split("model:")[0]
        for keep in ("22.2%", "11.1%"):
            override = f'--pruning.keep "{keep}" --output runs/{file.parent.name}/{stem}_{keep[:2]}'
            assert override in header
            config = load_config(kind, file, override.replace('"', "").split())
            assert config.pruning.keep == keep and config.pruning.build()
    assert f"--adapter {tuned.output}/adapter" in evaluate.read_text()


@pytest.mark.parametrize("path", EVALUATE, ids=lambda p: p.stem)
def test_shipped_evaluations_load(path):
    config = load_config(EvaluateConfig, path)
    assert [get_task(name).name for name in config.tasks] == config.tasks


@pytest.mark.parametrize(("model", "frames"), [("qwen25_vl_7b", 16), ("llava_next_video_7b", 8)])
def test_evaluations_on_videos_say_what_they_look_at(model, frames):
    file = ROOT / "configs/evaluate" / f"{model}_vidcom2_video.yaml"
    config = load_config(EvaluateConfig, file)
    assert config.tasks == ["mvbench", "videomme"] and all(get_task(name).video for name in config.tasks)
    assert config.video.frames == frames and config.batch_size == 1
    assert (config.pruning.pruner, config.pruning.keep, config.pruning.video_budget) == ("vidcom2", "25%", "clip")
    header = file.read_text().split("model:")[0]
    assert f"--config configs/evaluate/{file.name}" in header and "Hardware:" in header and "Cost:" in header
    override = f'--pruning.keep "15%" --output runs/evaluate/{file.stem}_15'
    assert override in header and config.output == f"runs/evaluate/{file.stem}_25"
    less = load_config(EvaluateConfig, file, override.replace('"', "").split())
    assert less.pruning.keep == "15%" and less.pruning.build()
    # The template has a place for videos; the model's own is in its files.
    assert config.model.template == "model" or "video" in registered_templates()[config.model.template].read_text()


def test_defaults_are_the_papers(tmp_path):
    train = load_config(RecalibrateConfig, write(tmp_path, GOOD)).train
    assert (train.learning_rate, train.epochs, train.schedule, train.warmup_ratio, train.weight_decay) == (
        2e-5, 1.0, "cosine", 0.03, 0.0)  # fmt: skip


def test_all_errors_are_shown_at_once_with_the_nearest_name(tmp_path):
    path = write(tmp_path, "model: {path: m, dtyp: float32}\npruning: {prunr: divprune}\n"
                           "train: {learning_rate: fast, lerning_rat: 1.0}\noutput: o\n")  # fmt: skip
    with pytest.raises(ConfigError) as error:
        load_config(RecalibrateConfig, path)
    text = str(error.value)
    assert "5 errors" in text
    assert "model.dtyp: unknown key; did you mean 'dtype'?" in text
    assert "pruning.prunr: unknown key; did you mean 'pruner'?" in text
    assert "train.lerning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "train.learning_rate: input should be a valid number, got 'fast'" in text
    assert "data: missing" in text


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n- b\n", "must hold sections and keys, but holds list"),
    ("a: [\n", "not valid YAML"),
    (GOOD + "output: twice\n", "'output' is written twice"),
])  # fmt: skip
def test_files_that_are_no_configuration(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RecalibrateConfig, write(tmp_path, text))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_config(RecalibrateConfig, Path("nowhere.yaml"))


def test_overrides_reach_any_key_and_are_validated(tmp_path):
    path = write(tmp_path, GOOD)
    config = load_config(RecalibrateConfig, path, ["--train.learning_rate", "1e-4", "--pruning.keep=50%",
                                                   "--tracking.wandb", "off", "--train.bf16", "1"][:-2])  # fmt: skip
    assert config.train.learning_rate == 1e-4 and config.pruning.keep == "50%" and config.tracking.wandb == "off"
    with pytest.raises(ConfigError, match="train.learning_rat: unknown key; did you mean 'learning_rate'"):
        load_config(RecalibrateConfig, path, ["--train.learning_rat", "1"])
    with pytest.raises(ConfigError, match="has no value"):
        load_config(RecalibrateConfig, path, ["--output"])
    with pytest.raises(ConfigError, match="unexpected argument 'x'"):
        load_config(RecalibrateConfig, path, ["x"])
    with pytest.raises(ConfigError, match="is no section"):
        load_config(RecalibrateConfig, path, ["--output.a", "x"])


def test_the_effective_configuration_loads_again(tmp_path):
    config = load_config(RecalibrateConfig, write(tmp_path, GOOD), ["--tracking.wandb", "offline"])
    assert load_config(RecalibrateConfig, write(tmp_path, to_yaml(config))) == config
    assert yaml.safe_load(to_yaml(config))["train"]["learning_rate"] == 2e-5


def test_an_unknown_deepspeed_name_is_answered():
    with pytest.raises(ConfigError, match="'zero9' is neither zero1, zero2, zero3"):
        deepspeed_file("zero9")


def test_tasks_must_be_named_once(tmp_path):
    path = write(tmp_path, "model: {path: m}\noutput: o\ntasks: [a, a]\n")
    with pytest.raises(ConfigError, match="each only once"):
        load_config(EvaluateConfig, path)


def test_deepspeed_settings_that_round_features_twice_are_refused(tmp_path):
    """Under them training keeps other tokens than evaluation, see test_launched_selections."""
    for name in ("zero1", "zero2", "zero3"):
        assert deepspeed_config(name)["zero_optimization"]["memory_efficient_linear"] is False
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 3}}')
    assert deepspeed_config(str(own))["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    own.write_text('{"zero_optimization": {"stage": 3, "memory_efficient_linear": true}}')
    with pytest.raises(ConfigError, match="memory_efficient_linear.*other visual tokens than evaluation"):
        deepspeed_config(str(own))
    for broken in ("{", "[1]", '{"zero_optimization": 3}'):
        own.write_text(broken)
        with pytest.raises(ConfigError, match="is no DeepSpeed JSON"):
            deepspeed_config(str(own))


def test_shipped_configurations_are_found_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    overrides = ["--output", "o"]
    by_name = load_config(RecalibrateConfig, "recalibrate/tiny_divprune_16", overrides)
    assert by_name == load_config(RecalibrateConfig, "configs/recalibrate/tiny_divprune_16.yaml", overrides)
    assert by_name == load_config(RecalibrateConfig, ROOT / "configs/recalibrate/tiny_divprune_16.yaml", overrides)
    with pytest.raises(ConfigError, match="did you mean 'recalibrate/tiny_divprune_16'"):
        load_config(RecalibrateConfig, "recalibrate/tiny_divprune_61")


def test_pruning_options_are_written_once():
    """The configuration's section is the specification itself."""
    assert RecalibrateConfig.model_fields["pruning"].annotation is PruningSpec
    spec = PruningSpec("divprune", 16, scope="image")
    assert PruningSpec(**spec.model_dump()) == spec


def test_text_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "arm.yaml"
    file.write_bytes(b"model: {path: \xff\xfe}")
    with pytest.raises(ConfigError, match="arm.yaml is not UTF-8 text"):
        load_config(EvaluateConfig, file)
