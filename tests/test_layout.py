"""One import root: what a wheel holds, a foreign folder that uses our names, and the folders' guard."""

import csv
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("assets", "configs", "data_recipes", "evaluation", "models", "pruning", "scripts", "serving", "tiny_world",
           "train")  # fmt: skip


def python(*arguments, cwd, path="", check=True):
    """Run Python as a user does: only ``path`` is in front of what is installed."""
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=900)  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def own_files() -> set[str]:
    """What the repository holds below our folders."""
    line = ["git", "ls-files", "-co", "--exclude-standard", *FOLDERS, "prunetune"]
    listed = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    return {path for path in listed if (ROOT / path).exists()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout without leftovers of earlier builds."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in [*own_files(), "pyproject.toml", "README.md", "LICENSE"]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    line = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    python(*line, cwd="/")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The source archive, built from a copy of all that the repository holds, and unpacked."""
    source, folder = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("archive")
    line = ["git", "ls-files", "-co", "--exclude-standard"]
    for path in subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines():
        if (ROOT / path).exists():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
    python("-c", f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r})", cwd=source)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder with what the wheel installs, found before the checkout."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """Somebody's own project, whose names are ours as well."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("configs", "scripts", "pruning"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('this is not yours')")
    for name in ("train.py", "evaluation.py", "assets.py", "tiny_world.py", "models.py"):
        (folder / name).write_text("raise RuntimeError('this is not yours')")
    return folder


def test_a_wheel_holds_prunetune_alone_with_all_its_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"prunetune"}
    wanted = {path if path.startswith("prunetune/") else f"prunetune/{path}" for path in own_files()}
    assert wanted == {name for name in names if ".dist-info/" not in name}


def test_a_source_archive_holds_the_repository(archive):
    """So that whoever has it alone can build the site and run the tests."""
    line = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()
    left_out = (".ci", ".github", ".gitignore", ".dockerignore", "Dockerfile")
    wanted = {path for path in listed if (ROOT / path).exists() and not path.startswith(left_out)}
    held = {str(path.relative_to(archive)) for path in archive.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg"}
    assert wanted <= held and {path for path in held - wanted if ".egg-info/" not in path} == made


def test_the_wheel_of_a_source_archive_is_the_one_of_the_checkout(archive, wheel, tmp_path):
    """To the byte, metadata included."""
    python("-c", f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})", cwd=archive)
    ours, theirs = zipfile.ZipFile(wheel), zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    assert set(ours.namelist()) == set(theirs.namelist())
    assert [name for name in ours.namelist() if ours.read(name) != theirs.read(name)] == []


def test_every_folder_is_a_package_under_the_root():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    held_names = set()
    for folder in ("prunetune", *FOLDERS):
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            held_names.add(".".join(parts if folder == "prunetune" else ("prunetune", *parts)))
    assert set(packages) == held_names
    assert f"FOLDERS := {' '.join(FOLDERS)}\n" in (ROOT / "Makefile").read_text()  # what the types are checked of


def test_the_repository_holds_no_links():
    """A system or an archive without symbolic links still gives a checkout that works."""
    line = ["git", "ls-files", "--stage"]
    listed = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()
    assert listed and [entry for entry in listed if entry.startswith("120000")] == []


@pytest.mark.parametrize("folder", [*FOLDERS, "prunetune.prunetune"])
def test_a_folder_by_its_bare_name_says_what_to_import(folder):
    done = python("-c", f"import {folder}", cwd=ROOT, check=False)
    meant = "prunetune" if "." in folder else f"prunetune.{folder}"
    assert done.returncode == 1 and f"ImportError: import {meant}, not {folder}" in done.stderr


def test_nothing_touches_the_search_path():
    for folder in (*FOLDERS, "prunetune", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "sys.path" not in path.read_text(), path


def test_a_foreign_folder_lists_and_reads_configurations_from_the_wheel(installed, foreign):
    """With PYTHONPATH=. and names of its own that are ours, in any folder and without a checkout."""
    path = f"{installed}{os.pathsep}."
    assert "divprune" in python("-m", "prunetune", "list", "pruners", cwd=foreign, path=path).stdout
    where = python("-c", "import prunetune.pruning; print(prunetune.pruning.__file__)", cwd=foreign, path=path).stdout
    assert Path(where.strip()).is_relative_to(installed)
    line = ["-m", "prunetune", "recalibrate", "--config", "recalibrate/tiny_divprune_16", "--train.learning_rat", "1"]
    done = python(*line, "--output", "out", cwd=foreign, path=path, check=False)
    assert done.returncode == 1 and "did you mean 'learning_rate'" in done.stderr, done.stderr
    assert not (foreign / "out").exists()


# `prunetune demo --quick` with half the updates of its elastic run, and without six of its eight training-free arms,
# which tests/test_demo.py has.
QUICK_DEMO = """
from dataclasses import replace
from prunetune.cli import main
from prunetune.scripts import demo
demo.METHODS, demo.BUDGETS = ("fastervlm", "divprune"), (16,)
demo.QUICK = replace(demo.QUICK, elastic=40, control=4)
main(["demo", "--quick", "--output", "demo"])
"""


def test_the_quick_demo_from_the_wheel_recovers_what_pruning_lost(installed, foreign):
    """The main job end to end, where nothing but the wheel is: 8 points back at 16 tokens, all above zero."""
    done = python("-c", QUICK_DEMO, cwd=foreign, path=f"{installed}{os.pathsep}.")
    rows = list(csv.DictReader((foreign / "demo" / "comparison" / "table.csv").open()))
    assert len(rows) == 1 + 2 + (1 + 2 + 2) + 1
    tuned = next(row for row in rows if row["arm"] == "divprune + tuned projector")
    assert rows[0]["arm"] == "dense" and float(rows[0]["tiny_world/accuracy"]) >= 90
    assert float(tuned["tiny_world/accuracy gain"]) >= 8 and float(tuned["tiny_world/accuracy gain low"]) > 0
    for name in ("comparison/plot.png", "comparison/table.md", "answers/answers.png", "recalibrate/elastic/log.jsonl",
                 "recalibrate/divprune/adapter/adapter_model.safetensors"):  # fmt: skip
        assert (foreign / "demo" / name).stat().st_size > 0
    for path in re.findall(r'"runs/(demo/[^"]+)"', (ROOT / "README.md").read_text()):
        assert (foreign / path).exists(), f"README.md names runs/{path}, which the demo does not write"
    assert "--num_accelerators 2" in (foreign / "demo" / "launch.log").read_text()
    assert (foreign / "demo" / "summary.md").read_text() in done.stdout
    elastic = next(row for row in rows if row["arm"] == "divprune + elastic projector")
    assert float(elastic["tiny_world/accuracy gain"]) > 0


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """Another checkout than the one that is installed here."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in [*own_files(), "pyproject.toml", "README.md", "LICENSE"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def test_a_checkout_runs_its_own_folders_where_another_one_is_installed(checkout):
    code = "import prunetune.configs as c, prunetune.pruning.ops as o; print(c.__file__, o.__file__)"
    found = python("-c", code, cwd=checkout).stdout.split()
    assert [Path(file).relative_to(checkout).parts[0] for file in found] == ["configs", "pruning"]
    # The ranks of a launch do not see the working directory, and yet run the same folders.
    code = """
import subprocess, sys
from prunetune.scripts.launch import launch_environment
ask = "import prunetune.train; print(prunetune.train.__file__)"
subprocess.run([sys.executable, "-c", ask], env=launch_environment(1), cwd="/", check=True)
"""
    assert Path(python("-c", code, cwd=checkout).stdout.strip()) == checkout / "train" / "__init__.py"


def test_an_editable_installation_is_found_from_anywhere(checkout, tmp_path):
    line = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--prefix", str(tmp_path)]
    python(*line, "--ignore-installed", "--editable", str(checkout), cwd="/")
    (site,) = tmp_path.glob("lib*/python*/site-packages")
    code = f"import site; site.addsitedir({str(site)!r}); import prunetune.evaluation as e, prunetune.names as n"
    found = python("-S", "-c", f"{code}; print(e.__file__, n.__file__)", cwd="/").stdout.split()
    assert [Path(file).relative_to(checkout).parts[0] for file in found] == ["evaluation", "prunetune"]


def test_no_file_beside_the_documented_script_hides_a_module_of_python():
    """``deepspeed train/recalibrate.py`` puts ``train/`` in front of everything: ``numbers.py`` there stops torch."""
    hidden = {path.stem for path in (ROOT / "train").iterdir()} & set(sys.stdlib_module_names)
    assert not hidden
