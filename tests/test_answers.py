"""The model's own answers as a recipe: read again, gone on with, refused; and data sets without answers."""

from __future__ import annotations

import json

import pytest
from conftest import TINY_VLM

from prunetune.cli import main
from prunetune.configs import ModelConfig
from prunetune.data_recipes import DataError, Sample, Turn, load_recipe
from prunetune.data_recipes.questions import dealt, images_below, question_in, read_questions, without_repeats
from prunetune.models import Arm
from prunetune.models.seal import why_unsealed
from prunetune.scripts import answers
from prunetune.tiny_world.recipe import SceneImages

QUESTIONS = ("what number is shown ?", "where is the circle ?", "describe the southeast .")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five scenes as files, two of them in a folder below, and questions about them."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    names = ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    for number, name in enumerate(names):
        SceneImages().open(f"scene:{10_000_001 + number}", name).save(root / name)
    (root / "notes.txt").write_text("no image")
    records = []
    for number, name in enumerate(names):
        messages = [{"from": "human", "value": f"<image>\n{QUESTIONS[number % 3]}"}]
        if number % 2:  # answered: the model's own is wanted all the same; and a second question
            messages += [{"from": "gpt", "value": "nobody knows"}, {"from": "human", "value": QUESTIONS[0]}]
        records.append({"id": f"r{number}", "image": name, "conversations": messages})
    records.append({"id": "text", "conversations": [{"from": "human", "value": "what number is shown ?"}]})
    (root / "asked.json").write_text(json.dumps(records))
    return root


def line(folder, output, *more):
    return ["answers", "--config", "recalibrate/tiny_divprune_16", "--data.recipe", "custom",
            "--data.file", str(folder / "asked.json"), "--data.image_root", str(folder), "--max-new-tokens", "6",
            "--batch-size", "2", "--output", str(output), *more]  # fmt: skip


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("answers") / "own.json"
    main(line(folder, output))
    return output


@pytest.fixture(scope="module")
def dense():
    return Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu")


def test_answers_are_the_dense_models_own(folder, written, dense):
    """Against the arm itself, one sample at a time; a second question is asked behind the first answer."""
    records = json.loads(written.read_text())
    assert [record["id"] for record in records] == ["r0", "r1", "r2", "r3", "r4", "text"]
    data = load_recipe("custom", file=str(folder / "asked.json"), image_root=str(folder), questions=True)
    formatter = dense.formatter(data.images)
    for number, record in enumerate(records):
        asked = data[number]
        assert [turn.answer for turn in asked.turns] == [None] * len(asked.turns)
        turns = []
        for turn in asked.turns:
            sample = Sample(asked.id, asked.source, asked.image, (*turns, turn))
            (answer,) = dense.answer(formatter, [sample], 6)
            assert answer.kept == (0 if asked.image is None else 144)
            turns.append(Turn(turn.question, answer.text))
        said = [message["value"] for message in record["conversations"][1::2]]
        assert said == [turn.answer for turn in turns] and "nobody knows" not in said
        assert len(turns) == 1 + number % 2 * (number < 5)


def test_the_result_is_a_recipe_like_any_other(folder, written):
    data = load_recipe(str(written.with_suffix(".yaml")), image_root=str(folder))
    assert len(data) == 6 and data.broken == [] and data.missing == []
    assert data[1].image == "1.png" and [turn.question for turn in data[1].turns] == [QUESTIONS[1], QUESTIONS[0]]
    assert all(turn.answer for turn in data[0].turns)


def test_the_record_is_sealed_and_says_what_answered(written, dense):
    record = json.loads(written.with_suffix(".record.json").read_text())
    assert why_unsealed(record) is None
    assert record["frozen_hash"] == dense.base.hashes.frozen_hash
    assert record["original_projector_hash"] == dense.base.hashes.original_projector_hash
    assert record["max_new_tokens"] == 6 and record["counts"]["conversations"] == 6
    assert record["data"]["count"] == 6 and not list(written.parent.glob("*.part-*"))


def killed_after(monkeypatch, calls):
    real, seen = Arm.answer, []

    def answer(self, *given):
        seen.append(given)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(Arm, "answer", answer)
    return seen


def test_a_killed_run_goes_on_and_writes_the_same_bytes(folder, written, tmp_path, monkeypatch):
    output = tmp_path / "own.json"
    with monkeypatch.context() as patch:
        killed_after(patch, 3)  # batch 0 has two turns, batch 1 as well
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(line(folder, output))
    (part,) = tmp_path.glob("own.json.part-*")
    assert not output.exists() and len(part.read_text().splitlines()) == 1
    with part.open("a") as file:
        file.write('{"made_with": "cut sho')
    with monkeypatch.context() as patch:
        seen = killed_after(patch, 100)
        main(line(folder, output))
        assert len(seen) == 3  # two turns and one
    for suffix in (".json", ".yaml", ".record.json"):
        assert output.with_suffix(suffix).read_bytes() == written.with_suffix(suffix).read_bytes()
    with monkeypatch.context() as patch:
        killed_after(patch, 0)
        main(line(folder, output))  # complete: nothing is answered


def test_what_is_there_is_not_replaced(folder, written, tmp_path):
    with pytest.raises(SystemExit, match="holds answers that differ in max_new_tokens; choose another file, or give"):
        main([*line(folder, written), "--max-new-tokens", "5"])
    (tmp_path / "begun.json.part-0").write_text('{"made_with": "other", "batch": 0, "records": []}\n')
    with pytest.raises(SystemExit, match="of a run with other settings that was not finished; choose another file"):
        main(line(folder, tmp_path / "begun.json"))
    mine = tmp_path / "mine.json"
    mine.write_text("[]")
    with pytest.raises(SystemExit, match="mine.json is in the way: it is not as prunetune answers wrote it"):
        main([*line(folder, mine), "--overwrite", "true"])
    assert mine.read_text() == "[]"
    with pytest.raises(SystemExit, match="give --output FILE.json"):
        main(line(folder, tmp_path / "folder"))


def test_questions_alone_are_refused_for_training_with_what_to_do(folder):
    with pytest.raises(
        DataError, match="a question without an answer: `prunetune answers` writes the model's own"
    ) as e:
        load_recipe("custom", file=str(folder / "asked.json"), image_root=str(folder))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"from": "gpt", "value": "4 7"}], "no message is from 'human'"),
        ([{"from": "human", "value": 3}], "a question has no text"),
        ([{"from": "human", "value": "what ?"}], "0 <image> placeholders, but 1 image"),
        ([{"from": "human", "value": "what ?"}, {"from": "human", "value": "<image> and ?"}], "first human message"),
    ],
)
def test_what_asks_nothing_is_broken(folder, tmp_path, messages, message):
    file = tmp_path / "asked.json"
    file.write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": messages}]))
    with pytest.raises(DataError, match=message):
        load_recipe("custom", file=str(file), image_root=str(folder), questions=True)


# ---- images alone ----------------------------------------------------------------------------------------------------


def test_a_folder_of_images_is_asked_what_a_file_says(folder, tmp_path):
    assert images_below(folder) == ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    file = tmp_path / "questions.txt"
    file.write_text("\n".join([*QUESTIONS, "", QUESTIONS[0], "  "]))
    assert read_questions(file) == list(QUESTIONS)
    output = tmp_path / "own.json"
    main(line(folder, output, "--images", str(folder), "--questions", str(file), "--each", "2"))
    records = json.loads(output.read_text())
    expected = list(dealt(images_below(folder), QUESTIONS, 2, 0))
    assert [record["id"] for record in records] == [sample.id for sample in expected]
    assert len(records) == 10 and len({record["id"] for record in records}) == 10
    for record, sample in zip(records, expected, strict=True):
        assert record["image"] == sample.image
        assert record["conversations"][0]["value"] == f"<image>\n{sample.turns[0].question}"
    other = [sample.turns for sample in dealt(images_below(folder), QUESTIONS, 2, 1)]
    assert other != [sample.turns for sample in expected]
    assert list(dealt(["2.png"], QUESTIONS, 2, 0)) == expected[4:6]  # whatever other images there are


def test_the_model_may_ask_itself(folder, tmp_path, monkeypatch):
    """Prompts are answered with two questions in all, one of them in capitals as well: each is asked once."""
    real = Arm.answer

    def answer(self, formatter, samples, longest):
        found = real(self, formatter, samples, longest)
        asked = samples[0].turns[-1].question
        if asked not in answers.ASKING:
            return found
        said = ["Where is the circle ? I wonder.", "where is the circle ?", '"what number is shown ?"\nYes.']
        return [type(own)(own.id, said[answers.ASKING.index(asked)], own.kept) for own in found]

    monkeypatch.setattr(Arm, "answer", answer)
    output = tmp_path / "own.json"
    main(line(folder, output, "--images", str(folder), "--ask", "3"))
    records = json.loads(output.read_text())
    assert [record["conversations"][0]["value"] for record in records[:2]] == [
        "<image>\nWhere is the circle ?",
        "<image>\nwhat number is shown ?",
    ]
    assert len(records) == 10 and records[1]["id"] == "0.png#2"


def test_the_shipped_list_is_what_is_asked_without_another(folder, tmp_path):
    output = tmp_path / "own.json"
    main(line(folder, output, "--images", str(folder)))
    asked = [record["conversations"][0]["value"].removeprefix("<image>\n") for record in json.loads(output.read_text())]
    assert len(asked) == 5 and set(asked) <= set(answers.GENERAL)


def test_options_that_contradict_one_another_are_one_line(folder, tmp_path):
    output = tmp_path / "own.json"
    with pytest.raises(SystemExit, match="are for images without questions: give --images DIR"):
        main(line(folder, output, "--ask", "2"))
    with pytest.raises(SystemExit, match="give one of them"):
        main(line(folder, output, "--images", str(folder), "--ask", "2", "--questions", "q.txt"))
    with pytest.raises(SystemExit, match="--ask takes 0 to 8 questions an image, of a kind each, got 9"):
        main(line(folder, output, "--images", str(folder), "--ask", "9"))
    with pytest.raises(SystemExit, match="has no image"):
        main(line(folder, output, "--images", str(tmp_path)))
    with pytest.raises(SystemExit, match="recipe 'tiny_world' draws its images"):
        main([*line(folder, output), "--data.recipe", "tiny_world"])


def test_questions_are_cut_out_of_what_a_model_says():
    assert question_in('"What is it? It is a cat."\nMore?') == "What is it?"
    assert question_in("no question") == "no question" and question_in(" \n") == ""
    assert without_repeats(["A?", "", "b?", "a?", "c?"]) == ["A?", "b?", "c?"]
