"""Where a table's jobs run: what is the same everywhere, what a death costs, and what is asked of a cluster."""

import os
import signal
from types import SimpleNamespace
from typing import ClassVar

import pytest
from test_tables import _registry, table  # noqa: F401 - a fixture

from prunetune.configs import ConfigError, TableConfig
from prunetune.scripts.tables import engines
from prunetune.scripts.tables.cells import lay_out
from prunetune.scripts.tables.engines import RayActors, engine_of
from prunetune.scripts.tables.make import _train
from prunetune.scripts.tables.work import Outcome

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


def outcomes(config: TableConfig, but: str = "") -> dict:
    cells = [cell.name for cell in lay_out(config).cells if cell.arm.row != but]
    return {outcome.job[1]: outcome for outcome in engine_of(config).run([("cell", name) for name in cells])}


def results(config: TableConfig) -> list[bytes]:
    return [(cell.folder / "results.jsonl").read_bytes() for cell in lay_out(config).cells]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two cells as this process fills them."""
    config = table(tmp_path_factory.mktemp("here"), methods=["fastervlm"], features=False, limit=8)
    assert all(outcome.error is None for outcome in outcomes(config).values())
    return results(config)


def test_ray_gives_the_same_results(tmp_path, here):
    """With one core for two processes."""
    pytest.importorskip("ray")
    workers = {"engine": "ray", "threads": 1, "devices": 2, "options": {"num_cpus": 1, "include_dashboard": False}}
    config = table(tmp_path, methods=["fastervlm"], features=False, limit=8, workers=workers)
    found = outcomes(config)
    assert all(outcome.error is None for outcome in found.values()), found
    assert results(config) == here
    where = {outcome.where for outcome in found.values()}
    assert f"{os.uname().nodename}:{os.getpid()}" not in where


@pytest.mark.usefixtures("_registry")
def test_a_share_that_dies_loses_the_cell_that_kills_it_alone(tmp_path, here, monkeypatch):
    """And what it had finished is neither failed nor done again."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)  # for a result on a shared disk: 15, and here is none
    monkeypatch.setattr(engines, "POLL", 0.2)
    plugin = tmp_path / "mortal.py"
    plugin.write_text(MORTAL.format(mark=str(tmp_path / "mark")))
    always = {"pruner": "mortal", "options": {"always": True}, "name": "always"}
    workers = {"engine": "submitit-local", "devices": 1, "threads": 1, "options": {"timeout_min": 10}}
    config = table(tmp_path / "out", methods=[always, "fastervlm"], features=False, limit=8,
                   plugins=[str(plugin)], workers=workers)  # fmt: skip
    found = {name.split("/")[1]: outcome.error for name, outcome in outcomes(config).items()}
    assert "its process died 2 times" in found.pop("always_16")
    assert found == {"dense": None, "fastervlm_16": None}
    cells = {cell.arm.row: cell.folder for cell in lay_out(config).cells}
    assert [(cells[row] / "results.jsonl").read_bytes() for row in ("dense", "fastervlm_16")] == here
    begun = list((tmp_path / "out" / "submitit").glob("*_submitted.pkl"))
    assert len(begun) == 3  # the share, and two cells of it alone


@pytest.fixture(scope="module")
def cluster():
    """One Ray node with two GPUs, as far as Ray knows."""
    ray = pytest.importorskip("ray")
    ray.shutdown()  # an earlier test's
    yield {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
    ray.shutdown()


def idle() -> type:
    """A class whose jobs do nothing, but say on which GPUs; not the module's, so Ray sends it as it stands here."""

    class Idle:
        def __init__(self, config):
            pass

        def run(self, job):
            if job[1] == "poison":
                os.kill(os.getpid(), signal.SIGKILL)
            return SimpleNamespace(job=job, error=None, gpus=os.environ["CUDA_VISIBLE_DEVICES"])

    return Idle


def on(options: dict, devices: int | None, names: str, each: int | None) -> dict:
    """Run jobs of so many GPUs each on a cluster; Ray gets no more of the configuration than this."""
    config = SimpleNamespace(workers=SimpleNamespace(devices=devices, options=options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "Worker", idle())
        found = list(RayActors(config).run([("training", name) for name in names.split()], each))
    assert sorted(outcome.job[1] for outcome in found) == sorted(names.split())
    return {outcome.job[1]: outcome for outcome in found}


@pytest.mark.parametrize(("devices", "each", "gpus"), [
    (2, 2, {"0,1"}),  # two processes of two GPUs each have no room
    (16, 1, {"0", "1"}),  # nor have sixteen of one
    (None, None, {"0,1"}),  # each takes the whole node
])  # fmt: skip
def test_ray_has_no_more_actors_than_room(cluster, devices, each, gpus):
    found = on(cluster, devices, "a b c", each)
    assert {outcome.error for outcome in found.values()} == {None}
    assert {outcome.gpus for outcome in found.values()} <= gpus


def test_ray_works_beside_somebody_who_holds_a_gpu(cluster):
    import ray

    on(cluster, 1, "a", 1)  # begins it

    @ray.remote(num_gpus=1)
    class Other:
        pass

    other = Other.remote()
    try:
        ray.get(other.__ray_ready__.remote())
        on(cluster, 2, "a b c", 1)
    finally:
        ray.kill(other)


def test_ray_loses_the_job_alone_whose_process_dies(cluster):
    found = on(cluster, 1, "a poison b", 1)
    assert "its process died 2 times" in found.pop("poison").error
    assert {outcome.error for outcome in found.values()} == {None}


def test_a_recalibration_that_no_node_can_hold_is_refused(cluster):
    with pytest.raises(ConfigError, match=r"takes 4 GPUs, and no node .* more than 2; set its `devices`"):
        on(cluster, 8, "a", 4)


@pytest.mark.parametrize("devices", [4, None])
def test_a_recalibration_takes_the_devices_that_it_names(tmp_path, devices):
    """However many processes there are."""
    config = table(tmp_path, projectors=["tuned"], training={"devices": devices},
                   workers={"engine": "ray", "devices": 16})  # fmt: skip
    asked = []

    class Engine:
        def run(self, jobs, devices=1):
            asked.append((jobs, devices))
            return iter(())

    assert _train(lay_out(config), Engine(), None) == ({}, 0)
    assert asked == [([("training", "tiny/fastervlm_16"), ("training", "tiny/divprune_16")], devices)]


@pytest.mark.usefixtures("_registry")
def test_a_process_that_dies_loses_its_cell_at_most(tmp_path, here):
    plugin = tmp_path / "mortal.py"
    plugin.write_text(MORTAL.format(mark=str(tmp_path / "mark")))
    always = {"pruner": "mortal", "options": {"always": True}, "name": "always"}
    config = table(tmp_path / "out", methods=["mortal", always], features=False, limit=8,
                   plugins=[str(plugin)], workers={"devices": 2, "threads": 1})  # fmt: skip
    found = {name.split("/")[1]: outcome.error for name, outcome in outcomes(config, but="dense").items()}
    assert found.pop("always_16") == "its process died 2 times (killed, or out of memory); what it had answered is " \
                                     "kept, run the table again"  # fmt: skip
    assert found == {"mortal_16": None}
    mortal = next(cell.folder for cell in lay_out(config).cells if cell.arm.row == "mortal_16")
    assert (mortal / "results.jsonl").read_bytes() == here[1]


@pytest.mark.parametrize(("workers", "message"), [
    ({"options": {"address": "auto"}}, "belong to ray and slurm"),
    ({"engine": "ray", "training_options": {"gpus_per_node": 8}}, "training_options .* belong to slurm; ray has none"),
    ({"engine": "submitit-local", "options": {"slurm_nonsense": 1}}, "workers.options: submitit says"),
    ({"engine": "submitit-local", "options": {"gpus_per_node": "two"}}, "workers.options: submitit says"),
])  # fmt: skip
def test_options_of_an_engine_are_checked(tmp_path, workers, message):
    if workers.get("engine") == "submitit-local":
        pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=message):
        list(engine_of(table(tmp_path, workers=workers)).run([("cell", "tiny/dense/tiny_world")]))


class Ended:
    """A job of submitit's, which is done."""

    def __init__(self, share):
        self.share = share

    def done(self):
        return True

    def result(self):
        return [Outcome(job) for job in self.share]


class FakeSlurm:
    """Stands for submitit's executor: takes the options that real ones take, and ends every job at once."""

    parameters: ClassVar[list[dict]] = []
    arrays: ClassVar[list[list]] = []

    def __init__(self, folder, cluster):
        assert cluster == "slurm"

    def update_parameters(self, **options):
        self.parameters.append(options)

    def map_array(self, run, configs, shares):
        self.arrays.append(shares)
        return [Ended(share) for share in shares]


@pytest.fixture
def slurm(monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit, "AutoExecutor", FakeSlurm)
    monkeypatch.setattr(FakeSlurm, "parameters", [])
    monkeypatch.setattr(FakeSlurm, "arrays", [])
    return FakeSlurm


@pytest.mark.parametrize(("devices", "options", "training_options", "asked"), [
    (4, {"gpus_per_node": 1}, {}, {"gpus_per_node": 4}),
    (4, {"slurm_gpus_per_node": 1, "mem_gb": 64}, {"mem_gb": 200}, {"gpus_per_node": 4, "mem_gb": 200}),
    (4, {"slurm_gres": "gpu:1"}, {"slurm_gres": "gpu:4", "gpus_per_node": None},
     {"slurm_gres": "gpu:4", "gpus_per_node": None}),
    (None, {"gpus_per_node": 2}, {}, {"gpus_per_node": 2}),
])  # fmt: skip
def test_a_training_by_slurm_asks_for_its_own_gpus(tmp_path, slurm, devices, options, training_options, asked):
    workers = {"engine": "slurm", "devices": 8, "options": options, "training_options": training_options}
    engine = engine_of(table(tmp_path, workers=workers))
    jobs = [("training", str(number)) for number in range(3)]
    assert sorted(outcome.job for outcome in engine.run(jobs, devices)) == jobs
    list(engine.run([("cell", str(number)) for number in range(9)]))
    training, cell = slurm.parameters
    assert training == {"timeout_min": 24 * 60, **asked} and cell == {"timeout_min": 24 * 60, **options}


def test_jobs_by_slurm_come_in_arrays_no_wider_than_devices(tmp_path, slurm):
    engine = engine_of(table(tmp_path, workers={"engine": "slurm", "devices": 8}))
    names = [str(number) for number in range(5)]
    trainings, cells = [("training", name) for name in names], [("cell", name) for name in [*names, *"56789"]]
    assert len(list(engine.run(trainings, 4))) == 5
    # A job each, two of four GPUs at once; one more as one ends.
    assert slurm.arrays == [[[trainings[0]], [trainings[1]]], *([[job]] for job in trainings[2:])]
    slurm.arrays.clear()
    assert len(list(engine.run(cells))) == 10
    assert slurm.arrays == [[cells[start : start + 2] for start in range(0, 10, 2)]]


def test_what_slurm_refuses_is_one_line(tmp_path, slurm, monkeypatch):
    import submitit

    def refuse(*_):
        raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition specified: gqu\n")

    monkeypatch.setattr(slurm, "map_array", refuse)
    engine = engine_of(table(tmp_path, workers={"engine": "slurm"}))
    with pytest.raises(ConfigError, match="^Slurm refuses .* invalid partition specified: gqu$"):
        list(engine.run([("cell", "any")]))
