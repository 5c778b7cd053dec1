"""The demo: one model for all its arms."""

import csv

import pytest

from prunetune.models import adapter, arm
from prunetune.outputs import OutputError
from prunetune.scripts import demo


def test_the_base_is_loaded_and_hashed_once(tmp_path, monkeypatch, capsys):
    """Ten arms and the pictures; the recalibration, which runs in processes of its own, is left out."""
    events = []

    def counting(name):
        own = getattr(arm, name)

        def call(*args, **kwargs):
            events.append(name)
            return own(*args, **kwargs)

        return call

    for name in ("load_model", "base_hashes"):
        monkeypatch.setattr(arm, name, counting(name))

    def recalibrated(output, samples):
        base = demo.Arm.load(demo.load_config(demo.RecalibrateConfig, demo.RECIPE).model, device="cpu")
        record = {**base.base.hashes.record(), "pruning": demo.PruningSpec("divprune", 16).model_dump()}
        tensors = {name: tensor.clone() for name, tensor in adapter.projector_state(base.model).items()}
        adapter.write_adapter(output / "adapter", tensors, adapter.wrap_projector(base.model), record)
        events.append("recalibrated")

    monkeypatch.setattr(demo, "_recalibrate", recalibrated)
    monkeypatch.setattr(demo, "QUICK", demo.Size(scenes=1, samples=8))
    demo.run_demo(tmp_path / "demo", quick=True)
    by_the_stub = ["load_model", "base_hashes", "recalibrated"]
    assert events == ["load_model", "base_hashes", *by_the_stub]
    assert "gains +0.0" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "demo" / "comparison" / "table.csv").open()))
    assert [row["arm"] for row in rows].count("dense") == 1 and len(rows) == 1 + 2 * 4 + 1


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no demo of prunetune, but mine.txt"):
        demo.run_demo(tmp_path, quick=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
