"""Plug-ins: by file, module, entry point and reference; what goes wrong with one is told in a line that names it."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_VLM
from launches import FEW, call, environment
from PIL import Image

from prunetune import plugins
from prunetune.cli import main
from prunetune.configs import EvaluateConfig, load_config
from prunetune.data_recipes import DataError, chat_templates, formats
from prunetune.data_recipes.chat_templates import register_template, template_file
from prunetune.evaluation.tasks import TaskError, base, get_task
from prunetune.models.ranks import Ranks
from prunetune.models.seal import sealed
from prunetune.plugins import PluginError, load_plugins, plugin_records
from prunetune.pruning import PruningError, build_pruner, registered_methods, registered_stages, registry
from prunetune.pruning.stages import registry as stages
from prunetune.train import recalibrate

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """What a test registers goes with it."""
    registered_methods(), registered_stages(), formats.registered_formats(), base.tasks()
    for module, name in ((registry, "_METHODS"), (stages, "_STAGES"), (formats, "_FORMATS"),
                         (chat_templates, "_TEMPLATES"), (base, "_TASKS"), (plugins, "_LOADED")):  # fmt: skip
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith(("my_pruning", "prunetune_plugin_", "mine")):
            del sys.modules[name]


@pytest.fixture
def examples(tmp_path):
    """The examples of the documentation, somewhere else."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    return tmp_path / "examples"


def test_a_file_beside_the_yaml_is_loaded_with_the_configuration(examples, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from prunetune.configs import RecalibrateConfig

    config = load_config(RecalibrateConfig, examples / "recalibrate_norm.yaml")
    assert config.plugins == [str(examples / "my_pruning" / "norm.py")]
    assert config.pruning.build().power == 1.0
    digest = hashlib.sha256((examples / "my_pruning" / "norm.py").read_bytes()).hexdigest()
    assert plugin_records() == [{"name": "norm.py", "version": None, "sha256": digest}]
    load_config(RecalibrateConfig, examples / "recalibrate_norm.yaml")  # again: it is loaded already
    assert len(plugin_records()) == 1


def test_a_relative_file_on_the_command_line_is_looked_for_in_the_working_directory(examples, monkeypatch):
    monkeypatch.chdir(examples)
    overrides = ["--plugins", "[my_pruning/norm.py]", "--pruning.pruner", "norm", "--pruning.keep", "16"]
    assert load_config(EvaluateConfig, "evaluate/tiny_dense", overrides).pruning.build()


def test_a_module_and_a_class_by_reference(examples, monkeypatch):
    monkeypatch.syspath_prepend(examples)
    assert build_pruner("my_pruning.norm:Norm", {"power": 3.0}).power == 3.0
    load_plugins(["my_pruning.norm"])
    assert "norm" in registered_methods() and [plugin["name"] for plugin in plugin_records()] == ["my_pruning.norm"]
    with pytest.raises(PruningError, match="'my_pruning.norm:Norm' has no option 'powr', did you mean 'power'"):
        build_pruner("my_pruning.norm:Norm", {"powr": 3.0})


def test_a_class_needs_no_registration(tmp_path, monkeypatch):
    source = (EXAMPLES / "my_pruning" / "norm.py").read_text()
    (tmp_path / "mine.py").write_text(source.replace('@register_pruner("norm", paper="none, an example")\n', ""))
    monkeypatch.syspath_prepend(tmp_path)
    assert build_pruner("mine:Norm")
    assert "norm" not in registered_methods()


def test_an_installed_package_is_found_by_its_entry_points(examples):
    """In a process of its own, as after ``pip install``."""
    site = examples.parent / "site"
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*line, str(site), str(examples)], check=True, capture_output=True)
    code = """
import sys
from prunetune.cli import main
main(["list", "pruners"])
main(["list", "plugins"])
"""
    paths = {**environment(), "PYTHONPATH": f"{site}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, cwd=site)
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.splitlines()]
    assert ["norm", "none,", "an", "example"] in [line[:4] for line in printed]
    assert {("norm", "1.0"), ("vip_llava", "1.0")} <= {tuple(line[:2]) for line in printed}


STAGE = '''
from dataclasses import dataclass

from prunetune.pruning import Stage, register_stage
from prunetune.pruning.stages.base import Choice, best, heard


@register_stage("small_keys", paper="none, an example")
@dataclass(frozen=True)
class SmallKeys(Stage):
    """Keep the tokens with the smallest keys."""

    power: float = 2.0

    boundaries = (1,)
    keeps = (0.5,)
    hears = frozenset({"keys"})

    def choose(self, at, keep):
        return Choice(best(-heard(at.keys, "keys").norm(p=self.power, dim=-1), at.visual, keep))
'''


def test_a_stage_of_a_plugin_is_listed_and_runs_by_its_name(tmp_path, monkeypatch, capsys):
    from stage_world import LAYERS, llava_batch, plan_for, staged, tiny_llava

    (tmp_path / "mine.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    main(["list", "stages", "--plugins", "mine.py"])
    assert ["small_keys", "none,", "an", "example", "1", "0.5", "keys"] in [
        line.split()[:7] for line in capsys.readouterr().out.splitlines()
    ]
    assert [plugin["name"] for plugin in plugin_records()] == ["mine.py"]
    plan, _ = plan_for(
        staged(tiny_llava(), {"name": "small_keys", "options": {"power": 1.0}}), llava_batch([(1, 5, 1)])
    )
    assert plan.counts[0].layers == (16, *[8] * (LAYERS - 1))
    with pytest.raises(PruningError, match="unknown stage 'smal_keys', did you mean 'small_keys'"):
        stages.stage_class("smal_keys")
    with pytest.raises(PluginError, match="two stages are called 'small_keys'"):
        (tmp_path / "mine_too.py").write_text(STAGE)
        load_plugins(["mine_too.py"])


BROKEN = {
    "missing": ("nowhere.py", None, r"plug-in .*nowhere.py': the file .*nowhere.py does not exist"),
    "module": ("no_such_package.norm", None, "plug-in 'no_such_package.norm' can't be imported: No module named"),
    "syntax": ("mine.py", "def (", r"plug-in .*mine.py' can't be imported: SyntaxError"),
    "raises": ("mine.py", "1 / 0", r"plug-in .*mine.py' can't be imported: ZeroDivisionError: division by zero"),
    "taken": ("mine.py", "divprune", r"plug-in .*mine.py': two methods are called 'divprune'"),
    "contract": ("mine.py", "not frozen", r"plug-in .*mine.py': Norm must be a frozen dataclass"),
    "signal": ("mine.py", "a signal", r"plug-in .*mine.py': norm needs 'telepathy'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_told_in_one_line(kind, tmp_path, monkeypatch, capsys):
    name, text, message = BROKEN[kind]
    source = (EXAMPLES / "my_pruning" / "norm.py").read_text()
    text = {
        "taken": source.replace('"norm"', '"divprune"'),
        "contract": source.replace("frozen=True", "frozen=False"),
        "signal": source.replace("= frozenset()", '= frozenset({"telepathy"})'),
    }.get(kind, text)
    if text is not None:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=message) as error:
        load_plugins([name])
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match=message):
        main(["list", "tasks", "--plugins", name])
    with pytest.raises(PluginError, match=message):
        load_config(EvaluateConfig, "evaluate/tiny_dense", ["--plugins", f"[{name}]"])


def test_references_that_name_nothing_or_something_else_are_told(examples, monkeypatch):
    monkeypatch.syspath_prepend(examples)
    with pytest.raises(PluginError, match="module my_pruning.norm has no 'Nrm'"):
        build_pruner("my_pruning.norm:Nrm")
    with pytest.raises(PruningError, match="must be a frozen dataclass"):
        build_pruner("my_pruning.norm:ascending")
    with pytest.raises(TaskError, match="is no benchmark but type"):
        get_task("my_pruning.norm:Norm")
    with pytest.raises(DataError, match="is no recipe"):
        formats.format_of("my_pruning.norm:Norm")


def test_templates_have_names_and_files(tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text("{% generation %}{% endgeneration %}")
    register_template("plain", file)
    assert template_file("plain") == template_file(str(file)) == file
    with pytest.raises(DataError, match="two chat templates are called 'vicuna_v1'"):
        register_template("vicuna_v1", file)
    with pytest.raises(DataError, match="unknown template 'plane', did you mean 'plain'"):
        template_file("plane")
    with pytest.raises(DataError, match=r"chat template no.jinja does not exist"):
        template_file("no.jinja")


def test_a_plugin_that_differs_between_ranks_is_named(monkeypatch):
    """Two hosts with different versions of a package."""
    own = {"name": "norm", "version": "1.0", "sha256": "a" * 64}

    def gathered(others):
        def gather(found, value):
            found[:] = [value, others]

        return gather

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered({"norm": own}))
    Ranks(world=2).check_same([own])
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered({"norm": {**own, "version": "1.1"}}))
    with pytest.raises(PluginError, match=r"'norm' differs between ranks: rank 0 has version 1.0 .*rank 1 version 1.1"):
        Ranks(world=2).check_same([own])
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered({}))
    with pytest.raises(PluginError, match=r"'norm' differs between ranks: .*, rank 1 none; install the same"):
        Ranks(world=2).check_same([own])


def write_colours(folder):
    """Three questions of the examples' benchmark."""
    (folder / "squares").mkdir(parents=True)
    for name in ("red", "green", "blue"):
        Image.new("RGB", (84, 84), name).save(folder / "squares" / f"{name}.png")
    (folder / "colours.csv").write_text("file,colour\nred.png,red\ngreen.png,green\nblue.png,blue\n")


def test_the_examples_pass_their_own_tests(examples):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    paths = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=examples, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_examples_pruner_is_recalibrated_on_two_ranks_and_evaluated(examples, monkeypatch, capsys):
    """From the folder of its own: nothing of ours was changed for it."""
    model = ["--model.path", str(TINY_VLM)]
    few = ["--data.recipe", str(FEW), "--data.max_samples", "16", "--train.batch_size", "4", "--train.max_steps", "2"]
    arguments = ["--config", "recalibrate_norm.yaml", *model, *few, "--output", "tuned"]
    call(recalibrate.main, arguments, cwd=examples)
    record = json.loads((examples / "tuned" / "adapter" / "prunetune.json").read_text())
    digest = hashlib.sha256((examples / "my_pruning" / "norm.py").read_bytes()).hexdigest()
    assert record["plugins"] == [{"name": "norm.py", "version": None, "sha256": digest}]

    monkeypatch.chdir(examples)
    pruning = ["--pruning.pruner", "norm", "--pruning.options", "{power: 1.0}", "--pruning.keep", "16"]
    write_colours(examples / "data")
    tasks = ["--tasks", "[colours]", "--data", "data", "--plugins", "[my_pruning/norm.py, my_pruning/colours.py]"]
    for name, more in (("free", []), ("again", ["--adapter", "tuned/adapter"])):
        main(["evaluate", "--config", "evaluate/tiny_dense", *model, *pruning, *tasks, "--output", name, *more])
        manifest = json.loads((examples / name / "manifest.json").read_text())
        assert manifest["kept_tokens"]["max"] == 16 and manifest["tasks"]["colours"]["items"] == 3
        assert [plugin["name"] for plugin in manifest["plugins"]] == ["colours.py", "norm.py"]
        assert record["plugins"][0] in manifest["plugins"]
    capsys.readouterr()
    main(["compare", "free", "again", "--output", "table"])
    assert "norm (power=1.0) + tuned projector" in capsys.readouterr().out

    # In a process that has not loaded the benchmark, whose scores are checked.
    line = [sys.executable, "-m", "prunetune", "compare", "free", "again", "--output", "table"]
    paths = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=examples, env=paths, capture_output=True, text=True)
    assert done.returncode == 1 and "'colours' is not loaded here" in done.stderr
    assert "--plugins colours.py --plugins norm.py" in done.stderr and "Traceback" not in done.stderr
    line += ["--plugins", "my_pruning/colours.py"]
    done = subprocess.run(line, cwd=examples, env=paths, capture_output=True, text=True)
    assert done.returncode == 0 and "+ tuned projector" in done.stdout, done.stderr

    manifest["plugins"][1]["sha256"] = "another"
    (examples / "again" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(SystemExit, match=r"free and again ran with different plug-ins \(norm.py\)"):
        main(["compare", "free", "again", "--output", "table"])
