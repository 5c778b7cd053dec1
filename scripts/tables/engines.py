"""Where a table's jobs run: this process, a pool of processes, Ray's actors, or jobs that submitit sends to Slurm."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from prunetune.configs import ConfigError, TableConfig
from prunetune.configs.table import WorkersConfig
from prunetune.reading import one_line
from prunetune.scripts.tables.cells import Plan, lay_out
from prunetune.scripts.tables.state import is_evaluated, is_trained
from prunetune.scripts.tables.work import Job, Outcome, Worker

TRIES = 2
"""How often a job is begun whose process died; what it had answered by then is not answered again."""
LOST = "its process died {tries} times (killed, or out of memory); what it had answered is kept, run the table again"
POLL = 2.0
"""Seconds between two looks at what submitit has started."""


class Engine(Protocol):
    """Runs jobs anywhere; each goes on from what it finds on the disk."""

    def run(self, jobs: Sequence[Job], devices: int | None = 1) -> Iterator[Outcome]:
        """Yield how each job ended, as they end.

        Args:
            jobs: all of one kind.
            devices: how many each of them takes; None are those of a machine.
        """
        ...


def engine_of(config: TableConfig) -> Engine:
    """Return the engine that the YAML names.

    Raises:
        ConfigError: if its library is not installed, or its options are wrong.
    """
    workers = config.workers
    if workers.training_options and workers.engine not in ("slurm", "submitit-local"):
        raise ConfigError(
            f"workers.training_options {sorted(workers.training_options)} belong to slurm; {workers.engine} has none"
        )
    if workers.engine == "ray":
        return RayActors(config)
    if workers.engine in ("slurm", "submitit-local"):
        return Submitted(config)
    if workers.options:
        raise ConfigError(f"workers.options {sorted(workers.options)} belong to ray and slurm; local has none")
    return Here(config) if devices_of(config) == 1 else Pool(config)


def devices_of(config: TableConfig) -> int:
    """Return how many processes run at once: as the YAML says, or one a GPU, or one."""
    if config.workers.devices is not None:
        return config.workers.devices
    import torch

    return max(torch.cuda.device_count(), 1)


class Here:
    """One job after another in this process."""

    def __init__(self, config: TableConfig) -> None:
        self.worker = Worker(config)
        if config.workers.threads is not None:
            _limit_threads(config.workers.threads)

    def run(self, jobs: Sequence[Job], devices: int | None = 1) -> Iterator[Outcome]:
        """Yield how each job ended."""
        for job in jobs:
            yield self.worker.run(job)


_WORKER: Worker | None = None
"""Of a process of the pool: what it keeps from job to job."""


class Pool:
    """Processes of this machine, one a device. Where one dies, what was running is begun again, each alone."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self.devices = devices_of(config)

    def run(self, jobs: Sequence[Job], devices: int | None = 1) -> Iterator[Outcome]:
        """Yield how each job ended, as they end."""
        left = list(jobs)
        while left:
            ended, running = yield from self._until_broken(left, self.devices)
            left = [job for job in left if job not in ended and job not in running]
            # A pool breaks as a whole, and does not say which of its processes died: alone, a job dies for itself.
            for job in running:
                ended, _ = yield from self._until_broken([job], 1)
                if not ended:
                    yield Outcome(job, LOST.format(tries=TRIES))

    def _until_broken(self, jobs: Sequence[Job], devices: int) -> Generator[Outcome, None, tuple[list[Job], list[Job]]]:
        """Yield outcomes until all jobs have ended or a process died; return which ended, and which were running."""
        context = multiprocessing.get_context("spawn")  # CUDA can't be used in a forked process
        places = context.Queue()
        for device in range(devices):
            places.put(device)
        waiting, ended = list(jobs), []
        futures: dict[Future[Outcome], Job] = {}
        with ProcessPoolExecutor(devices, context, _begin, (self.config, places, self.devices)) as pool:
            try:
                while waiting or futures:
                    # A job is handed out when a process is free, so what is running is known if one dies.
                    while waiting and len(futures) < devices:
                        job = waiting.pop(0)
                        futures[pool.submit(_run, job)] = job
                    done, _ = wait(futures, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                        ended.append(futures.pop(future))
            except BrokenProcessPool:
                pass  # what is in futures now was running
            except BaseException:
                _kill(pool)  # Ctrl-C: cells go on from their files
                raise
        return ended, list(futures.values())


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()


def _begin(config: TableConfig, places: Any, devices: int) -> None:
    """Begin a process of the pool: take a device, and as many cores as there are for each."""
    global _WORKER
    place = places.get()
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[place] if place < len(visible) else str(place)
    _limit_threads(config.workers.threads or max(1, (os.cpu_count() or 1) // devices))
    _quiet(Path(config.output) / "workers", f"{place}")
    _WORKER = Worker(config)


def _run(job: Job) -> Outcome:
    assert _WORKER is not None  # the pool began this process
    return _WORKER.run(job)


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _quiet(folder: Path, name: str) -> None:
    """Send what a process prints to a file: the screen is the table's."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


class RayActors:
    """Ray's actors, on any machine that sees the output folder; Ray restarts those that die, and their jobs."""

    def __init__(self, config: TableConfig) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("workers.engine is ray, which is not installed; pip install 'prunetune[ray]'") from None
        self.ray, self.config = ray, config

    def run(self, jobs: Sequence[Job], devices: int | None = 1) -> Iterator[Outcome]:
        """Yield how each job ended, as they end.

        Raises:
            ConfigError: if ray.init does not take the options, or no node of the cluster has so many GPUs.
        """
        if not self.ray.is_initialized():
            try:
                self.ray.init(**{"logging_level": "ERROR", "log_to_driver": False, **self.config.workers.options})
            except (TypeError, ValueError, ConnectionError) as error:
                raise ConfigError(f"workers.options: ray.init says {error}") from None
        gpus, places = self._room(devices)
        remote = self.ray.remote(num_gpus=gpus, num_cpus=1, max_restarts=-1, max_task_retries=TRIES - 1)(Worker)
        actors: list[Any] = [remote.remote(self.config) for _ in range(min(places, len(jobs)))]
        try:
            yield from self._work(actors, list(jobs))
        finally:
            for actor in actors:
                self.ray.kill(actor)

    def _room(self, devices: int | None) -> tuple[int, int]:
        """Return how many GPUs an actor takes, and how many actors there are at once."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        most = max(int(node.get("GPU", 0)) for node in nodes)
        gpus = (devices or most) if most else 0
        if gpus > most:
            raise ConfigError(
                f"a recalibration takes {gpus} GPUs, and no node of Ray's cluster has more than {most}; "
                "set its `devices`, as training: {devices: " + f"{most}" + "}"
            )
        # More actors than have room would wait for GPUs that the others keep to the end.
        places = 0
        for node in nodes:
            cores = int(node.get("CPU", 0))
            places += min(cores, int(node.get("GPU", 0)) // gpus) if gpus else cores
        if places == 0:
            raise ConfigError(f"no node of Ray's cluster has a core and {gpus} GPUs for a job; see `ray status`")
        asked = self.config.workers.devices or (places * gpus if gpus else 1)
        return gpus, min(places, max(1, asked // max(1, gpus)))

    def _work(self, actors: list[Any], waiting: list[Job]) -> Iterator[Outcome]:
        # An actor gets its first job when it has begun: somebody else may hold the GPU that it waits for.
        running: dict[Any, tuple[Any, Job | None]] = {actor.__ray_ready__.remote(): (actor, None) for actor in actors}
        left = len(waiting)
        why = ""
        while left and running:
            (ready,), _ = self.ray.wait(list(running), num_returns=1)
            actor, job = running.pop(ready)
            if job is not None:
                left -= 1
                yield self._outcome(ready, job)
            else:
                try:
                    self.ray.get(ready)
                except self.ray.exceptions.RayError as error:
                    why = str(error).strip().splitlines()[-1]  # what comes before it is a traceback
                    continue
            if waiting:
                job = waiting.pop(0)
                running[actor.run.remote(job)] = (actor, job)
        for job in waiting:
            yield Outcome(job, f"no actor of Ray's could begin: {why}")

    def _outcome(self, ready: Any, job: Job) -> Outcome:
        try:
            outcome: Outcome = self.ray.get(ready)
            return outcome
        except self.ray.exceptions.RayError as error:
            return Outcome(job, f"{LOST.format(tries=TRIES)} ({type(error).__name__})")


class Submitted:
    """Jobs of a Slurm array, or processes of this machine that submitit starts in the same way; each does a share."""

    def __init__(self, config: TableConfig) -> None:
        try:
            import submitit
        except ImportError:
            engine = config.workers.engine
            raise ConfigError(
                f"workers.engine is {engine}, and submitit is not installed; pip install 'prunetune[slurm]'"
            ) from None
        self.submitit, self.config = submitit, config
        self.devices = config.workers.devices or 1

    @cached_property
    def plan(self) -> Plan:
        """What is there already is seen by it."""
        return lay_out(self.config)

    def run(self, jobs: Sequence[Job], devices: int | None = 1) -> Iterator[Outcome]:
        """Yield how each job ended; those of one share come together. A training is a job of its own.

        Raises:
            ConfigError: if submitit or Slurm does not take the options.
        """
        workers = self.config.workers
        training = any(kind == "training" for kind, _ in jobs)
        options = training_options(workers, devices) if training else workers.options
        executor = self._executor(options, "workers.options and training_options" if training else "workers.options")
        at_once = max(1, self.devices // (options.get("gpus_per_node") or 1)) if training else self.devices
        shares = [[job] for job in jobs] if training else _shares(jobs, self.devices)
        deaths: Counter[Job] = Counter()
        while shares:
            broken = yield from self._until_ended(executor, shares, at_once)
            shares = []
            for share in broken:
                left = [job for job in share if not self._is_done(job)]
                yield from (Outcome(job) for job in share if job not in left)
                deaths.update(left[:1])  # jobs of a share run one after another: this one was running, or has failed
                yield from (Outcome(job, LOST.format(tries=TRIES)) for job in left if deaths[job] >= TRIES)
                shares += [[job] for job in left if deaths[job] < TRIES]  # alone, a job dies for itself

    def _executor(self, options: dict[str, Any], field: str) -> Any:
        cluster = "local" if self.config.workers.engine == "submitit-local" else "slurm"
        executor = self.submitit.AutoExecutor(folder=Path(self.config.output) / "submitit", cluster=cluster)
        try:
            executor.update_parameters(**{"timeout_min": 24 * 60, **options})
        except (AssertionError, TypeError, ValueError, NameError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(f"{field}: submitit says {one_line(error)}") from None
        return executor

    def _until_ended(
        self, executor: Any, shares: list[list[Job]], at_once: int
    ) -> Generator[Outcome, None, list[list[Job]]]:
        """Yield the outcomes of shares, so many of them at once; return those whose process died."""
        waiting, broken = list(shares), []
        running: dict[Any, list[Job]] = {}
        while waiting or running:
            room = at_once - len(running)
            begun, waiting = waiting[:room], waiting[room:]
            if begun:
                submitted = self._submit(executor, begun)
                running |= zip(submitted, begun, strict=True)
            task = next(self.submitit.helpers.as_completed(list(running), poll_frequency=POLL))
            share = running.pop(task)
            try:
                yield from task.result()
            except self.submitit.core.utils.UncompletedJobError:
                broken.append(share)
        return broken

    def _submit(self, executor: Any, shares: list[list[Job]]) -> list[Any]:
        errors = self.submitit.core.utils
        try:
            return list(executor.map_array(_run_share, [self.config] * len(shares), shares))
        except (errors.FailedJobError, errors.FailedSubmissionError) as error:  # sbatch's own exit status
            raise ConfigError(f"Slurm refuses jobs with these workers.options: {one_line(error)}") from None

    def _is_done(self, job: Job) -> bool:
        """Return whether a job whose outcome was lost has finished; of features nothing tells, and they go on."""
        kind, name = job
        if kind == "cell":
            return any(is_evaluated(cell) for cell in self.plan.cells if cell.name == name)
        return kind == "training" and any(is_trained(one) for one in self.plan.trainings if one.name == name)


def training_options(workers: WorkersConfig, devices: int | None) -> dict[str, Any]:
    """Return what a training asks submitit's executor for.

    Args:
        workers: of the YAML.
        devices: that the training names; where it names none, it takes what ``workers.options`` give a job.
    """
    options = dict(workers.options)
    if devices is not None:
        options.pop("slurm_gpus_per_node", None)  # it would win
        options["gpus_per_node"] = devices
    return {**options, **workers.training_options}


def _shares(jobs: Sequence[Job], number: int) -> list[list[Job]]:
    """Return jobs in so many shares of neighbours, which are of one model where that can be."""
    size = max(1, math.ceil(len(jobs) / number))
    return [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]


def _run_share(config: TableConfig, jobs: list[Job]) -> list[Outcome]:
    """Do a share of the jobs in one process, which loads the model once."""
    if config.workers.threads is not None:
        _limit_threads(config.workers.threads)
    worker = Worker(config)
    return [worker.run(job) for job in jobs]
