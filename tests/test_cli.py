"""The command line: what it lists, and how it fails."""

import subprocess
import sys

import pytest
from conftest import ROOT, TINY_VLM

from prunetune.cli import main


def test_lists_name_everything(capsys):
    expected = {
        "pruners": ("divprune", "reconstruction", "cls_attention"),
        "families": ("llava_next", "crop"),
        "recipes": ("vg_textvqa_gqa", "tiny_world"),
        "tasks": ("tiny_world", "exact match"),
    }
    for what, names in expected.items():
        main(["list", what])
        printed = capsys.readouterr().out
        assert all(name in printed for name in names), printed


@pytest.mark.parametrize(("arguments", "message"), [
    (["evalute"], "unknown command 'evalute'"),
    (["evaluate", "--config", "no.yaml"], "config file no.yaml does not exist"),
    (["compare", "nowhere"], "nowhere is no evaluated arm"),
    (["recalibrate", "--config", "configs/recalibrate/tiny_divprune_16.yaml", "--train.lr", "1"],
     "train.lr: unknown key"),
    (["evaluate", "--config", str(ROOT / "configs/evaluate/tiny_dense.yaml"), "--pruning.pruner", "divprun", "--output",
      "{tmp}", "--model.path", str(TINY_VLM)], "did you mean 'divprune'"),
    (["evaluate", "--config", str(ROOT / "configs/evaluate/tiny_dense.yaml"), "--pruning.pruner", "divprune",
      "--pruning.keep", "200", "--output", "{tmp}", "--model.path", str(TINY_VLM)], "asks for 200 visual tokens"),
])  # fmt: skip
def test_errors_end_with_their_message_alone(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main([part.replace("{tmp}", str(tmp_path)) for part in arguments])
    assert message in str(end.value.code)


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "prunetune", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "recalibrate", "evaluate", "compare", "export", "list"))


def test_export_writes_a_stock_checkpoint_and_refuses_what_is_no_adapter(tmp_path):
    with pytest.raises(SystemExit, match="is no recalibrated projector"):
        main(["export", "--model", str(TINY_VLM), "--adapter", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
