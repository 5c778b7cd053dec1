"""A table as Markdown, CSV, LaTeX and JSON: exact lines, what is left empty, names that hold a layout's own marks."""

import csv
import io
import re
import shutil
import subprocess

import pytest
from hand_made_tables import ACCURACY, POPE, many_benchmarks, one_benchmark, renamed, value

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.report.tables.layouts.csv import to_csv
from prunetune.evaluation.report.tables.layouts.files import write_layouts
from prunetune.evaluation.report.tables.layouts.grid import written_p
from prunetune.evaluation.report.tables.layouts.json import to_json
from prunetune.evaluation.report.tables.layouts.latex import to_latex
from prunetune.evaluation.report.tables.layouts.markdown import to_markdown
from prunetune.evaluation.report.tables.table import Table


def test_one_benchmark_in_markdown():
    assert to_markdown(one_benchmark()).splitlines() == [
        "| arm | visual tokens | where (%) | what (%) | world accuracy (%) | of dense (%) "
        "| tuned - training-free (points) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 576 | 90.0 | 80.2 | 85.1 [83.0, 87.0] | 100.0 |  |",
        "| divprune | 64 | 60.0 | 41.0 | 50.5 [48.0, 53.0] | 59.3 |  |",
        "| divprune + tuned projector | 64 | 72.0 | 50.5 | 61.2 [59.0, 63.5] | 72.0 "
        "| **+10.8** [+8.0, +13.5], p < 0.001 |",
        "",
        "- world accuracy: share of right answers (1,200 questions)",
        "- in brackets: 95 % interval",
        "- p: after Holm's correction over all differences of the table (McNemar, exact); bold below 0.05",
    ]


def test_many_benchmarks_in_markdown():
    lines = to_markdown(many_benchmarks()).splitlines()
    assert lines[:3] == [
        "# Main table",
        "",
        "| arm | visual tokens | pope f1 (%) | pope accuracy, hard part (%) | mme perception (points) "
        "| chair chairs (%) ↓ | coco cider | vqav2 accuracy (%) | relative average (%) "
        "| tuned - training-free, relative average (points) | pooled accuracy (%) |",
    ]
    assert lines[4:8] == [
        "| dense | 576 | 85.9 [84.9, 86.9] | 61.0 [57.0, 65.0] | 1506.5 [1486.5, 1526.5] | 48.2 [46.2, 50.2] | 1.105¹ "
        "| —² | 100.0 |  | 80.4 [79.9, 81.0] |",
        "| divprune | 64 | 70.2 [69.2, 71.2] | 40.1 [36.0, 44.0] | 1205.5 [1185.5, 1225.5] | 52.2 [50.2, 54.2] "
        "| 0.950¹ | —² | 81.4 [80.0, 83.0] |  | 70.0 [69.4, 70.6] |",
        "| divprune + tuned projector | 64 | 80.5 ± 0.3 [79.5, 81.5] | 51.0 [47.0, 55.0] | 1402.2 [1382.2, 1422.2] "
        "| 49.0 [47.0, 51.0] | 1.051¹ | —² | 92.8 [91.5, 94.2] | **+11.4** [+10.0, +12.9], p = 0.025 "
        "| 75.5 [75.0, 76.0] |",
        "| DivPrune (quoted: arXiv 2503.02175, table 1) | 64 | 70.1 (+0.1) |  | 1200.04 (+5.5) |  |  |  | 81 |  |  |",
    ]
    assert lines[9:11] == ["- ¹ one score for the whole set", "- ² hidden answers: vqav2_upload.json"]
    assert "- ±: standard deviation over 3 trainings; intervals are over images alone" in lines
    assert lines[-3:] == [
        "- quoted rows: the paper's number, and in parentheses our row's minus it",
        "- a quoted relative average is the paper's own, as it defines it",
        "- arms may differ in device: cpu, cuda",
    ]


def test_columns_that_are_asked_for():
    header = to_markdown(many_benchmarks(), also=["pope/accuracy", "TFLOPs"]).splitlines()[2]
    assert "| pope accuracy (%) | mme" in header and "| TFLOPs ↓ | pooled accuracy (%) |" in header
    lines = to_markdown(many_benchmarks(), also=["pope/f1 gain"]).splitlines()
    assert (
        "| pope f1, tuned - training-free (points) | mme" in lines[2]
        and "| **+10.2** [+9.0, +11.5], p < 0.001 |" in lines[6]
    )
    table = one_benchmark(columns=[ACCURACY, POPE])
    assert "world where" not in to_markdown(table)
    assert "| world where (%) | world what (%) | world accuracy (%) |" in to_markdown(
        table, also=["world/accuracy kinds"]
    )
    with pytest.raises(TaskError, match="no column 'pope/recall'; it has pope/f1, pope/f1 gain, pope/accuracy, mme"):
        to_markdown(many_benchmarks(), also=["pope/recall"])


def test_without_a_dense_row_the_gain_is_of_what_there_is():
    """The relative average needs one; of several benchmarks the pooled accuracy's gain is left, under that name."""
    table = many_benchmarks(quoted=[])
    rows = [row.model_copy(update={"relative": None, "relative_gain": None}) for row in table.rows[1:]]
    lines = to_markdown(table.model_copy(update={"rows": rows})).splitlines()
    assert "relative" not in lines[2] and "| tuned - training-free, pooled accuracy (points) |" in lines[2]
    assert lines[5].endswith("| +5.5 [+5.0, +6.0] | 75.5 [75.0, 76.0] |")  # no test, so nothing is marked


def test_a_difference_is_marked_by_its_adjusted_p_alone():
    table = one_benchmark()
    tuned = table.rows[2]
    for p, adjusted, text in ((0.001, 0.05, "+10.8 [+8.0, +13.5], p = 0.050"),
                              (0.01, 0.0499, "**+10.8** [+8.0, +13.5], p = 0.050"),
                              (0.001, None, "+10.8 [+8.0, +13.5]")):  # fmt: skip
        gain = tuned.gains["world/accuracy"].model_copy(update={"p": p, "adjusted": adjusted})
        row = tuned.model_copy(update={"gains": {"world/accuracy": gain}})
        last = to_markdown(table.model_copy(update={"rows": [row]})).splitlines()[2]
        assert last.endswith(f"| {text} |")
    assert written_p(0.0004) == "p < 0.001" and written_p(None) == ""


def test_marks_of_markdown_in_names_stay_text():
    text = to_markdown(renamed(many_benchmarks(), "a|b `c` **d** <img> _e_ f_g \\ \n h"))
    shown = r"a\|b \`c\` \*\*d\*\* \<img> \_e\_ f_g \\ h"
    assert text.splitlines()[0] == f"# {shown}"
    assert f"| dense {shown} | 576 |" in text and f"| {shown} (quoted: {shown}) | 64 |" in text
    unescaped = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in unescaped}) == 1 and len(unescaped) == 6


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_every_number():
    dense, free, tuned, quoted = read(to_csv(many_benchmarks()))
    assert list(dense)[:12] == ["id", "arm", "model", "method", "budget", "kept", "projector", "twin", "pope/f1",
                                "pope/f1 low", "pope/f1 high", "pope/f1 seeds"]  # fmt: skip
    assert dense["pope/f1"] == "85.9000" and dense["pope/f1 gain"] == "" and dense["vqav2/accuracy"] == ""
    assert dense["vqav2/accuracy note"] == "hidden answers: vqav2_upload.json"
    assert (tuned["pope/f1 seeds"], tuned["pope/f1 between"]) == ("3", "0.3400")
    assert (tuned["pope/f1 gain"], tuned["pope/f1 gain low"], tuned["pope/f1 gain high"]) == (
        "10.2500", "9.0000", "11.5000")  # fmt: skip
    assert (tuned["pope/f1 gain p"], tuned["mme/perception gain adjusted"]) == ("0.0004", "0.08")
    assert tuned["mme/perception gain test"] == "paired permutation"
    assert tuned["relative gain high"] == "12.9000" and tuned["relative gain adjusted"] == "0.0246"
    assert tuned["pooled gain"] == "5.5000" and "pooled gain p" not in tuned
    assert free["pope hard low"] == "36.0000" and free["prefill ms high"] == "16.0000"
    assert free["model"] == "llava" and free["fact model"] == "llava-hf/llava-1.5-7b-hf" and free["profile"] == ""
    assert tuned["folders"] == "arms/tuned-0; arms/tuned-1"
    assert quoted["pope/f1"] == "70.1" and quoted["mme/perception"] == "1200.04" and quoted["pope/f1 low"] == ""
    assert quoted["pope/f1 ours minus quoted"] == "0.1500" and quoted["quoted"] == "arXiv 2503.02175, table 1"
    assert quoted["id"] == "" and quoted["beside"] == "free" and quoted["relative"] == "81"


def test_csv_of_kinds_and_of_tiny_p():
    free, tuned = read(to_csv(one_benchmark()))[1:]
    assert free["world/accuracy [what]"] == "41.0000"
    assert tuned["world/accuracy gain adjusted"] == "4e-09"


def test_quotes_and_lines_in_names_come_back_from_csv():
    text = 'a "quoted", name\nin two lines'
    rows = read(to_csv(renamed(one_benchmark(), text)))
    assert [row["arm"] for row in rows] == [f"dense {text}", f"divprune {text}", f"divprune + tuned projector {text}"]


# ---- LaTeX -----------------------------------------------------------------------------------------------------------


def cells_of(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]


def test_one_benchmark_in_latex():
    lines = to_latex(one_benchmark(), caption="Small", label="tab:small").splitlines()
    assert lines[1:6] == [
        r"\begin{table*}",
        r"  \centering\small\setlength{\tabcolsep}{4pt}",
        r"  \caption{Small}\smallskip",
        r"  \label{tab:small}",
        r"  \begin{tabular}{lrrrr@{\,}lrr@{\,}l}",
    ]
    assert [cells_of(line) for line in lines[7:9]] == [
        ["arm", "tokens", "where", "what", r"\multicolumn{2}{c}{world accuracy}", "of dense",
         r"\multicolumn{2}{c}{tuned - training-free}"],
        ["", "", r"\%", r"\%", r"\multicolumn{2}{c}{\%}", r"\%", r"\multicolumn{2}{c}{points}"],
    ]  # fmt: skip
    assert [cells_of(line) for line in lines[11:13]] == [
        ["divprune", "64", "60.0", "41.0", "50.5", r"{\scriptsize [48.0, 53.0]}", "59.3", "", ""],
        ["divprune + tuned projector", "64", r"\textbf{72.0}", r"\textbf{50.5}", r"\textbf{61.2}",
         r"{\scriptsize [59.0, 63.5]}", r"\textbf{72.0}", "+10.8",
         r"$^{*}${\scriptsize [+8.0, +13.5] p \textless{} 0.001}"],
    ]  # fmt: skip
    assert lines[-1] == r"\end{table*}" and r"asterisk below 0.05\par" in lines[-3]


def test_the_best_tuned_row_of_a_budget_is_bold():
    """Of two tuned rows at 64 tokens; less is better in CHAIR, and 1402.2 twice is bold twice."""
    table = many_benchmarks()
    second = table.rows[2].model_copy(
        update={
            "id": "elastic", "projector": "elastic", "label": "divprune + elastic projector",
            "values": {**table.rows[2].values, "pope/f1": value(81), "chair/chairs": value(50),
                       "mme/perception": value(1402.246)},
        }
    )  # fmt: skip
    lines = to_latex(table.model_copy(update={"rows": [*table.rows, second]})).splitlines()
    tuned = next(cells_of(line) for line in lines if line.strip().startswith("divprune + tuned"))
    elastic = next(cells_of(line) for line in lines if line.strip().startswith("divprune + elastic"))
    assert tuned[2] == "80.5" and elastic[2] == r"\textbf{81.0}"
    assert r"\textbf{49.0}" in tuned and "50.0" in elastic
    assert r"\textbf{1402.2}" in tuned and r"\textbf{1402.2}" in elastic
    assert r"\textbf" not in "".join(line for line in lines if line.strip().startswith(("dense", "divprune &")))


def test_a_papers_whole_number_stands_at_the_same_point():
    line = next(line for line in to_latex(many_benchmarks()).splitlines() if "quoted:" in line)
    assert cells_of(line)[2:4] == ["70.1", r"{\scriptsize (+0.1)}"] and r"81\phantom{.0}" in cells_of(line)


@pytest.mark.parametrize("intervals", [True, False])
@pytest.mark.parametrize("table", [one_benchmark(), many_benchmarks()], ids=["one", "many"])
def test_every_line_of_latex_fits_its_columns(table, intervals):
    text = to_latex(renamed(table, r"50 % & a_b #1 $x$ {y} ~ ^ \z < > [w] ±"), intervals=intervals)
    check_latex(text)
    assert r"50 \% \& a\_b \#1 \$x\$ \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z" in text


def check_latex(text):
    """What would stop LaTeX: unbalanced braces, an environment left open, a row with too many columns."""
    bare = re.sub(r"\\[\\&%$#_{}]", "", re.sub("(?m)^%.*$", "", text))
    depth = 0
    for mark in bare:
        depth += {"{": 1, "}": -1}.get(mark, 0)
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0 and not set(bare) & set("%#~")
    opened = re.findall(r"\\(begin|end)\{(.*?)\}", text)
    assert opened == [("begin", "table*"), ("begin", "tabular"), ("end", "tabular"), ("end", "table*")]
    (layout,) = re.findall(r"\\begin\{tabular\}\{(.*)\}\n", text)
    width = len(re.sub(r"@\{\\,\}", "", layout))
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    for row in rows:
        assert sum(2 if r"\multicolumn{2}" in cell else 1 for cell in cells_of(row)) == width, row
    assert len(rows) >= 5


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path):
    tables = [
        renamed(table, r"50 % & a_b #1 $x$ {y} ~ ^ \z < > [w] ±") for table in (one_benchmark(), many_benchmarks())
    ]
    drawn = "\n".join(to_latex(table) for table in [one_benchmark(), many_benchmarks(), *tables])
    (tmp_path / "main.tex").write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{drawn}\\end{{document}}\n"
    )
    done = subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "main.tex"], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "main.pdf").stat().st_size > 0, done.stdout[-2000:]


# ---- JSON, and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [one_benchmark(), many_benchmarks()], ids=["one", "many"])
def test_json_gives_back_the_same_table(table):
    assert Table.model_validate_json(to_json(renamed(table, '"quoted" <b> é'))) == renamed(table, '"quoted" <b> é')
    third = table.rows[0].model_copy(update={"kept": 1 / 3})
    assert Table.model_validate_json(to_json(table.model_copy(update={"rows": [third]}))).rows[0].kept == 1 / 3


def test_files_of_the_layouts(tmp_path):
    table = many_benchmarks()
    written = write_layouts(table, tmp_path, also=["TFLOPs"])
    assert [path.name for path in written] == ["table.md", "table.csv", "table.tex", "table.json"]
    assert "TFLOPs" in written[0].read_text() and written[3].read_text() == to_json(table)
    with pytest.raises(TaskError, match="'word' is no layout of a table; choose among markdown, csv, latex, json"):
        write_layouts(table, tmp_path / "absent", layouts=["csv", "word"])
