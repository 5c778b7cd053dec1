"""Rules by name: the same answers scored as several published programs score them; expected numbers are by hand."""

import json

import pytest
from benchmark_files import FILES, S, write, write_lines
from test_scored_once import stub

from prunetune.cli import main
from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.records import read_manifest, read_results
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.grader import Grader, read_choice
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import Item, TaskError, get_task, mmbench, tasks


def wide(text):
    return "".join(chr(ord(letter) + 0xFEE0) for letter in text)


def scores(name, said, answer):
    """What each protocol of a benchmark gives an answer."""
    task, item = get_task(name), Item("1", "s", "x.png", "?", answer)
    return {one: task.under(one).score(said, item).score for one in (task.protocol, *task.others)}


@pytest.mark.parametrize(
    ("said", "people", "lmms", "official"),
    [
        ("Yes.", ["yes"] * 10, 1, 1),
        ("Red wine", ["Red wine."] * 10, 1, 0),  # all agree: vqaEval leaves the answer as it is
        ("t-shirt", ["t-shirt"] * 10, 1, 0),
        ("t-shirt", ["t-shirt"] * 9 + ["shirt"], 1, 1),
        ("men's", ["men's"] * 9 + ["men"], 1, 0),  # LLaVA's conversion splits it, and nobody splits people's
        ("men's", ["men 's"] * 9 + ["men"], 0, 1),
        ("two", ["two"] * 9 + ["2"], 1, 0.3),  # people's number words stay words
        ("dog", ["the dog"] * 9 + ["dog"], 1, 0.3),
        ("dog", ["Dog"] * 9 + ["dog"], 1, 0.3),
        ("red,white", ["red white"] * 9 + ["red"], 1, 0),  # the conversion drops a comma, the processor spaces it
        ("1,000", ["1,000"] * 9 + ["1000"], 1, 1),
        ("no", ["yes"] * 8 + ["no"] * 2, 0.6, 0.6),
    ],
)
def test_vqav2_by_two_rules(said, people, lmms, official):
    assert scores("vqav2", said, people) == {"lmms-eval": pytest.approx(lmms), "official": pytest.approx(official)}


@pytest.mark.parametrize(
    ("said", "answer", "formula", "lmms", "official"),
    [
        (f"It says {wide('ABC12')}", "abc12", False, 1, 0),
        ("stop\u3000now", "stop now", False, 1, 0),
        ("the word STOP", wide("stop"), False, 1, 0),
        ("x\u00b2", "x2", False, 0, 0),  # nothing wider: NFKC would make them the same
        (f"x ^ {wide('2')}", "x^2", True, 0, 0),  # formulas are not folded
        ("X ^ 2", "X^2", True, 1, 1),
        ("Stop", "stop", False, 1, 1),
    ],
)
def test_ocrbench_by_two_rules(said, answer, formula, lmms, official):
    expected = {"lmms-eval": lmms, "official": official}
    assert scores("ocrbench", said, {"any": [answer], "formula": formula}) == expected


def test_a_protocol_has_the_benchmark_by_another_name():
    for name, task in tasks().items():
        assert task.under(None) is task and task.under(task.protocol) is task and "@" not in name
        for protocol in task.others:
            other = get_task(f"{name}@{protocol}")
            assert (other.name, other.protocol) == (f"{name}@{protocol}", protocol)
            assert (other.readers, other.prompt) == (task.readers, task.prompt)
            assert [one.name for one in other.scorer.metrics] == [one.name for one in task.scorer.metrics]
    with pytest.raises(TaskError, match=r"vqav2 is scored by protocol 'lmms-eval' or 'official', not 'llava'"):
        get_task("vqav2@llava")
    with pytest.raises(TaskError, match="gqa is scored by protocol 'llava', not 'official'"):
        get_task("gqa@official")


def test_score_takes_a_protocol_and_says_which(tmp_path, capsys):
    FILES["vqav2"](tmp_path / "data")
    annotations = tmp_path / "data" / "v2_mscoco_val2014_annotations.json"
    content = json.loads(annotations.read_text())
    for record in content["annotations"]:
        record["answers"] = [{"answer": "men's"}] * 9 + [{"answer": "men"}]
    annotations.write_text(json.dumps(content))
    rows = [{"task": "vqav2", "id": str(n), "question": "", "prediction": "men's"} for n in range(12)]
    write_lines(tmp_path / "results.jsonl", rows)
    found = {}
    for protocol in ("lmms-eval", "official"):
        main(["score", "vqav2", "--predictions", str(tmp_path / "results.jsonl"), "--data", str(tmp_path / "data"),
              "--protocol", protocol])  # fmt: skip
        found[protocol] = json.loads(capsys.readouterr().out)
    assert {name: one["accuracy"] for name, one in found.items()} == {"lmms-eval": 100, "official": 0}
    assert [one["protocol"] for one in found.values()] == ["lmms-eval", "official"]
    assert not found["lmms-eval"]["notes"] and "vqaEval" in found["official"]["notes"][0]
    # A row of one protocol is an answer to the benchmark all the same.
    write_lines(tmp_path / "again.jsonl", [row | {"task": "vqav2@official"} for row in rows])
    assert score_file("vqav2", tmp_path / "again.jsonl", tmp_path / "data")["accuracy"] == 100


def test_an_arm_records_its_protocol_and_is_compared_under_no_other(tmp_path):
    FILES["vqav2"](tmp_path / "data" / "vqav2")
    folders = []
    for name in ("vqav2", "vqav2@official"):
        output, data = str(tmp_path / name), str(tmp_path / "data")
        config = EvaluateConfig(model=ModelConfig(path="none"), tasks=[name], batch_size=4, data=data, output=output)
        folders.append(evaluate(config, stub(config)))
    assert read_manifest(folders[1]).tasks["vqav2@official"].protocol == "official"
    assert {row.task for row in read_results(folders[1])} == {"vqav2@official"}
    compare([folders[1]])  # which scores the rows once more, by the rules of their name
    with pytest.raises(TaskError, match="differ in tasks"):
        compare(folders)


def test_testdevs_upload_holds_all_of_test2015(tmp_path, capsys):
    FILES["vqav2_testdev"](tmp_path / "data")
    config = EvaluateConfig(model=ModelConfig(path="none"), tasks=["vqav2_testdev"], batch_size=4,
                            data=str(tmp_path / "data"), output=str(tmp_path / "arm"))  # fmt: skip
    folder = evaluate(config, stub(config))
    upload = folder / "vqav2_evalai.json"
    assert len(json.loads(upload.read_text())) == 12
    assert "lacks llava_vqav2_mscoco_test2015.jsonl" in capsys.readouterr().out
    every = [{"question_id": n, "image": "x.jpg", "text": f"what ?\n{S}"} for n in range(30, -1, -1)]
    write_lines(tmp_path / "data" / "llava_vqav2_mscoco_test2015.jsonl", every)
    evaluate(config, stub(config))  # the answers are there: the file alone is written again
    rows = json.loads(upload.read_text())
    assert sorted(row["question_id"] for row in rows) == list(range(31))
    assert {row["question_id"]: row["answer"] for row in rows} == {n: "yes" if n < 12 else "" for n in range(31)}


def test_mme_asks_with_its_double_spaces_and_knows_questions_without(tmp_path):
    folder = tmp_path / "data" / "MME_Benchmark_release_version" / "OCR"
    folder.mkdir(parents=True)
    asked = "Does this artwork  exist in the form of  painting?"
    (folder / "1.txt").write_text(f"{asked} Please answer yes or no.\tYes\n")
    (item,) = get_task("mme").read(tmp_path / "data")
    assert item.question == f"{asked}\n{S}"
    assert item.id == "OCR/1/Does this artwork exist in the form of painting?"
    for prompt in (f"{asked}\n{S}", f"{' '.join(asked.split())}\n{S}"):  # LLaVA's file, and one of ours of before
        write_lines(tmp_path / "a.jsonl", [{"question_id": "OCR/1.jpg", "prompt": prompt, "text": "Yes"}])
        assert score_file("mme", tmp_path / "a.jsonl", tmp_path / "data")["perception"] == 200


def test_textvqa_is_capitalised_the_same_in_every_layout(tmp_path):
    question = "what does NASA say? who"
    annotation = {"image_id": "img", "question": question, "answers": ["x"] * 10}
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [annotation]})
    text = f"What does NASA say? Who\nReference OCR token: NASA, B\n{S}"
    write_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl",
                [{"question_id": "img", "image": "img.jpg", "text": text}])  # fmt: skip
    row = {"image_id": "img", "question": question, "answers": ["x"] * 10, "ocr_tokens": ["NASA", "B"]}
    for name, ocr in (("textvqa", "Reference OCR token: NASA, B\n"), ("textvqa_no_ocr", "")):
        task = get_task(name)
        (item,) = task.read(tmp_path)
        assert item.question == task.readers[1].item(row, 0).question == f"What does nasa say? who\n{ocr}{S}"


@pytest.mark.parametrize(
    ("cells", "asked", "options"),
    [
        ({"A": "red", "B": "None", "C": "blue"}, "Which?\nA. red", {"A": "red"}),
        ({"A": "1", "B": "NA", "C": ""}, "Which?\nA. 1", {"A": "1"}),
        ({"A": "1", "B": "2", "C": "NONE", "hint": "N/A"}, "Which?\nA. 1\nB. 2", {"A": "1", "B": "2"}),
        (
            {"A": "1", "B": "none of these", "C": None},
            "Which?\nA. 1\nB. none of these",
            {"A": "1", "B": "none of these"},
        ),
        ({"A": "1", "B": float("nan"), "hint": "None"}, "Which?\nA. 1", {"A": "1"}),
        ({"A": "x", "B": "y", "hint": "look"}, "look\nWhich?\nA. x\nB. y", {"A": "x", "B": "y"}),
    ],
)
def test_mmbench_takes_cells_for_missing_that_llava_does(cells, asked, options):
    item = mmbench.item_of({"index": "1", "question": "Which?", "answer": "A", **cells}, "Letter.")
    assert (item.question, item.answer["options"]) == (f"{asked}\nLetter.", options)
    assert mmbench.stem(item) == asked.split("\nA. ")[0]


def test_a_judge_reads_what_mmbenchs_rules_can_not(tmp_path, monkeypatch):
    data = tmp_path / "data"
    FILES["mmbench"](data)
    items = get_task("mmbench").read(data)
    said, asked = {}, []
    for item in items:
        # Two answers in three name no letter alone; one refuses, and no judge is asked about that.
        right = item.answer["letter"]
        said[item.id] = {0: right, 1: f"{right} {'A' if right != 'A' else 'B'}", 2: "Cannot determine the answer"}[
            int(item.id) % mmbench.ROUND % 3
        ]
    rows = [{"id": name, "question": "", "prediction": text} for name, text in said.items()]
    write_lines(tmp_path / "said.jsonl", rows)

    def reply(self, instruction, content):
        asked.append(content)
        return f"The letter is {content.splitlines()[-1].removeprefix('Answer: ')[0]}"

    monkeypatch.setattr(Grader, "reply", reply)
    result = score_file("mmbench", tmp_path / "said.jsonl", data, grader=Grader("http://x", "judge"))
    assert result["accuracy"] == pytest.approx(100 / 3) and result["graded"]["accuracy"] == pytest.approx(200 / 3)
    assert result["grader"] == "judge" and len(asked) == 4 and "Options:\nA. " in asked[0]
    assert set(result["intervals"]) == {"accuracy", "single_round"} == set(result["graded"]["intervals"])


@pytest.mark.parametrize(("reply", "letter"), [("B", "B"), ("It is (C).", "C"), ("NONE", ""), ("B, B", "B")])
def test_a_judges_choice_is_read(reply, letter):
    assert read_choice(reply, {"B": "x", "C": "y"}) == letter


@pytest.mark.parametrize("reply", ["B or C", "", "the second"])
def test_a_judge_that_does_not_choose_is_named(reply):
    with pytest.raises(TaskError, match="expected one letter of B, C, or NONE"):
        read_choice(reply, {"B": "x", "C": "y"})
