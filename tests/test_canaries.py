"""Every command that writes: no file that it did not write changes, on any disk, and whenever it is stopped."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import click
import pytest
from conftest import ROOT
from launches import FEW, arguments, environment, run_several

from prunetune.cli import commands, main
from prunetune.evaluation.records import read_results
from prunetune.models import adapter as adapter_module
from prunetune.models import arm as arm_module
from prunetune.models import peft_adapter as peft_module
from prunetune.outputs import (
    ANALYSIS,
    COMPARISON,
    DEMO,
    EVALUATION,
    EXPORT,
    LOCK,
    MARKER,
    RECALIBRATION,
    VISUALIZATION,
    OutputError,
    OutputFolder,
)
from prunetune.scripts import demo
from prunetune.scripts import launch as launching
from prunetune.train.rotation import drop_old_checkpoints

MODEL = ("--model.dtype", "float32")
# A user's own files, with the names that are the most likely to be taken for ours.
CANARIES = (
    "notes.txt",
    "results_backup.jsonl",
    "results.rank0_old.jsonl",
    "results.jsonl.partial",
    "manifest.json.bak",
    "config.yaml.old",
    "table.md.partial",
    "table_old.csv",
    "kept_00_mine.png",
    "kept_99.png",
    "launch.log.1",
    "model.safetensors.old",
    "adapter.old/adapter_model.safetensors",
    "adapter.partial/prunetune.json",
    "adapter/README.mine",
    "checkpoint-3-backup/complete.json",
    "checkpoint-best/trainer_state.json",
    "checkpoint-3/notes.txt",
    "arms/notes.txt",
    "arms.old/manifest.json",
    "recalibrate/mine.txt",
    ".hidden/config.yaml",
)
SILENT = {"completion", "configs list", "configs show", "data check", "data prepare", "env", "list", "score", "verify"}
WITH_A_FOLDER = ("evaluate", "compare", "visualize", "export", "demo", "analyze")
ELSEWHERE = {
    "card": "writes README.md anew, never over an edited one, below",
    "calibrate": "writes one file, below",
    "configs copy": "writes one new file: test_cli.py",
    "recalibrate": "one launch, below",
    "cache": "takes up what is there, below",
    "find-rate": "below",
    "plan": "writes one file, never over another's: test_plan.py",
    "answers": "three files, never over another's: test_answers.py",
    "teach": "takes up what is there, below",
    "dial": "opens its folder as find-rate does: test_dial.py",
    "serve": "answers requests, and writes no file",
    "soup": "below",
    "profile": "in the table's folder: test_profile.py",
    "table": "in an OutputFolder as the others: test_tables.py",
}


def every_command(group=commands, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield " ".join((*path, name))


def test_every_command_is_here():
    assert set(every_command()) == {*SILENT, *WITH_A_FOLDER, *ELSEWHERE}


def hashes(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def put_canaries(folder):
    for name in CANARIES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")


def canaries(folder):
    return {name: (folder / name).read_text() for name in CANARIES}


MINE = {name: f"mine: {name}" for name in CANARIES}


@pytest.fixture(scope="module")
def world(untrained_folder, tmp_path_factory):
    """What the commands read: a base, an adapter, and two arms."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(untrained_folder, folder / "base")
    model = arm_module.load_model(str(folder / "base"))[0]
    base = arm_module.Arm.load(demo.EvaluateConfig.model_validate(
        {"model": {"path": str(folder / "base"), "dtype": "float32"}, "tasks": ["tiny_world"], "output": "x"}
    ).model, device="cpu")  # fmt: skip
    peft_model = peft_module.wrap_projector(model)
    tensors = {name: -tensor for name, tensor in adapter_module.projector_state(base.model).items()}
    pruning = demo.PruningSpec("divprune", 16).model_dump()
    record = {**base.base.hashes.record(), "pruning": pruning}
    peft_module.write_adapter(folder / "adapter", tensors, peft_model, record)
    for name, more in (("dense", ()), ("pruned", ("--pruning.pruner", "divprune", "--pruning.keep", "16"))):
        main(["evaluate", *_evaluate(folder), "--output", str(folder / name), *more])
    return folder


def _evaluate(world):
    return ("--model.path", str(world / "base"), *MODEL, "--tasks", "[tiny_world_validation]", "--limit", "6",
            "--batch_size", "2", "--max_new_tokens", "2")  # fmt: skip


@pytest.fixture
def call(world, monkeypatch):
    """Run a command with its output in a folder."""
    monkeypatch.setattr(demo, "QUICK", demo.Size(4, 1, 1, 1, 1, methods=("divprune",)))
    monkeypatch.setattr(demo, "METHODS", ("divprune",))

    def recalibrated(folder, world, size):
        base = arm_module.Arm.load(demo.load_config(demo.RecalibrateConfig, demo.TINY.one).model, device="cpu")
        record = {**base.base.hashes.record(), "pruning": demo.PruningSpec("divprune", 16).model_dump()}
        tensors = {name: tensor.clone() for name, tensor in adapter_module.projector_state(base.model).items()}
        wrapped = peft_module.wrap_projector(base.model)
        for name in ("divprune", demo.ELASTIC, demo.CONTROL):
            output = folder.path / "recalibrate" / name / "adapter"
            output.mkdir(parents=True)
            peft_module.write_adapter(output, tensors, wrapped, record)

    monkeypatch.setattr(demo, "_recalibrate", recalibrated)
    line = {
        "evaluate": _evaluate(world),
        "compare": (str(world / "dense"), str(world / "pruned")),
        "visualize": (
            "divprune",
            "--model",
            str(world / "base"),
            "--count",
            "2",
            "--format",
            "png",
            "--maps",
            "false",
            "--max_new_tokens",
            "1",
        ),
        "export": ("--model", str(world / "base"), "--adapter", str(world / "adapter")),
        "demo": ("--quick",),
        "analyze": ("--model.path", str(world / "base"), *MODEL, "--tasks", "[tiny_world]", "--limit", "2",
                    "--methods", "[divprune, random]", "--analyses", "[overlap]"),
    }  # fmt: skip

    def run(name, output, *more):
        main([name, *line[name], "--output", str(output), *more])

    return run


WRITTEN = {
    "evaluate": {"results.jsonl", "manifest.json", "config.yaml", "log.jsonl"},
    "compare": {"table.md", "table.csv", "table.tex", "table.json", "plot.png"},
    "visualize": {"kept_00.png", "kept_01.png", "kept.json", "config.yaml"},
    "export": {"model.safetensors", "config.json", "mm_projector.bin", "tokenizer.json"},
    "analyze": {"index.md", "overlap.csv", "overlap.svg", "analysis.json", "config.yaml"},
    "demo": {"comparison/table.md", "recalibrate/elastic/adapter/prunetune.json", "arms/dense/manifest.json"},
}


def logs_aside(files):
    return {name for name in files if not name.endswith("libraries.log") and "/wandb/" not in name}


@pytest.mark.parametrize("name", WITH_A_FOLDER)
def test_files_of_others_survive_every_command(name, call, world, tmp_path):
    """Beside the output, in a folder that is refused, in one that is shared, and in one that was ours already."""
    before = hashes(world)
    put_canaries(tmp_path)
    output = tmp_path / "output"
    put_canaries(output)
    with pytest.raises(SystemExit, match="is not empty and holds no") as end:
        call(name, output)
    assert "--overwrite" in str(end.value.code) and hashes(output).keys() == set(CANARIES)
    own = tmp_path / "own"
    call(name, own)
    assert WRITTEN[name] <= hashes(own).keys() and not list(own.rglob(LOCK))
    first = logs_aside(hashes(own))
    put_canaries(own)
    for overwrite in ((), ("--overwrite",)):
        call(name, own, *overwrite)
        assert canaries(own) == MINE and logs_aside(hashes(own)) == {*first, *CANARIES}
    call(name, output, "--overwrite")  # the same again in the folder of others
    assert canaries(output) == MINE and logs_aside(hashes(output)) == {*first, *CANARIES}
    assert canaries(tmp_path) == MINE and hashes(world) == before
    assert {path.name for path in tmp_path.iterdir()} == {"own", "output", *(n.split("/")[0] for n in CANARIES)}


@pytest.mark.parametrize("name", ["cache", "find-rate", "teach", "soup"])
def test_files_of_others_survive_what_a_run_is_prepared_with(name, world, tmp_path):
    line = [name, "--config", "recalibrate/tiny_divprune_16", "--model.path", str(world / "base"), *MODEL,
            "--pruning.pruner", "prismprune", "--data.recipe", str(FEW), "--data.max_samples", "8"]  # fmt: skip
    line += {
        "cache": ["--output", str(tmp_path / "run"), "--features"],
        "find-rate": ["--output", str(tmp_path / "run"), "--steps", "3", "--train.batch_size", "4", "--to"],
        "teach": ["--output"],
        "soup": [],
    }[name]
    if name == "soup":
        line = ["soup", str(world / "adapter"), str(world / "adapter"), "--output"]
    put_canaries(tmp_path / "others")
    with pytest.raises(SystemExit, match="is not empty and holds no"):
        main([*line, str(tmp_path / "others")])
    assert hashes(tmp_path / "others").keys() == set(CANARIES)
    own = tmp_path / "own"
    main([*line, str(own)])
    written = logs_aside(hashes(own))
    put_canaries(own)
    main([*line, str(own)] if name in ("cache", "teach") else [*line, str(own), "--overwrite"])
    assert canaries(own) == MINE and logs_aside(hashes(own)) == {*written, *CANARIES}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", WITH_A_FOLDER)
def test_a_name_that_is_taken_stops_the_command(name, call, world, tmp_path):
    taken = sorted(WRITTEN[name])[0]
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(SystemExit, match="is in the way"):
        call(name, tmp_path, "--overwrite")
    assert (tmp_path / taken).read_text() == "mine" and hashes(tmp_path).keys() == {taken}


def test_what_is_read_is_not_written_over(call, world, tmp_path):
    before = hashes(world)
    (tmp_path / "link").symlink_to(world / "base")
    cases = [("export", world / "base"), ("export", tmp_path / "link"), ("export", world / "adapter"),
             ("visualize", world / "base"), ("evaluate", world / "base"), ("compare", world / "dense")]  # fmt: skip
    for name, output in cases:
        for overwrite in ((), ("--overwrite",)):
            with pytest.raises(SystemExit, match="is the output folder and .*which is read"):
                call(name, output, *overwrite)
    assert hashes(world) == before


def test_an_output_that_is_a_file_is_one_line(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in WITH_A_FOLDER:
        with pytest.raises(SystemExit, match="file is a file, and a folder is needed"):
            call(name, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_use_stops_every_command_and_names_the_holder(call, tmp_path):
    kinds = (EVALUATION, COMPARISON, VISUALIZATION, EXPORT, DEMO, ANALYSIS)
    for name, kind in zip(WITH_A_FOLDER, kinds, strict=True):
        held = OutputFolder(tmp_path / name, kind)
        thread = threading.Thread(target=held.__enter__)  # a lock is a thread's own
        thread.start()
        thread.join()
        before = hashes(tmp_path / name)
        for more in ((), ("--overwrite",)):
            with pytest.raises(SystemExit, match=rf"in use by process {os.getpid()} on \S+ since "):
                call(name, tmp_path / name, *more)
        assert hashes(tmp_path / name) == before
        held.__exit__(None, None, None)


# ---- full disks and Ctrl-C --------------------------------------------------------------------------------------


class Failing:
    """The n-th time that something is put on the disk fails; ``stop`` is what it fails with."""

    def __init__(self, monkeypatch, stop):
        self.calls, self.at = 0, 0
        real = os.fsync

        def fsync(number):
            self.calls += 1
            if self.calls == self.at:
                raise stop()
            real(number)

        monkeypatch.setattr(os, "fsync", fsync)

    def arm(self, at):
        self.calls, self.at = 0, at


def full():
    return OSError(28, os.strerror(28))


@pytest.mark.parametrize("name", ["evaluate", "compare", "visualize", "export"])
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_next_run_mends_it(name, call, tmp_path, monkeypatch):
    """Every write of ours, one after the other, in a folder that an earlier run has filled."""
    call(name, tmp_path / "whole")
    whole = {name: text for name, text in hashes(tmp_path / "whole").items() if _repeats(name)}
    failing = Failing(monkeypatch, full)
    for more in ((), ("--overwrite",)):
        at = 0
        while True:
            at += 1
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            if more:
                shutil.copytree(tmp_path / "whole", tmp_path / "run")
            failing.arm(at)
            try:
                call(name, tmp_path / "run", *more)
                assert failing.calls < at
                break
            except SystemExit as end:
                message = str(end.code)
            assert re.fullmatch(r"error: \S+ can't be written: No space left on device \(.* free.*\S", message), message
            _readable(tmp_path / "run")
            if at % 4 == 1:  # each takes a whole run
                failing.arm(0)
                call(name, tmp_path / "run")
                after = hashes(tmp_path / "run")
                assert {name: after[name] for name in whole} == whole
                assert not [name for name in after if ".prunetune-" in name]
        assert at > 3


def _repeats(name):
    """Whether two runs write the same file: speeds, logs and the folder's own name differ."""
    return not name.endswith(("log.jsonl", "manifest.json", "libraries.log", "config.yaml", MARKER))


def _readable(folder):
    """What is there is whole."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    if (folder / "results.jsonl").exists():
        read_results(folder)


@pytest.mark.parametrize("name", ["evaluate", "compare", "visualize", "export"])
@pytest.mark.parametrize("size", [0, 700, 20_000])
def test_a_limit_that_libraries_meet_is_one_line(name, size, call, tmp_path, capsys):
    """A limit on the size of files, which the writers in Rust and C++ meet as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            call(name, tmp_path / "run")
    except pytest.fail.Exception:
        assert size == 20_000 and name in ("evaluate", "visualize")  # nothing there is larger
        return
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(r"error: \S+ can't be written: .*free.*\S", str(end.value.code))
    call(name, tmp_path / "run")
    assert WRITTEN[name] <= hashes(tmp_path / "run").keys()


@pytest.mark.parametrize("name", ["evaluate", "compare", "visualize", "export"])
def test_ctrl_c_at_any_write_is_one_line_and_the_next_run_mends_it(name, call, tmp_path, monkeypatch, capsys):
    call(name, tmp_path / "whole")
    whole = {name: text for name, text in hashes(tmp_path / "whole").items() if _repeats(name)}
    failing = Failing(monkeypatch, KeyboardInterrupt)
    for at in (1, 2, 3, 4):
        failing.arm(at)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call(name, tmp_path / "run")
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 130 and told.startswith("interrupted; run the same command again")
        assert ("goes on" in told) == (name == "evaluate") and not list((tmp_path).rglob(LOCK))
    failing.arm(0)
    call(name, tmp_path / "run")
    after = hashes(tmp_path / "run")
    assert {name: after[name] for name in whole} == whole and not [name for name in after if ".prunetune-" in name]


def test_a_ctrl_c_that_python_drops_comes_again():
    """In the callback of a weak reference an exception goes nowhere; seen with signals at random moments."""
    code = """
        import signal, time, weakref
        import click, prunetune.cli
        class Thing: pass
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
        @prunetune.cli.commands.command("wait")
        def wait():
            thing = Thing()
            reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
            del thing
            time.sleep(20)
            print("went on")
        prunetune.cli.main(["wait"])
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 130 and "went on" not in done.stdout and "Traceback" not in done.stderr


def test_a_card_is_written_in_an_adapter_and_nothing_else_changes(world, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(world / "adapter", folder)
    put_canaries(folder)
    before = hashes(folder)
    main(["card", str(folder)])
    after = hashes(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"README.md"}
    (folder / "README.md").write_text("edited by somebody")
    with pytest.raises(SystemExit, match="README.md"):
        main(["card", str(folder)])
    assert (folder / "README.md").read_text() == "edited by somebody"


def test_calibrate_writes_its_profile_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.json"
    config = tmp_path / "mine.yaml"
    shutil.copy(ROOT / "configs" / "recalibrate" / "tiny_adaptive_16.yaml", config)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: few\nformat: shapes_world\nsplit: recalibration\nscenes: 4\n")
    put_canaries(tmp_path)
    for name in (".mine.json.swp", "mine.json.partial", "mine.json.old"):
        (tmp_path / name).write_text("mine")
    before = hashes(tmp_path)
    failing = Failing(monkeypatch, full)
    failing.arm(1)
    line = ["calibrate", "--config", str(config), "--count", "3", "--data.recipe", str(recipe), "--profile", str(file)]
    with pytest.raises(SystemExit, match=r"mine.json can't be written: No space left .*needed"):
        main(line)
    assert hashes(tmp_path) == before
    Failing(monkeypatch, KeyboardInterrupt).arm(1)
    with pytest.raises(SystemExit):
        main(line)
    assert hashes(tmp_path) == before and "interrupted; run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    main(line)
    after = hashes(tmp_path)
    assert after.pop("mine.json") and after == before
    main([*line, "--overwrite"])
    after = hashes(tmp_path)
    assert after.pop("mine.json") and after == before


# ---- recalibration ----------------------------------------------------------------------------------------------


def test_files_of_others_survive_recalibrations(untrained_folder, tmp_path):
    """In a folder of others, once more in the same, over an earlier run, and with a backup in the way."""
    before = hashes(untrained_folder)
    put_canaries(tmp_path / "output")
    put_canaries(tmp_path)
    few = ("--train.max_steps", "3", "--train.save_steps", "1", "--data.max_samples", "24")
    base = arguments(untrained_folder, tmp_path / "output", *few)
    run_several([[*base, "--overwrite"], base, [*base, "--overwrite", "true"]])
    output = tmp_path / "output"
    assert canaries(output) == MINE and canaries(tmp_path) == MINE and hashes(untrained_folder) == before
    left = {path.name for path in output.glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-3", "checkpoint-3-backup", "checkpoint-best"}
    assert (output / "adapter" / "prunetune.json").exists() and (output / "checkpoint-2" / "complete.json").exists()
    rows = [json.loads(row)["step"] for row in (output / "log.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3] and "overwrite: false" in (output / "config.yaml").read_text()


def test_a_launcher_touches_nothing_of_others(untrained_folder, tmp_path, monkeypatch):
    """Before any rank is started: a folder of others, one that is in use, and one that is a file."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launching.subprocess, "Popen", lambda *_, **__: pytest.fail("launched"))
    put_canaries(tmp_path / "output")
    (tmp_path / "file").write_text("mine")
    for output, message in ((tmp_path / "output", "is not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(SystemExit, match=message):
            main(["recalibrate", *arguments(untrained_folder, output)])
    assert hashes(tmp_path / "output").keys() == set(CANARIES)
    held = OutputFolder(tmp_path / "held", RECALIBRATION)
    thread = threading.Thread(target=held.__enter__)
    thread.start()
    thread.join()
    with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        launching.launch_recalibration(*_split(arguments(untrained_folder, tmp_path / "held")))
    assert not (tmp_path / "held" / "launch.log").exists()
    held.__exit__(None, None, None)


def _split(line):
    return line[1], line[2:]


def test_a_checkpoint_folder_of_others_is_no_checkpoint(tmp_path):
    for step in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{step}" / "global_step1").mkdir(parents=True)
        for file in ("complete.json", "trainer_state.json", "global_step1/mp_rank_00_model_states.pt"):
            (tmp_path / f"checkpoint-{step}" / file).write_text("{}")
    (tmp_path / "checkpoint-3" / "complete.json").unlink()
    put_canaries(tmp_path)
    drop_old_checkpoints(Path(tmp_path))
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-3", "checkpoint-10", "checkpoint-3-backup", "checkpoint-best"}
    assert canaries(tmp_path) == MINE
