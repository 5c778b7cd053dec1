"""The screen is our story: the libraries' lines are in a file, and nothing is lost."""

import io
import logging
import os
import re

import pytest
from conftest import TINY_VLM
from launches import FEW

from prunetune.cli import main
from prunetune.screen import BEGIN, END, SCREEN, LossyLog, libraries_in, say, show_and_log


@pytest.mark.parametrize("size", [1, 3, 7, 4096])
def test_marked_pieces_are_shown_and_the_rest_is_logged(size, capsys):
    """However the pipe cuts them, and wherever in a line of another rank they stand."""
    sent = b"setuptools\n" + BEGIN + "loss 0.5 …\n".encode() + END + b"half a " + BEGIN + b"\rbar 1/2" + END + b"line\n"
    read, write = os.pipe()
    log = io.BytesIO()
    for start in range(0, len(sent), size):
        os.write(write, sent[start : start + size])
    os.write(write, BEGIN + b"cut off by a kill")
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        shown = show_and_log(pipe, LossyLog(log))
    assert shown == capsys.readouterr().out == "loss 0.5 …\n\rbar 1/2"
    assert log.getvalue() == b"setuptools\nhalf a line\n" + BEGIN + b"cut off by a kill"


def test_a_full_disk_shortens_the_log_and_stops_nothing(capsys):
    reading, writing = os.pipe()
    os.write(writing, b"noise" + BEGIN + b"step 1\n" + END + b"more noise")
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe, open("/dev/full", "ab", buffering=0) as full:
        log = LossyLog(full)
        assert show_and_log(pipe, log) == "step 1\n"
    assert log.lost == len(b"noise" + b"more noise") and capsys.readouterr().out == "step 1\n"


def test_what_is_said_is_marked_for_a_launcher_alone(capfd, monkeypatch):
    say("to the user")
    assert capfd.readouterr().out == "to the user\n"
    monkeypatch.setattr(SCREEN, "marked", True)
    say("through the launcher")
    assert capfd.readouterr().out.encode() == BEGIN + b"through the launcher\n" + END


def test_libraries_write_to_a_file_that_is_named_at_the_end(tmp_path, capfd):
    with libraries_in(tmp_path / "libraries.log"):
        logging.getLogger("transformers.models").warning("a notice of the library")
        logging.getLogger("py.warnings").warning("FutureWarning: deprecated")  # where captured warnings go
    printed = capfd.readouterr()
    assert printed.out == f"the libraries' messages: {tmp_path / 'libraries.log'}\n" and printed.err == ""
    text = (tmp_path / "libraries.log").read_text()
    assert "transformers.models: a notice of the library" in text and "FutureWarning: deprecated" in text
    with libraries_in(tmp_path / "silent.log"):
        pass
    assert capfd.readouterr().out == "" and not (tmp_path / "silent.log").exists()


def test_a_recalibration_shows_its_story_and_its_errors_once(tmp_path, capfd):
    """Two ranks: what they say is on the screen once, everything of DeepSpeed, setuptools and W&B in the log."""
    arguments = ["recalibrate", "--config", "recalibrate/tiny_divprune_16", "--model.path", str(TINY_VLM)]
    few = ["--data.recipe", str(FEW), "--data.max_samples", "16", "--train.batch_size", "4"]
    few += ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main([*arguments, *few])
    printed = capfd.readouterr()
    assert end.value.code == 0 and printed.err == ""
    lines = [line for line in re.split(r"[\r\n]+", printed.out) if line]
    story = [line for line in lines if not line.startswith("recalibrate: ")]
    beginnings = ["model ", "pruning ", "data ", "ranks ", "[FROZEN]", "[FROZEN]", "[TRAINABLE]"]
    beginnings += ["engine ", "          no project_kept: ", "          no gradient checkpointing", "measured: "]
    beginnings += ["recalibrated projector", "the libraries' messages"]
    assert len(story) == len(beginnings) and all(map(str.startswith, story, beginnings)), story
    assert any("2/2" in line and "samples/s" in line for line in lines)
    assert "--num_accelerators 2" in (tmp_path / "out" / "launch.log").read_text()

    with pytest.raises(SystemExit) as end:
        main([*arguments, *few, "--train.seed", "7"])
    printed = capfd.readouterr().out
    assert end.value.code != 0
    assert printed.count("error: a run with other settings for train has finished in") == 1
    assert "Traceback" not in printed
