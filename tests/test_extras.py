"""What each extra brings, in environments that hold the packages of one extra and of the core alone."""

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from prunetune.cli import main
from prunetune.extras import extra_of

IMPORT_ALL = """
import importlib, pkgutil, sys
for room in sys.argv[1:]:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print('without', module.name, error.name)
"""

ANSWER = """
from PIL import Image
from prunetune import Arm, ModelConfig, PruningSpec, load
arm = Arm.load(ModelConfig(path="assets/tiny_vlm", dtype="float32"), PruningSpec("divprune", keep=16))
inputs = arm.processor(images=Image.new("RGB", (96, 96), "red"), text="<image> what?", return_tensors="pt")
print(len(arm.pruned.generate(**inputs, max_new_tokens=2).tokens[0]))
"""


@cache
def needed(extras: tuple[str, ...]) -> frozenset[str]:
    """Return the distributions that pip would bring, from what the installed ones say they require."""
    found: set[str] = set()
    todo = [(Requirement(line), extras) for line in metadata.requires("prunetune") or ()]
    while todo:
        requirement, asked = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": name}) for name in (*asked, "")):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        own = tuple(sorted(requirement.extras))
        if name == "prunetune":
            todo += [(Requirement(line), own) for line in metadata.requires(name) or ()]
        elif (name, own) not in found:
            found.add((name, own))
            todo += [(Requirement(line), own) for line in metadata.requires(name) or ()]
    return frozenset(name for name, _ in found)


@pytest.fixture
def environment(tmp_path):
    """Return a function that runs Python code where only the core's packages and those of some extras exist."""

    def run(code: str, *arguments: str, extras: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        for name in (*needed(extras), "prunetune"):
            distribution = metadata.distribution(name)
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                if (whole := distribution.locate_file(top)).exists() and not (site / top).exists():
                    (site / top).symlink_to(whole)
        paths = os.pathsep.join([str(site), str(ROOT)])
        # Without the site module nothing else is on the path.
        return subprocess.run([sys.executable, "-S", "-c", code, *arguments], cwd=ROOT, text=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": paths})  # fmt: skip

    return run


class Without:
    """A module whose names need a package that is not there."""

    def __init__(self, missing):
        self.missing = missing

    def __getattr__(self, name):
        raise ModuleNotFoundError(f"No module named {self.missing!r}", name=self.missing)


def without(printed: str) -> dict[str, str]:
    """Return the modules that could not be imported, and the package that was missing."""
    lines = [line.split() for line in printed.splitlines() if line.startswith("without ")]
    return {module: package for _, module, package in lines}


def test_the_core_runs_a_pruned_model_and_imports_all_that_reads_no_data_and_trains_nothing(environment):
    done = environment(ANSWER)
    assert done.stdout.strip() == "2", done.stderr[-2000:]
    rooms = ("configs", "pruning", "models", "data_recipes", "evaluation", "tiny_world", "cli")
    done = environment(IMPORT_ALL, *(f"prunetune.{room}" for room in rooms))
    assert done.returncode == 0, done.stderr[-2000:]
    assert without(done.stdout) == {
        "prunetune.models.peft_adapter": "peft",
        "prunetune.data_recipes.check": "datasets",
        "prunetune.evaluation.run.lmms_eval_plugin": "lmms_eval",
        "prunetune.evaluation.run.vlmeval_model": "vlmeval",
    }


@pytest.mark.parametrize(
    ("extra", "rooms"),
    [
        ("train", ("train", "models", "data_recipes")),
        ("eval", ("evaluation.report", "evaluation.tasks")),
        ("plots", ("evaluation.report",)),
    ],
)
def test_an_extra_imports_its_rooms(environment, extra, rooms):
    done = environment(IMPORT_ALL, *(f"prunetune.{room}" for room in rooms), extras=(extra,))
    assert (done.returncode, without(done.stdout)) == (0, {}), done.stderr[-2000:]
    used = {"train": "deepspeed, peft, wandb, psutil", "eval": "inflect, openpyxl, rich", "plots": "matplotlib.pyplot"}
    done = environment(f"import {used[extra]}", extras=(extra,))
    assert done.returncode == 0, done.stderr[-2000:]


def test_serving_needs_its_own_extra_alone(environment):
    done = environment(IMPORT_ALL, "prunetune.serving", extras=("serve",))
    assert (done.returncode, without(done.stdout)) == (0, {"prunetune.serving.vllm_model": "vllm"}), done.stderr[-2000:]


def test_serving_without_it_is_one_line(environment):
    done = environment("from prunetune.cli import main; main(['serve', '--config', 'serve/tiny_divprune_16'])")
    assert "is not installed; pip install 'prunetune[serve]'" in done.stderr


def test_all_is_what_the_readme_needs():
    assert needed(("all",)) >= needed(("train",)) | needed(("eval",)) | needed(("plots",))
    assert not {"matplotlib", "peft", "deepspeed", "datasets", "wandb", "openpyxl", "inflect"} & needed(())


def test_a_package_that_is_missing_is_one_line_with_its_extra(monkeypatch):
    assert (extra_of("peft"), extra_of("datasets.config"), extra_of("matplotlib")) == ("train", "data", "plots")
    assert extra_of("of_nobody") is None and extra_of(None) is None
    monkeypatch.setitem(sys.modules, "prunetune.scripts.environment", Without("matplotlib.pyplot"))
    with pytest.raises(SystemExit) as ended:
        main(["env"])
    assert str(ended.value) == "error: matplotlib.pyplot is not installed; pip install 'prunetune[plots]'"
