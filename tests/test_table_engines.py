"""Where a table's jobs run: what is the same everywhere, what a death costs, and what is asked of a cluster."""

import os

import pytest
from test_tables import _registry, table  # noqa: F401 - a fixture

from prunetune.configs import ConfigError, TableConfig
from prunetune.scripts.tables.cells import lay_out
from prunetune.scripts.tables.engines import engine_of

MORTAL = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from prunetune.pruning.methods.fastervlm import FasterVLM
from prunetune.pruning.registry import register_pruner

@register_pruner("mortal", paper="none")
@dataclass(frozen=True)
class Mortal(FasterVLM):
    always: bool = False

    def __call__(self, tokens, keep):
        mark = Path({mark!r})
        if self.always or not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(tokens, keep)
"""


def outcomes(config: TableConfig) -> dict:
    cells = [cell.name for cell in lay_out(config).cells]
    return {outcome.job[1]: outcome for outcome in engine_of(config).run([("cell", name) for name in cells])}


def results(config: TableConfig) -> list[bytes]:
    return [(cell.folder / "results.jsonl").read_bytes() for cell in lay_out(config).cells]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two cells as this process fills them."""
    config = table(tmp_path_factory.mktemp("here"), methods=["fastervlm"], features=False, limit=8)
    assert all(outcome.error is None for outcome in outcomes(config).values())
    return results(config)


@pytest.mark.parametrize(("workers", "library"), [
    ({"engine": "ray", "devices": 2, "options": {"num_cpus": 2, "include_dashboard": False}}, "ray"),
    ({"engine": "submitit-local", "devices": 2, "options": {"timeout_min": 10}}, "submitit"),
])  # fmt: skip
def test_every_engine_gives_the_same_results(tmp_path, here, workers, library):
    pytest.importorskip(library)
    config = table(tmp_path, methods=["fastervlm"], features=False, limit=8, workers={"threads": 1, **workers})
    found = outcomes(config)
    assert all(outcome.error is None for outcome in found.values()), found
    assert results(config) == here
    where = {outcome.where for outcome in found.values()}
    assert f"{os.uname().nodename}:{os.getpid()}" not in where


@pytest.mark.usefixtures("_registry")
def test_a_process_that_dies_loses_its_cell_at_most(tmp_path, here):
    plugin = tmp_path / "mortal.py"
    plugin.write_text(MORTAL.format(mark=str(tmp_path / "mark")))
    always = {"pruner": "mortal", "options": {"always": True}, "name": "always"}
    config = table(tmp_path / "out", methods=["mortal", always], features=False, limit=8,
                   plugins=[str(plugin)], workers={"devices": 2, "threads": 1})  # fmt: skip
    found = {name.split("/")[1]: outcome.error for name, outcome in outcomes(config).items()}
    assert found.pop("always_16") == "its process died 2 times (killed, or out of memory); what it had answered is " \
                                     "kept, run the table again"  # fmt: skip
    assert found == {"dense": None, "mortal_16": None}
    assert [(cell.folder / "results.jsonl").read_bytes() for cell in lay_out(config).cells[:2]] == here


@pytest.mark.parametrize(("workers", "message"), [
    ({"options": {"address": "auto"}}, "belong to ray and slurm"),
    ({"engine": "submitit-local", "options": {"slurm_nonsense": 1}}, "submitit says"),
])  # fmt: skip
def test_options_of_an_engine_are_checked(tmp_path, workers, message):
    if workers.get("engine"):
        pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=message):
        list(engine_of(table(tmp_path, workers=workers)).run([("cell", "tiny/dense/tiny_world")]))
