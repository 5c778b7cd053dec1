"""The one door for output: folders that are locked, files that are whole, and nothing of anybody else's touched."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from conftest import ROOT

from prunetune import outputs
from prunetune.errors import PrunetuneError
from prunetune.outputs import EVALUATION, EXPORT, LOCK, MARKER, Kind, OutputError, OutputFolder, write_text
from prunetune.outputs.lock import lock_folder

NOTES = Kind("notebook", ("notes.txt", "part-#/*.txt"))


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


# ---- whose files they are ---------------------------------------------------------------------------------------


def test_a_folder_says_what_it_holds_and_is_opened_again(tmp_path):
    for text in ("one", "two"):
        with OutputFolder(tmp_path / "a" / "b", NOTES) as folder:
            folder.write_text("notes.txt", text)
            assert (tmp_path / "a" / "b" / LOCK).exists()
    assert (
        names(tmp_path / "a" / "b") == {"notes.txt", MARKER} and folder.path.joinpath("notes.txt").read_text() == "two"
    )


def test_a_folder_of_others_is_refused_by_name_and_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty and holds no notebook of prunetune, but mine.txt; .*--overwr"):
        OutputFolder(tmp_path, NOTES).__enter__()
    assert names(tmp_path) == {"mine.txt"}


def test_overwrite_deletes_what_is_ours_and_nothing_else(tmp_path):
    theirs = {"mine.txt", "notes.txt.partial", "part-1/mine.md", "part-one/a.txt", "part-1x/a.txt"}
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with OutputFolder(tmp_path, NOTES, overwrite=True) as folder:
        folder.write_text("notes.txt", "ours")
        for number in (1, 2):
            (tmp_path / f"part-{number}").mkdir(exist_ok=True)
            (tmp_path / f"part-{number}" / "a.txt").write_text("ours")
    with OutputFolder(tmp_path, NOTES, overwrite=True):
        assert names(tmp_path) == {*theirs, MARKER, LOCK} and not (tmp_path / "part-2").exists()
    assert all((tmp_path / name).read_text() == name for name in theirs)


def test_no_file_of_others_is_replaced_even_if_asked_to_overwrite(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes.txt is in the way: notebook would replace it"):
        OutputFolder(tmp_path, NOTES, overwrite=True).__enter__()
    assert names(tmp_path) == {"notes.txt"} and (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").rename(tmp_path / "other.txt")
    with OutputFolder(tmp_path, NOTES, overwrite=True) as folder:
        with pytest.raises(OutputError, match="other.txt is in the way"), folder.staged() as new:
            (new / "other.txt").write_text("ours")
        assert (tmp_path / "other.txt").read_text() == "mine" and names(tmp_path) == {"other.txt", MARKER, LOCK}


def test_a_folder_of_another_command_is_refused_always(tmp_path):
    with OutputFolder(tmp_path, NOTES) as folder:
        folder.write_text("notes.txt", "ours")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds a notebook, not an evaluation"):
            OutputFolder(tmp_path, EVALUATION, overwrite).__enter__()
    assert (tmp_path / "notes.txt").read_text() == "ours"


def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "frozen_hash": "x"}')
    (tmp_path / "results.jsonl").write_text("{}\n")
    (tmp_path / "results_backup.jsonl").write_text("{}\n")
    with OutputFolder(tmp_path, EVALUATION) as folder:
        folder.clear()
    assert names(tmp_path) == {"results_backup.jsonl", MARKER}
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a browser extension"}')  # many programs write a file of that name
    with pytest.raises(OutputError, match="manifest.json"):
        OutputFolder(other, EVALUATION).__enter__()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "kind": "notebook", "files": []}',
                                  '{"format": 1, "kind": "notebook", "files": [3]}', '"x"', "\udcff"])  # fmt: skip
def test_a_marker_that_says_nothing_stops_in_one_line(tmp_path, text):
    (tmp_path / MARKER).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match=r"can't be read .*choose another output folder") as error:
        OutputFolder(tmp_path, NOTES, overwrite=True).__enter__()
    assert "\n" not in str(error.value)


def test_a_marker_names_nothing_outside_its_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    folder, linked = tmp_path / "folder", tmp_path / "linked"
    for path in (folder, linked):
        path.mkdir()
    (linked / "a.txt").write_text("mine")
    (folder / "link").symlink_to(linked)
    files = ["../mine.txt", str(tmp_path / "mine.txt"), "link/a.txt", "**"]
    (folder / MARKER).write_text(json.dumps({"format": 1, "kind": "notebook", "files": files}))
    with OutputFolder(folder, NOTES, overwrite=True):
        pass
    assert (tmp_path / "mine.txt").exists() and (linked / "a.txt").exists()


@pytest.mark.parametrize("link", [False, True])
def test_what_is_read_is_never_written(tmp_path, link):
    base = tmp_path / "base"
    base.mkdir()
    output = base
    if link:
        output = tmp_path / "link"
        output.symlink_to(base)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"is the output folder and .*base, which is read"):
            OutputFolder(output, EXPORT, overwrite, reads=(None, "a/hub-id", base)).__enter__()
    assert not names(base)


def test_nothing_is_left_of_an_output_that_never_began(tmp_path):
    with pytest.raises(PrunetuneError, match="no such model"), OutputFolder(tmp_path / "a" / "b", NOTES):
        raise PrunetuneError("no such model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrunetuneError, match="no such model"), OutputFolder(tmp_path / "empty", NOTES):
        raise PrunetuneError("no such model")
    assert not list((tmp_path / "empty").iterdir())


def test_a_staged_set_replaces_the_older_one_whole_or_not_at_all(tmp_path):
    with OutputFolder(tmp_path, EXPORT) as folder:
        with folder.staged(whole=True) as new:
            for name in ("config.json", "a.bin", "b.bin"):
                (new / name).write_text("1")
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(KeyError), folder.staged(whole=True) as new:
            (new / "a.bin").write_text("2")
            raise KeyError
        assert (tmp_path / "a.bin").read_text() == "1"
        with folder.staged(whole=True) as new:
            (new / "config.json").write_text("3")
            (new / "a.bin").write_text("3")
    assert names(tmp_path) == {"config.json", "a.bin", "mine.txt", MARKER}
    assert (tmp_path / "a.bin").read_text() == "3"


# ---- single files -----------------------------------------------------------------------------------------------


def test_a_text_file_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and real.stat().st_mode & 0o777 == 0o640
    write_text(tmp_path / "other", "x")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o666 & ~umask
    assert names(tmp_path) == {"real.yaml", "link.yaml", "other"}


def test_a_replaced_folder_keeps_the_files_of_others(tmp_path):
    target = tmp_path / "adapter"
    for old in ("adapter.old", "adapter.partial"):
        (tmp_path / old).mkdir()
        (tmp_path / old / "mine.txt").write_text("mine")
    for text in ("one", "two"):
        with outputs.replaced_folder(target, ("record", "weights"), sign="record") as new:
            (new / "record").write_text(text)
            (new / "weights").write_text(text)
        (target / "notes").mkdir(exist_ok=True)
        (target / "notes" / "mine.txt").write_text("mine")
    assert names(tmp_path) == {"adapter/record", "adapter/weights", "adapter/notes/mine.txt", "adapter.old/mine.txt",
                               "adapter.partial/mine.txt"}  # fmt: skip
    assert (target / "weights").read_text() == "two"
    with (
        pytest.raises(OutputError, match=r"mine.txt is in the way, and prunetune did not write it"),
        outputs.replaced_folder(tmp_path / "adapter.old", ("record",), sign="record") as new,
    ):
        (new / "mine.txt").write_text("ours")
    (target / "record").unlink()
    with (
        pytest.raises(OutputError, match=r"weights is in the way, and there is no record that would say it is ours"),
        outputs.replaced_folder(target, ("record", "weights"), sign="record"),
    ):
        pass
    assert (tmp_path / "adapter.old" / "mine.txt").read_text() == "mine" and (target / "weights").read_text() == "two"


@pytest.mark.parametrize("at", [1, 2])
def test_a_swap_that_was_killed_is_finished_by_the_next(tmp_path, monkeypatch, at):
    """Killed before either of the two renames: no cleaning up is done, as of a process that is gone."""
    target = tmp_path / "adapter"
    with outputs.replaced_folder(target, ("record",), sign="record") as new:
        (new / "record").write_text("old")
    real, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) == at:
            raise SystemExit
        real(*args)

    monkeypatch.setattr("prunetune.outputs.files.os.replace", killed)
    monkeypatch.setattr("prunetune.outputs.files.shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(SystemExit), outputs.replaced_folder(target, ("record",), sign="record") as new:
        (new / "record").write_text("new")
    monkeypatch.undo()
    assert target.exists() == (at == 1)
    (tmp_path / MARKER).write_text('{"format": 1, "kind": "notebook", "files": []}')
    with OutputFolder(tmp_path, NOTES):
        assert (target / "record").read_text() == "old"
    assert names(tmp_path) == {"adapter/record", MARKER}


# ---- disks ------------------------------------------------------------------------------------------------------


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(OutputError, match=r"file is a file, and a folder is needed") as error:
            OutputFolder(path, NOTES).__enter__()
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("number", "word"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission den"),
                                              (errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "quota"),
                                              (errno.EIO, "Input/output error")])  # fmt: skip
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "replace"])
def test_every_call_that_can_fail_ends_in_one_line(tmp_path, monkeypatch, number, word, call):
    if (call, number) == ("fsync", errno.EACCES):
        return  # the file is open then
    with OutputFolder(tmp_path / "run", NOTES) as folder:
        folder.write_text("notes.txt", "old")
    real = getattr(os, call)

    def failing(*args, **kwargs):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kwargs)
        raise OSError(number, os.strerror(number), None if call == "fsync" else str(args[0]))

    monkeypatch.setattr(os, call, failing)
    with (
        pytest.raises(OutputError, match=rf"can't be written: .*{word}") as error,
        OutputFolder(tmp_path / ("other" if call == "mkdir" else "run"), NOTES) as folder,
    ):
        folder.write_text("notes.txt", "new")
    monkeypatch.undo()
    assert "\n" not in str(error.value) and (tmp_path / "run" / "notes.txt").read_text() == "old"
    with OutputFolder(tmp_path / "run", NOTES) as folder:
        folder.write_text("notes.txt", "new")
    assert names(tmp_path / "run") == {"notes.txt", MARKER}


def test_a_name_that_no_disk_can_have_is_one_line(tmp_path):
    with (
        pytest.raises(OutputError, match="can't be written: File name too long; choose another output"),
        OutputFolder(tmp_path / ("x" * 300), NOTES, reads=("y" * 5000,)),
    ):
        pass


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path, error):
    with pytest.raises(OutputError, match="can't be written: the disk is full"), OutputFolder(tmp_path, NOTES):
        raise error


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (PermissionError(errno.EACCES, "Permission denied", "/data/image.jpg"), KeyError("x"),
                  FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "run" / "x"))):  # fmt: skip
        with pytest.raises(type(error)), OutputFolder(tmp_path / "run", NOTES) as folder:
            folder.write_text("notes.txt", "x")
            raise error


# ---- locks ------------------------------------------------------------------------------------------------------


HOLD = """
    import os, sys, time
    from prunetune import outputs
    with outputs.OutputFolder(sys.argv[1], outputs.Kind("notebook", ("notes.txt",))) as folder:
        folder.write_text("notes.txt", "theirs")
        forked = "--fork" in sys.argv
        if not forked or os.fork() == 0:
            print("ready", flush=True)
        if forked:
            time.sleep(60)
        sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Start a process that holds a folder until its input ends."""
    started = []

    def start(folder, *more, environment=None):
        line = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        process = subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        started.append(process)
        return process, process.stdout.readline()

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_process_stops_at_once_and_names_the_first(tmp_path, hold):
    process, _ = hold(tmp_path / "run", "--its", "words")
    with pytest.raises(OutputError, match=rf"in use by process {process.pid} on .* since 20.*--its words") as error:
        OutputFolder(tmp_path / "run", NOTES, overwrite=True).__enter__()
    assert "\n" not in str(error.value) and (tmp_path / "run" / "notes.txt").read_text() == "theirs"
    process.communicate()
    with OutputFolder(tmp_path / "run", NOTES):
        pass
    assert names(tmp_path / "run") == {"notes.txt", MARKER}


def test_a_dead_process_holds_nothing_nor_do_its_children(tmp_path, hold):
    process, _ = hold(tmp_path / "run", "--fork")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == process.pid  # left behind, and nobody's
    with OutputFolder(tmp_path / "run", NOTES):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_launched_rank_shares_its_launchers_lock_and_outlives_it(tmp_path, hold):
    with OutputFolder(tmp_path / "run", NOTES) as folder:
        folder.write_text("notes.txt", "mine")
        environment = folder.shared()
        process, line = hold(tmp_path / "run", environment=environment)
        assert line == "ready\n"
        other, line = hold(tmp_path / "run", environment={outputs.SHARED: "another"})
        assert line == "" and f"in use by process {os.getpid()}" in other.stderr.read()
    with pytest.raises(OutputError, match="in use by"):  # the launcher is gone, its rank is not
        OutputFolder(tmp_path / "run", NOTES).__enter__()
    process.communicate()
    with OutputFolder(tmp_path / "run", NOTES):
        pass


def test_one_thread_may_open_a_folder_twice_and_another_may_not(tmp_path):
    found = []

    def other():
        try:
            OutputFolder(tmp_path / "run", NOTES).__enter__()
        except OutputError as error:
            found.append(str(error))

    with OutputFolder(tmp_path / "run", NOTES, overwrite=True) as folder:
        folder.write_text("notes.txt", "x")
        with OutputFolder(tmp_path / "run", NOTES, overwrite=True):
            assert (tmp_path / "run" / "notes.txt").exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1 and f"in use by process {os.getpid()}" in found[0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with OutputFolder(tmp_path / "run", NOTES, overwrite=True) as folder:
        folder.write_text("notes.txt", "x")
        monkeypatch.setenv(outputs.SHARED, folder.shared()[outputs.SHARED])
        assert lock_folder(tmp_path / "run") == (-1, False, folder.shared()[outputs.SHARED])
    assert "this file system has no locks" in capsys.readouterr().out
    assert names(tmp_path / "run") == {"notes.txt", MARKER}
