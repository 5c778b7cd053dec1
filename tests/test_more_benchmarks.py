"""Scores by hand and by slow oracles, prompts to the letter, and several images in one question."""

import functools
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from benchmark_files import FILES
from more_benchmark_files import scene

from prunetune.data_recipes import DataError, Sample, Turn
from prunetune.data_recipes.images import HERE, Album
from prunetune.data_recipes.parquet import ParquetImages
from prunetune.evaluation.metrics.anls import anls, edit_distance
from prunetune.evaluation.metrics.letters import mmmu_letter, mmmu_open, ranked_letter
from prunetune.evaluation.report.grader import Grader
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.tasks import Item, Scored, TaskError, get_task
from prunetune.evaluation.tasks.llava_bench import judge, judge_prompt, read_scores
from prunetune.evaluation.tasks.mmstar import AVERAGE, CATEGORIES
from prunetune.models import Arm

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


@functools.cache
def slow_distance(first, second):
    """The definition, word for word."""
    if not first or not second:
        return len(first) + len(second)
    return min(slow_distance(first[1:], second) + 1, slow_distance(first, second[1:]) + 1,
               slow_distance(first[1:], second[1:]) + (first[0] != second[0]))  # fmt: skip


def test_edit_distance_is_that_of_the_definition():
    random.seed(0)
    for _ in range(300):
        first, second = ("".join(random.choices("abc ", k=random.randint(0, 6))) for _ in range(2))
        assert edit_distance(first, second) == slow_distance(first, second)


def test_anls_by_hand():
    assert anls("1982", ["1982"]) == 1
    assert anls("1932", ["1982"]) == 0.75  # one letter of four
    assert anls("  The  Dog ", ["the dog"]) == 1  # case and spaces do not count
    assert anls("ab", ["ad"]) == 0.5 and anls("abcd", ["aefg"]) == 0  # at and below the threshold
    assert anls("north", ["south", "nort"]) == 0.8  # the nearest answer
    assert anls("", [""]) == 1 and anls("", ["x"]) == 0
    # Divided by the longer text as it was said: 1 of 10, although 1 of 8 letters is wrong once spaces are joined.
    assert anls("abcd  efgx", ["abcd efgh"]) == 0.9


@pytest.mark.parametrize(("said", "letter"), [
    ("B", "B"), ("(B)", "B"), ("B. red", "B"), ("The answer is B", "B"), ("b", ""), ("", ""), (" B) red", "B"),
    ("A dog, so B", "A"),  # begins with it: its authors' first rule
    ("I think (A) or (C)", "C"), ("Not A: the correct option is D, says he", "D"), ("BAD", "D"), ("red", ""),
])  # fmt: skip
def test_ranked_letters(said, letter):
    assert ranked_letter(said, "ABCD") == letter


@pytest.mark.parametrize(("said", "letter"), [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B: red", ""), ("A or B", "B"), ("(A) is not (B), but (A)", "A"),
    ("red", ""),  # a text of up to five words is no choice
    ("I would say that it is dark red", "A"), ("of all of these it is surely red", "A"), ("CIA agents", "A"),
])  # fmt: skip
def test_mmmus_letters(said, letter):
    assert mmmu_letter(said, {"A": "red", "B": "dark red", "C": "cat"}) == letter


def test_mmmus_open_answers():
    assert mmmu_open("The result is 0.5", "0.5") and mmmu_open("x = 0.501", "0.50")  # to two digits
    assert mmmu_open("about 1,000 people", "1000") and not mmmu_open("about 1,000 people", "100")
    assert mmmu_open("It is a Red ring.", "red") and not mmmu_open("blue", "red")
    assert not mmmu_open("read", "a") and mmmu_open("so it is a ring", "a")  # a letter stands beside a space
    assert not mmmu_open("5 is nothing but 7", "5")  # what follows counts, if anything does


def items(name, tmp_path):
    FILES[name](tmp_path)
    return get_task(name).read(tmp_path)


def test_prompts_to_the_letter(tmp_path):
    asked = {name: items(name, tmp_path / name)[1].question for name in
             ("seedbench", "mmstar", "ai2d", "docvqa", "infovqa", "realworldqa", "llava_bench")}  # fmt: skip
    number = "what number is shown ?"
    assert asked["seedbench"] == f"{number}\nA. northwest\nB. 4 7\nC. red\nD. none\n{LETTER}"
    assert asked["mmstar"] == f"{number}\nOptions: A: northwest, B: 4 7, C: red\n{LETTER[:-1]}"
    assert asked["ai2d"] == f"What is A?\nA. northwest\nB. 4 7\nC. red\nD. none\n{LETTER}"
    assert asked["docvqa"] == asked["infovqa"] == f"{number}\n{SHORT}"
    assert asked["realworldqa"] == f"{number}\n\nA. northwest\nB. 4 7\nC. red\nPlease answer directly."
    assert asked["llava_bench"] == number
    exams = items("mmmu", tmp_path / "mmmu")
    assert exams[1].question == f"<image 1> {number}\nA. northwest\nB. 4 7\nC. red\n\n{LETTER}"
    assert exams[3].question == f"<image 1> where is the circle ?\n\n{SHORT}"


def test_what_the_files_say_is_read(tmp_path):
    seed = items("seedbench", tmp_path / "seed")
    assert len(seed) == 12 and {item.source for item in seed} == {
        "Scene Understanding", "Instance Identity", "Instance Location", "Instance Attributes"}  # fmt: skip
    exams = items("mmmu", tmp_path / "mmmu")
    assert len(exams) == 12 and exams[0].source == "Art"  # the row of the development split is left out
    assert exams[4].image == "row:4/image_1,image_2" and exams[8].image == "row:8/image_1,image_2,image_3"
    diagrams = items("ai2d", tmp_path / "ai2d")
    assert [item.image for item in diagrams[:2]] == ["images/0.png", "abc_images/0.png"]
    assert [item.answer for item in diagrams[:4]] == ["A", "B", "B", "C"]
    assert items("docvqa_test", tmp_path / "doc")[0].answer is None
    assert [item.source for item in items("docvqa", tmp_path / "doc")[:2]] == ["form", "form, layout"]


def test_bad_files_are_named(tmp_path):
    exams = tmp_path / "exams"
    FILES["docvqa_test"](tmp_path / "doc")
    (tmp_path / "doc" / "test_v1.0.json").rename(tmp_path / "doc" / "val_v1.0_withQT.json")
    with pytest.raises(TaskError, match="question 500 has no answers"):
        get_task("docvqa").read(tmp_path / "doc")
    FILES["mmstar"](exams)
    with pytest.raises(
        TaskError, match="question '0' is of no subject|none of the 12 rows is a question of mmmu|no col"
    ):
        get_task("mmmu").read(exams)
    FILES["llava_bench"](tmp_path / "wild")
    (tmp_path / "wild" / "context.jsonl").write_text('{"image": "000.jpg", "caption": "x"}\n')
    with pytest.raises(TaskError, match=r"line 2: context.jsonl has no text for question 1"):
        get_task("llava_bench").read(tmp_path / "wild")


def scored(name, said, tmp_path):
    task = get_task(name)
    found = [task.score(text, item) for text, item in zip(said, items(name, tmp_path), strict=False)]
    return task, found, task.summarise(found).metrics


def test_metrics_by_hand(tmp_path):
    # SEED-Bench: A B C A ... in turn without the third and the seventh; "B." is wrong as in LLaVA's script.
    _, found, metrics = scored("seedbench", ["A", "B.", "C", "B", "C"] + ["x"] * 7, tmp_path / "seed")
    assert [one.score for one in found[:5]] == [1, 0, 1, 1, 1] and metrics["accuracy"] == pytest.approx(100 * 4 / 12)
    # DocVQA: 1, 0.75 of "4 7" misread, 0 and so on; questions of two kinds count for both.
    _, found, metrics = scored("docvqa", ["Northwest", "4 1"] + ["?"] * 10, tmp_path / "doc")
    assert [one.score for one in found[:3]] == [1, pytest.approx(2 / 3), 0]
    assert metrics["anls"] == pytest.approx(100 * (1 + 2 / 3) / 12)
    assert metrics["by_kind"] == {"form": pytest.approx(metrics["anls"]), "layout": pytest.approx(100 * (2 / 3) / 6)}
    # MMMU: the first is right, an option named by no letter is wrong, an open answer by its number.
    _, found, metrics = scored("mmmu", ["(A)", "4 7", "C", "it is 0.5"] + ["x"] * 8, tmp_path / "mmmu")
    assert [one.score for one in found[:4]] == [1, 0, 1, 1]
    assert metrics["by_discipline"] == {
        "Art and Design": 50.0, "Business": 0.0, "Science": 25.0}  # fmt: skip
    _, found, _ = scored("realworldqa", ["downhill.", "The answer is B", "(C)", "B"], tmp_path / "real")
    assert [one.score for one in found] == [1, 1, 1, 0]
    _, found, _ = scored("ai2d", ["a", "B. 4 7", "C", "(c)"], tmp_path / "ai2d")
    assert [one.score for one in found] == [1, 1, 0, 1]


def test_mmstars_average_is_that_of_its_capabilities(tmp_path):
    task, found, metrics = scored("mmstar", ["A", "B", "x", "A", "B", "C"] + ["x"] * 6, tmp_path)
    groups = {}
    for one in found:
        groups.setdefault(one.item.source, []).append(one.score)
    means = [np.mean(scores) for scores in groups.values()]
    assert len(means) == 3 and metrics["average"] == pytest.approx(100 * np.mean(means))
    assert metrics["average"] != pytest.approx(metrics["accuracy"])
    details = {}
    for one in found:
        details.setdefault(one.item.answer["detail"], []).append(one.score)
    assert metrics["detail_average"] == pytest.approx(100 * np.mean([np.mean(own) for own in details.values()]))
    assert task.scorer.metrics[0] is AVERAGE
    # A bootstrap sample without one of the groups is the mean of the others.
    half = [Scored("", Item(str(n), CATEGORIES[n % 2], None, "", None), float(n % 2)) for n in range(4)]
    counts = AVERAGE.tally(half).counts
    assert AVERAGE.of(half) == 50 and AVERAGE.value(counts[[1, 3]].sum(axis=0)) == 100


@pytest.fixture
def endpoint():
    """A judge that gives an answer that holds "red" 8 of 10 and others 4; GPT-4's own gets 8."""
    asked = []

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            own = asked[-1]["messages"][1]["content"].split("[Assistant 2]")[1]
            text = f"8 {8 if 'red' in own else 4}\nBecause."
            body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_llava_bench_is_judged_beside_gpt4(tmp_path, endpoint):
    url, asked = endpoint
    questions = items("llava_bench", tmp_path)
    rows = [{"question_id": int(item.id), "text": "red" if n < 3 else "blue"} for n, item in enumerate(questions)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match="name one with --grader"):
        score_file("llava_bench", tmp_path / "answers.jsonl", tmp_path)
    found = score_file("llava_bench", tmp_path / "answers.jsonl", tmp_path, grader=Grader(url, "some-model"))
    # Three of twelve get 8 of 8, the others 4 of 8.
    assert (
        found["relative_score"] == pytest.approx(100 * (3 * 8 + 9 * 4) / (12 * 8)) and found["grader"] == "some-model"
    )
    assert found["by_category"] == {"complex": 62.5, "conv": 62.5, "detail": 62.5}
    low, high = found["relative_score_interval_95"]
    assert 50 <= low < 62.5 < high <= 100
    first = asked[0]["messages"]
    assert first[0]["content"].startswith("You are a helpful and precise assistant")
    assert first[1]["content"].startswith(
        "[Context]\nA scene numbered 0.\n\n[Question]\nwhere is the circle ?\n\n"
        "[Assistant 1]\nGPT-4 says northwest.\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nred\n\n[End of Assistant 2]\n\n[System]\nWe would like to request"
    )
    assert first[1]["content"] == judge_prompt("red", questions[0])


def test_a_review_without_scores_is_an_error(tmp_path):
    assert read_scores("8 7.5\nwell") == (8, 7.5) and read_scores("9, 3") == (9, 3)
    for text in ("", "8", "I would say\n8 7", "0 5", "8 7 6"):
        with pytest.raises(TaskError, match="expected two scores"):
            read_scores(text)
    one = Scored("x", items("llava_bench", tmp_path)[0], None)
    assert judge(lambda system, user: "10 5", [one, one])["relative_score"] == 50


class Albums:
    """Opens albums and images from a dictionary."""

    def __init__(self, images):
        self.images = images

    def exists(self, reference):
        return reference in self.images

    def open(self, reference, sample_id):
        return self.images[reference]


@pytest.fixture(scope="module")
def arm(untrained_folder):
    from prunetune.configs import EvaluateConfig, load_config

    config = load_config(EvaluateConfig, None, [
        "--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks", "[tiny_world_validation]",
        "--pruning.pruner", "divprune", "--pruning.keep", "16", "--output", "x"])  # fmt: skip
    return Arm.load(config.model, config.pruning, None, "cpu")


def test_each_image_of_an_album_keeps_what_it_keeps_alone(arm):
    first, second = scene(1), scene(2)
    images = Albums({"both": Album((first, second)), "1": first, "2": second})
    formatter = arm.formatter(images)
    samples = [Sample(name, "s", name, (Turn("what is red ?", None),)) for name in ("both", "1", "2")]
    inputs = arm.place(formatter.prompt_batch(samples))
    assert inputs["pixel_values"].shape[0] == 4
    with torch.inference_mode():
        chosen = arm.pruned.prepare(inputs).chosen["image"]
    kept = [tuple(int(at) for at in row) for own in chosen.selections for row in own.indices]
    assert kept[0] == kept[2] and kept[1] == kept[3] and kept[0] != kept[1]
    answers = arm.answer(formatter, samples, 4)
    assert [answer.kept for answer in answers] == [32, 16, 16]
    alone = arm.answer(formatter, samples[:1], 4) + arm.answer(formatter, samples[1:2], 4)
    assert [answer.text for answer in alone] == [answer.text for answer in answers[:2]]


def test_images_stand_where_the_question_has_them(arm):
    token = arm.processor.image_token_id
    formatter = arm.formatter(Albums({"both": Album((scene(1), scene(2)))}))

    def runs(question):
        sample = Sample("s", "s", "both", (Turn(question, None),))
        ids = formatter.prompt_batch([sample])["input_ids"][0]
        edges = (ids == token).int().diff(prepend=torch.zeros(1, dtype=torch.int32))
        starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
        pieces = zip([0, *ends], [*starts, len(ids)], strict=True)
        return [arm.processor.tokenizer.decode(ids[end:start]) for end, start in pieces]

    texts = runs(f"what is {HERE} and what is {HERE} ?")
    assert len(texts) == 3 and "what is" in texts[0] and "and what is" in texts[1] and "?" in texts[2]
    for question in ("what is red ?", f"what is {HERE}red ?"):  # one place for two images is none
        texts = runs(question)
        assert len(texts) == 2 and "what" not in texts[0] and "what is red ?" in texts[1]


def test_references_of_several_columns(tmp_path):
    from prunetune.data_recipes.parquet import parquet_rows

    FILES["mmmu"](tmp_path)
    images = ParquetImages(parquet_rows(tmp_path / "data" / "validation-0.parquet"))
    assert images.exists("row:4/image_1") and not images.exists("row:99/image_1")
    album = images.open("row:8/image_1,image_3", "s")
    assert [list(own.getdata()) for own in album.images] == [list(scene(n).getdata()) for n in (8, 31)]
    assert images.size("row:8/image_2", "s") == scene(30).size
    with pytest.raises(DataError, match="holds no image"):
        images.open("row:0/image_1,image_2", "s")
