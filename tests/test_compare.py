"""``prunetune compare`` as it is typed: what it writes, what it seals, and what verify makes of it."""

import json

import pytest
from synthetic_arms import BENCHMARKS, questions, register, right, says, write_arm

from prunetune.cli import main
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.comparison import read_comparison, read_table
from prunetune.evaluation.tasks.base import Benchmark, Scorer
from prunetune.models.seal import sealed
from prunetune.scripts.verify import verify

FEW = questions(36)
QUOTED = "- {arm: theirs, kept: 16, values: {few/accuracy: 61.9}, cite: 'a paper, table 1'}\n"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def arms(tmp_path):
    few = [(FEW, says(right, 36)) for right in (36, 9, 20, 24)]
    write_arm(tmp_path / "dense", {"few": few[0]})
    write_arm(tmp_path / "free", {"few": few[1]}, ("divprune", 16), device="another GPU")
    write_arm(tmp_path / "tuned", {"few": few[2]}, ("divprune", 16), adapter="runs/one/adapter")
    write_arm(tmp_path / "again", {"few": few[3]}, ("divprune", 16), adapter="runs/two/adapter")
    (tmp_path / "quoted.yaml").write_text(QUOTED)
    return tmp_path


def run(arms, *more, names=("dense", "free", "tuned", "again")):
    folders = [str(arms / name) for name in names]
    main(["compare", *folders, "--output", str(arms / "out"), *more])
    return arms / "out"


def states(checks):
    return {check.link: check.holds for check in checks}


def test_what_was_allowed_is_told_sealed_and_verified(arms, capsys):
    with pytest.raises(SystemExit, match=r"differ in device .*--allow device"):
        run(arms)
    out = run(arms, "--allow", "device,versions", "--quoted", str(arms / "quoted.yaml"))
    printed = capsys.readouterr().out
    assert "| divprune + tuned projector [one] | 16 |" in printed and "[two]" in printed
    assert "| theirs (quoted: a paper, table 1) | 16 | 61.9 |" in printed
    assert "Allowed to differ, device: a GPU (dense, tuned, again); another GPU (free)." in printed
    values = read_comparison(out)
    assert values["allow"] == ["device", "versions"] and values["rescore"] is False
    assert values["differences"] == {"device": {"a GPU": ["../dense", "../tuned", "../again"],
                                                "another GPU": ["../free"]}}  # fmt: skip
    assert set(values["tables"]) == {"table.md", "table.csv", "table.tex", "table.json"}
    table = read_table(out)
    assert [row.folders for row in table.rows][:2] == [["../dense"], ["../free"]] and len(table.quoted) == 1
    assert all(holds in (True, None) for holds in states(verify(out)).values())
    assert states(verify(out))["numbers"] is True
    moved = arms / "elsewhere"
    moved.mkdir()
    for name in ("dense", "free", "tuned", "again", "out"):
        (arms / name).rename(moved / name)
    assert states(verify(moved / "out"))["numbers"] is True


def test_a_table_with_other_numbers_than_its_arms_is_found(arms):
    out = run(arms, "--allow", "device")
    table = json.loads((out / "table.json").read_text())
    table["rows"][1]["values"]["few/accuracy"]["value"] += 1
    (out / "table.json").write_text(json.dumps(table))
    found = states(verify(out))
    assert found["numbers"] is False and found["table.json"] is False and found["table.md"] is True
    (out / "table.json").write_text("[]")
    (told,) = [check.told for check in verify(out) if check.link == "numbers"]
    assert "table.json is no table of this version" in told and "\n" not in told
    values = json.loads((out / "comparison.json").read_text()) | {"format": 1}
    (out / "comparison.json").write_text(json.dumps(sealed(values)))
    with pytest.raises(TaskError, match="has format 1, this version reads"):
        read_comparison(out)


def test_scores_of_today_are_taken_when_asked_for_and_verified(arms, monkeypatch, capsys):
    def kinder(prediction, item):
        return 1.0 if item.id == "35" else right(prediction, item)

    register(monkeypatch, few=Benchmark("few", "by hand", "question", "", [], Scorer(kinder)))
    with pytest.raises(SystemExit, match="take today's scores with --rescore"):
        run(arms, "--allow", "device")
    out = run(arms, "--allow", "device", "--rescore")
    assert "with another score than when they were given: 1 of 36 of few in free" in capsys.readouterr().out
    assert read_table(out).rows[1].values["few/accuracy"].value == pytest.approx(100 * 10 / 36)
    assert states(verify(out))["numbers"] is True
    monkeypatch.undo()
    register(monkeypatch, few=BENCHMARKS["few"])
    assert states(verify(out))["numbers"] is False  # the scorer is another again


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--allow", "frozen_hash"], "frozen_hash may never differ"),
        (["--allow", "devise"], "no field 'devise' that may differ, did you mean 'device'"),
        (["--quoted", "visprunr"], "neither a file nor a paper whose tables are here, did you mean 'vispruner'"),
        (["--allow", "device", "--quoted", "vispruner"], "no quoted row is of a model and a column of this table"),
        (["--allow", "device", "--difficulty-filter", "{free}"], "is no training-free arm of downsample"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arms, more, message):
    with pytest.raises(SystemExit, match=message) as refused:
        run(arms, *(text.format(free=arms / "free") for text in more))
    assert "\n" not in str(refused.value.code) and not (arms / "out" / "table.md").exists()
