"""Who may import whom: the table of the design, enforced on every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = ("assets", "configs", "data_recipes", "evaluation", "models", "pruning", "scripts", "serving", "tiny_world",
        "train")  # fmt: skip
# folder -> the folders of ours that it may import
ALLOWED = {
    "assets": {"assets"},
    "configs": {"configs", "pruning", "data_recipes"},  # of these the specifications alone, see below
    "pruning": {"pruning"},
    "data_recipes": {"data_recipes"},
    "models": {"models", "assets", "pruning", "data_recipes", "configs"},
    "train": {"train", "models", "pruning", "data_recipes", "configs"},
    "evaluation": {"evaluation", "models", "pruning", "data_recipes", "configs"},
    "serving": {"serving", "models", "pruning", "data_recipes", "configs"},
    "tiny_world": set(OURS),
    "scripts": set(OURS),
    "prunetune": {*OURS, "cli", "testing"},
}
# Leaves of the face: they import nothing of ours but one another, and everybody may import them.
LEAVES = {"errors", "extras", "lazy", "names", "outputs", "plugins", "reading", "screen"}
ONLY_IN = {
    "deepspeed": ("train/",),
    "wandb": ("train/",),
    "peft": ("models/peft_adapter.py", "train/"),
    "datasets": ("data_recipes/", "tiny_world/"),
    "lmms_eval": ("evaluation/",),
    "fastapi": ("serving/",),
    "prometheus_client": ("serving/",),
    "uvicorn": ("serving/",),
    "vllm": ("serving/vllm_",),
    "transformers": ("pruning/", "models/", "serving/", "train/", "tiny_world/"),
}
FILES = sorted(path for folder in (*OURS, "prunetune") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full path"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    place = path.relative_to(ROOT).as_posix()
    names = imported(path)
    for name in names:
        top, *below = name.split(".")
        assert top not in OURS, f"{place} imports {name} by its bare name"
        if top == "prunetune" and below:
            assert below[0] in ALLOWED[place.split("/")[0]] | LEAVES, f"{place} imports {name}"
        if top in ONLY_IN:
            assert place.startswith(ONLY_IN[top]), f"{place} imports {name}"
    if place.startswith("configs/"):
        ours = {n for n in names if n.startswith("prunetune.pruning")}
        spec = "prunetune.pruning.spec"
        assert ours <= {spec, f"{spec}.PruningSpec", f"{spec}.StageSpec"}, place
        ours = {n for n in names if n.startswith("prunetune.data_recipes")}
        assert all(n.startswith("prunetune.data_recipes.sampling") for n in ours), place
    if place.startswith(("pruning/methods/", "pruning/ops/", "pruning/stages/methods/")):
        assert not any(
            n.startswith(("transformers", "prunetune.pruning.families", "prunetune.pruning.plug")) for n in names
        ), place
    if place.startswith("pruning/families/"):
        assert not any(n.startswith("prunetune.pruning.methods") for n in names), place


def test_all_files_are_walked():
    assert len(FILES) > 50 and {path.relative_to(ROOT).parts[0] for path in FILES} == {*OURS, "prunetune"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("prunetune", ("torch", "transformers", "pydantic")),
        ("prunetune.configs", ("torch", "transformers")),
        ("prunetune.pruning.types", ("transformers", "pydantic")),
        ("every method", ("transformers", "pydantic")),
        ("every stage", ("transformers",)),
    ],
)
def test_an_import_loads_no_more_than_it_needs(module, absent):
    if module == "every method":
        files = (ROOT / "pruning" / "methods").glob("[a-z]*.py")
        module = ", ".join(f"prunetune.pruning.methods.{path.stem}" for path in files)
    if module == "every stage":
        files = (ROOT / "pruning" / "stages" / "methods").glob("[a-z]*.py")
        module = ", ".join(f"prunetune.pruning.stages.methods.{path.stem}" for path in files)
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_results_loads_no_model_library():
    """Listing benchmarks, comparing arms and scoring saved answers: what is waited for is the reading alone."""
    code = (
        "import sys; import prunetune.evaluation.tasks as t; t.tasks(); import prunetune.evaluation.report.compare; "
        "import prunetune.evaluation.report.tables.layouts.files, prunetune.evaluation.report.score; "
        "import prunetune.evaluation.report.plot, prunetune.scripts.tracked; print([name for name in "
        "('torch', 'transformers', 'datasets', 'matplotlib', 'inflect', 'openpyxl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arms_alone_load_place_and_format(path):
    """What five files wrote by hand has one home: others make an arm."""
    place = path.relative_to(ROOT).as_posix()
    if place.startswith(("models/", "pruning/", "prunetune/testing/", "tiny_world/training/")):
        return
    called = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not called & {"load_model", "PrunedModel", "Formatter", "TextReader"}, place
