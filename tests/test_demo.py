"""The demo: one model for all its arms, and what it shows of them."""

import csv

import pytest
from PIL import Image

from prunetune.models import adapter, arm, peft_adapter
from prunetune.outputs import OutputError
from prunetune.scripts import demo


@pytest.fixture
def recalibrated(monkeypatch):
    """Leave out the recalibrations, which run in processes of their own: the adapters are the base's projector."""

    def instead(folder, world, size):
        base = demo.Arm.load(demo.load_config(demo.RecalibrateConfig, demo.TINY.one).model, device="cpu")
        tensors = {name: tensor.clone() for name, tensor in adapter.projector_state(base.model).items()}
        wrapped = peft_adapter.wrap_projector(base.model)
        for name in (*size.methods, demo.ELASTIC, demo.CONTROL):
            pruning = demo.PruningSpec(name, demo.KEEP) if name in size.methods else demo.PruningSpec()
            record = {**base.base.hashes.record(), "pruning": pruning.model_dump()}
            if name == demo.ELASTIC:
                record["elastic"] = {"budgets": [8, 16]}
            peft_adapter.write_adapter(folder.path / "recalibrate" / name / "adapter", tensors, wrapped, record)

    monkeypatch.setattr(demo, "_recalibrate", instead)
    monkeypatch.setattr(demo, "QUICK", demo.Size(8, 1, 1, 1, 1, methods=("divprune",)))


def test_the_base_is_loaded_and_hashed_once(recalibrated, tmp_path, monkeypatch, capsys):
    """Nineteen arms and the pictures."""
    events = []

    def counting(name):
        own = getattr(arm, name)

        def call(*args, **kwargs):
            events.append(name)
            return own(*args, **kwargs)

        return call

    for name in ("load_model", "base_hashes"):
        monkeypatch.setattr(arm, name, counting(name))
    demo.run_demo(tmp_path / "demo", quick=True)
    assert events == ["load_model", "base_hashes"] * 2  # the second time for the adapters above
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("| divprune, 16 tokens |")]
    assert line.count("(**+0.0** [+0.0, +0.0])") == 3  # for it, elastic, and the control
    (line,) = [line for line in told.splitlines() if line.startswith("| no pruning, 144 tokens | 100.0 [")]
    assert line.endswith("|  | 100.0 (**+0.0** [+0.0, +0.0]) |  |")
    rows = list(csv.DictReader((tmp_path / "demo" / "comparison" / "table.csv").open()))
    names = [row["arm"] for row in rows]
    assert names.count("dense") == 1 and names.count("dense + elastic projector") == 1
    assert len(rows) == 1 + 2 * 4 + (1 + 4 + 4) + 1
    assert {f"tiny_world/accuracy [{kind}]" for kind in ("ask", "describe", "read")} <= rows[0].keys()
    with Image.open(tmp_path / "demo" / "answers" / "answers.png") as picture:
        assert picture.width > picture.height / 2 > 100


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no demo of prunetune, but mine.txt"):
        demo.run_demo(tmp_path, quick=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
