"""Rows from papers: under the very metric that they have, beside our row of the same setting, and nowhere else."""

import csv
import json
import re

import pytest
from conftest import ROOT
from synthetic_arms import questions, register, says, write_arm

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.quoted import (
    COLUMNS,
    PAPERS,
    Quote,
    beside,
    known_methods,
    known_metrics,
    papers,
    plain_model,
    read_quoted,
)
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.report.tables.table import Column, Row, Table, Value
from prunetune.evaluation.tasks import tasks
from prunetune.pruning import registered_methods, registered_stages

TEXTS = ROOT.parent / "shared" / "papers"
FEW = questions(36)
KEY = "few/accuracy"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def table(tmp_path):
    """A dense arm, two pruned ones and a tuned one of LLaVA-1.5-7B, on a benchmark with one metric."""
    model = "llava-hf/llava-1.5-7b-hf"
    folders = [write_arm(tmp_path / "dense", {"few": (FEW, says(36, 36))}, model=model)]
    for name, spec, adapter, right in (
        ("free64", ("divprune", 64), None, 18),
        ("free128", ("divprune", "22.2%"), None, 27),
        ("tuned64", ("divprune", 64), "a", 30),
    ):
        answers = {"few": (FEW, says(right, 36))}
        folders.append(write_arm(tmp_path / name, answers, spec, adapter, model=model))
    return compare(folders)


def quote(**changed):
    values = {"arm": "DivPrune (CVPR25)", "kept": 64, "values": {KEY: 45.5}, "cite": "a paper, table 1",
              "model": "LLaVA-1.5-7B", "method": "divprune"}  # fmt: skip
    return Quote(**{**values, **changed})


# ---- where a quoted value goes ---------------------------------------------------------------------------------


def test_our_row_of_the_same_setting_stands_beside_and_differs_by_what_it_says(table):
    quotes = [quote(), quote(kept=128), quote(projector="tuned", relative=95.5), quote(kept=32)]
    quotes += [quote(method="vispruner", arm="VisPruner"), quote(arm="LLaVA-1.5-7B", method="dense", kept=576)]
    found = beside(table, quotes)
    assert found.rows == table.rows
    expected = [("divprune-64", 50 - 45.5), ("divprune-22.2%", 75 - 45.5), ("divprune-tuned-projector-64", None),
                (None, None), (None, None), ("dense", 100 - 45.5)]  # fmt: skip
    for row, (name, difference) in zip(found.quoted, expected, strict=True):
        assert row.beside == name and row.values == {KEY: 45.5}
        if difference is not None:
            assert row.differences == {KEY: pytest.approx(difference)}
    assert found.quoted[2].relative == 95.5 and found.quoted[2].differences[KEY] == pytest.approx(100 * 30 / 36 - 45.5)
    text = to_markdown(found)
    assert "| DivPrune (CVPR25) (quoted: a paper, table 1) | 64 | 45.5 (+4.5) |" in text


def test_a_value_of_another_metric_stands_nowhere(table):
    found = beside(table, [quote(values={KEY: 45.5, "pope/f1": 80.0, "gqa/accuracy": 57.0})])
    assert found.quoted[0].values == {KEY: 45.5}
    found = beside(table, [quote(), quote(model="LLaVA-1.5-13B"), quote(values={"pope/accuracy": 80.0})])
    assert len(found.quoted) == 1
    with pytest.raises(TaskError, match="no quoted row is of a model and a column of this table"):
        beside(table, [quote(model="LLaVA-1.5-13B")])


def test_a_row_without_a_model_is_shown_and_compared_with_none(table):
    (row,) = beside(table, [quote(model="")]).quoted
    assert row.values == {KEY: 45.5} and row.beside is None and row.differences == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": {"overall": 96.9}}, "'overall' is no metric of a benchmark; .* relative average as relative"),
        ({"values": {"poep/f1": 80.0}}, "unknown benchmark 'poep', did you mean 'pope'"),
        ({"values": {"pope/acuracy": 80.0}}, "pope has no metric 'acuracy', did you mean 'accuracy'.; it has pope/acc"),
        ({"values": {"pope": 80.0}}, "pope has no metric ''; it has pope/accuracy, pope/f1"),
        ({"method": "divprun"}, "unknown method 'divprun', did you mean 'divprune'"),
    ],
)
def test_unknown_names_stop_in_one_line_with_the_nearest(table, changed, message):
    with pytest.raises(TaskError, match=message) as refused:
        beside(table, [quote(**changed)])
    assert "\n" not in str(refused.value) and "a paper, table 1" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("LLaVA-1.5-7B", "llava-1.5-7b"),
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"),
        ("liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        ("LLaVA-NeXT-7B", "llava-1.6-7b"),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-1.6-7b"),
        ("LLaVA-1.6-13B", "llava-1.6-13b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
        ("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava-next-video-7b"),
    ],
)
def test_models_have_one_name(name, plain):
    assert plain_model(name) == plain


def test_budgets_of_crops_are_counted_as_papers_do():
    """128 for each of five crops of LLaVA-1.6 is what papers call 640, and so is 22.2 %."""
    column = Column(task="few", metric="accuracy", unit="%", about="", items=36)
    rows = []
    for name, keep in (("a", "128"), ("b", '"22.2%"'), ("c", "64"), ("d", "0.2222")):
        pruning = f'{{"keep": {keep}, "scope": "item"}}'
        rows.append(Row(id=name, label=name, model="llava-hf/llava-v1.6-vicuna-7b-hf", method="divprune", budget="x",
                        kept=600, projector="training-free", values={KEY: Value(value=1.0)},
                        facts={"pruning": pruning}))  # fmt: skip
    for row, expected in zip(rows, ("a", None, None, "d"), strict=True):
        found = beside(Table(title="", columns=[column], rows=[row]), [quote(model="LLaVA-NeXT-7B", kept=640)])
        assert found.quoted[0].beside == expected  # 22.2 % of 2880 are 639


@pytest.mark.parametrize(
    ("pruning", "projector", "name"),
    [
        ({"options": {}, "choose_with": "tuned"}, "tuned", "ours"),
        ({"options": {"important_ratio": 0.3}, "choose_with": "tuned"}, "tuned", None),
        ({"options": {}, "choose_with": "original"}, "tuned", None),
        ({"options": {}, "choose_with": "original"}, "training-free", "ours"),
        ({"options": {}, "choose_with": "tuned", "profile": "fitted"}, "training-free", None),
    ],
)
def test_a_method_with_other_options_than_its_paper_s_has_no_quoted_row(pruning, projector, name):
    column = Column(task="few", metric="accuracy", unit="%", about="", items=36)
    facts = {"pruning": json.dumps({"keep": 64, "scope": "item", **pruning})}
    row = Row(id="ours", label="x", model="llava-hf/llava-1.5-7b-hf", method="divprune", budget="64", kept=64,
              projector=projector, values={KEY: Value(value=50.0)}, facts=facts)  # fmt: skip
    (found,) = beside(Table(title="", columns=[column], rows=[row]), [quote(projector=projector)]).quoted
    assert found.beside == name and found.values == {KEY: 45.5} and bool(found.differences) == (name is not None)


# ---- files -----------------------------------------------------------------------------------------------------


def test_a_yaml_list_and_a_csv_file_hold_the_same(tmp_path):
    (tmp_path / "q.yaml").write_text(
        "- {arm: theirs, kept: 64, values: {gqa/accuracy: 57.5, pope/f1: 85.5}, cite: 'P, table 1', model: M, "
        "method: divprune, relative: 96.9}\n"
    )
    lines = [",".join(COLUMNS), "P,1,M,divprune,theirs,training-free,64,gqa,accuracy,57.5,96.9,",
             "P,1,M,divprune,theirs,training-free,64,pope,f1,85.5,96.9,as printed"]  # fmt: skip
    (tmp_path / "q.csv").write_text("\n".join(lines) + "\n")
    assert read_quoted(tmp_path / "q.csv") == read_quoted(tmp_path / "q.yaml")
    for number, line, message in (
        (2, lines[2].replace("85.5", "high"), "line 3: value is a number, got 'high'"),
        (2, lines[1], "line 3: gqa/accuracy or the relative average stands there twice"),
        (2, lines[2].replace("96.9", "90"), "line 3: pope/f1 or the relative average stands there twice"),
        (2, lines[2].replace("training-free", "free"), "line 3: projector is one of training-free, tuned"),
        (2, lines[2] + ",more", "line 3: it has another number of cells"),
        (0, lines[0].replace("paper", "papers"), "has other columns than paper, table"),
    ):
        (tmp_path / "w.csv").write_text("\n".join([*lines[:number], line, *lines[number + 1 :]]) + "\n")
        with pytest.raises(TaskError, match=message) as refused:
            read_quoted(tmp_path / "w.csv")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {arm: x, kept: 1}", "row 1: a quoted row has exactly arm, kept, values and cite"),
        ("- {arm: x, kept: 1, values: {}, cite: y, colour: z}", "a quoted row has exactly"),
        ("- {arm: x, kept: many, values: {}, cite: y}", "kept is a number of visual tokens, got 'many'"),
        ("- {arm: x, kept: 1, values: [1], cite: y}", "values are numbers by column"),
        ("- {arm: x, kept: 1, values: {pope/f1: high}, cite: y}", "the value of pope/f1 is a number, got 'high'"),
        ("- {arm: x, kept: 1, values: {}, cite: y, relative: true}", "relative is a number in percent"),
        ("- {arm: x, kept: 1, values: {}, cite: y, projector: mine}", "projector is one of training-free"),
        ("{}", "must hold a list of quoted rows"),
    ],
)
def test_a_row_that_can_not_be_read_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "q.yaml").write_text(text)
    with pytest.raises(TaskError, match=message) as refused:
        read_quoted(tmp_path / "q.yaml")
    assert "\n" not in str(refused.value)
    with pytest.raises(TaskError, match="visprune is neither a file nor a paper .* did you mean 'vispruner'"):
        read_quoted("visprune")


# ---- what ships ------------------------------------------------------------------------------------------------


def test_the_names_of_methods_are_those_that_are_registered():
    assert known_methods() - {"dense"} == {*registered_methods(), *registered_stages()} - {"identity"}
    assert {"divprune", "visionzip", "prumerge_plus", "trimtokenator"} <= known_methods()


def test_every_shipped_value_is_of_a_metric_and_a_method_that_are_here():
    assert papers() == ["adaptive", "crisprune", "prismprune", "trimtokenator", "vispruner"]
    metrics, methods = known_metrics(), known_methods()
    for name in papers():
        quotes = read_quoted(name)
        assert len(quotes) > 20
        for one in quotes:
            assert one.method in {*methods, ""} and one.model and re.search(r", table \d+$", one.cite)
            for key in one.values:
                task, metric = key.split("/")
                assert task in tasks() and metric in metrics[task], key


@pytest.mark.skipif(not TEXTS.is_dir(), reason="the papers' texts are not here")
@pytest.mark.parametrize(
    ("paper", "table", "arm", "kept", "key", "line"),
    [
        ("vispruner", 1, "VisPruner (Ours)", 64, "pope/f1", "VisPruner (Ours) 72.7 55.4 53.3 69.1 55.8 80.4"),
        ("vispruner", 1, "ToMe (ICLR23)", 128, "gqa/accuracy", "ToMe [4] (ICLR23) 63.0 52.4"),
        ("vispruner", 2, "VisionZip (CVPR25)", 160, "textvqa/accuracy", "VisionZip [59] (CVPR25) 67.3 54.3 54.7"),
        ("prismprune", 1, "PrismPrune†", 32, "gqa/accuracy", "PrismPrune [†] 1428.0 56.9 70.9 59.0 57.1"),
        ("prismprune", 5, "PrismPrune† (Original FT)", 64, "mme/perception", "PrismPrune [†] (Original FT) 1424.1"),
        ("prismprune", 3, "PrismPrune", 160, "mmbench_cn/accuracy", "PrismPrune 1457.5 58.7 70.0 61.9"),
        ("crisprune", 1, "CDPruner(NeurIPS25)", 32, "mmvet/accuracy", "CDPruner(NeurIPS25) 1373.0 53.2 69.5 27.8"),
        ("crisprune", 8, "CrisPrune", 320, "scienceqa/image_accuracy", "CrisPrune 1523.3 60.7 70.7"),
        ("trimtokenator", 1, "DivPrune", 64, "chartqa/accuracy", "DivPrune 15.84"),
        ("trimtokenator", 3, "TrimTokenator (Ours)", 640, "mme/perception", "Ours 43.72 0.99 1492.60"),
        ("adaptive", 7, "Adaptive thresholding (Ours)", 64, "mme/total", "Ours 75.5 57.4 54.0 68.6 56.0 84.1 1703"),
        ("adaptive", 8, "FasterVLM (arXiv'24)", 128, "chair/C_S", "FasterVLM (arXiv'24) 45.4 13.5 69.3 94.0 45.8"),
        ("adaptive", 14, "DivPrune (CVPR'25)", 64, "pope/f1", "DivPrune (CVPR'25) 75.2 57.9 54.4 71.7 57.4 84.5"),
    ],
)
def test_shipped_values_are_those_that_the_papers_print(paper, table, arm, kept, key, line):
    """The last number of each line, which is looked up in the paper's text."""
    names = {"prismprune": "prismprune_supplement", "adaptive": "adaptive_pruning_study"}
    text = re.sub(r"<[^>]*>|\*\*", "", (TEXTS / f"{names.get(paper, paper)}.txt").read_text())
    assert line in re.sub(r"\s+", " ", text.replace("^", ""))
    (found,) = [one for one in read_quoted(paper) if (one.arm, one.kept) == (arm, kept)
                and one.cite.endswith(f"table {table}")]  # fmt: skip
    assert found.values[key] == float(line.split()[-1])


def test_values_in_other_units_say_how_they_are_printed():
    for name in papers():
        for line in csv.DictReader((PAPERS / f"{name}.csv").open(encoding="utf-8")):
            if (line["task"], line["metric"]) in (
                ("ocrbench", "score"),
                ("coco_caption", "CIDEr"),
                ("nocaps", "CIDEr"),
            ):
                factor = 10 if line["task"] == "ocrbench" else 100
                printed = re.search(r"printed ([\d.]+)$", line["note"])
                assert float(line["value"]) == pytest.approx(factor * float(printed[1]))
            else:
                assert "printed" not in line["note"]


def test_a_shipped_paper_stands_beside_our_rows(tmp_path):
    """Of a model of the papers, with our DivPrune at 64 tokens beside theirs, under POPE's F1."""
    model = "llava-hf/llava-1.5-7b-hf"
    columns = [Column(task="pope", metric="f1", unit="%", about="", items=9000),
               Column(task="pope", metric="accuracy", unit="%", about="", items=9000, headline=False)]  # fmt: skip
    values = {"pope/f1": Value(value=86.0), "pope/accuracy": Value(value=86.5)}
    row = Row(id="ours", label="divprune", model=model, method="divprune", budget="64", kept=64,
              projector="training-free", values=values, facts={"pruning": '{"keep": 64, "scope": "item"}'})  # fmt: skip
    found = beside(Table(title="", columns=columns, rows=[row]), read_quoted("crisprune")).quoted
    assert {one.model for one in found} == {"LLaVA-1.5-7B"} and all(set(one.values) <= {"pope/f1"} for one in found)
    (own,) = [one for one in found if one.beside]
    assert own.values["pope/f1"] == 85.5 and own.differences == {"pope/f1": pytest.approx(0.5)}
    assert own.relative == 94.7 and own.cite == "CrisPrune, table 1"
