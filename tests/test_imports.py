"""Who may import whom: the table of the design, enforced on every file."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

OURS = ("pruning", "data_recipes", "train", "evaluation", "configs", "scripts")
# folder -> (our packages it may import, third-party packages nobody else may)
ALLOWED = {
    "pruning": {"pruning"},
    "data_recipes": {"data_recipes"},
    "train": {"train", "pruning", "data_recipes", "configs"},
    "evaluation": {"evaluation", "pruning", "data_recipes", "configs"},
    "configs": {"configs"},
    "scripts": set(OURS),
}
ONLY_IN = {
    "deepspeed": ("train/",),
    "wandb": ("train/",),
    "peft": ("pruning/checkpoint.py", "train/"),
    "datasets": ("data_recipes/",),
    "lmms_eval": ("evaluation/",),
    "transformers": ("pruning/", "train/"),
}
FILES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))


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
        top = name.split(".")[0]
        if top in OURS:
            assert top in ALLOWED[place.split("/")[0]], f"{place} imports {name}"
        if top in ONLY_IN:
            assert place.startswith(ONLY_IN[top]), f"{place} imports {name}"
    if place.startswith("pruning/methods/"):
        assert not any(n.startswith(("transformers", "pruning.families", "pruning.plug")) for n in names), place
    if place.startswith("pruning/families/"):
        assert not any(n.startswith("pruning.methods") for n in names), place


def test_all_files_are_walked():
    assert len(FILES) > 50 and {path.relative_to(ROOT).parts[0] for path in FILES} == set(OURS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 300, f"{path} grew over 300 lines: split it"
