"""`prunetune score`: published files in, one JSON out, and the traps on the way; expected numbers are by hand."""

import json

import pytest
from benchmark_files import FILES

from prunetune.cli import main
from prunetune.evaluation.metrics.chair import Objects
from prunetune.evaluation.metrics.chair import chair as chair_metrics
from prunetune.evaluation.metrics.vqa import normalize, vqa_accuracy
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.tasks import Item, TaskError, chartqa, get_task, mmbench, mme, ocrbench, pope, scienceqa
from prunetune.evaluation.tasks.textvqa import question_of

S = "Answer the question using a single word or phrase."


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answers(tmp_path, *rows):
    """LLaVA's answers.jsonl from (question_id, prompt, text)."""
    return lines(
        tmp_path / "answers.jsonl",
        [{"question_id": i, "prompt": p, "text": t, "answer_id": "x", "model_id": "m", "metadata": {}}
         for i, p, t in rows],
    )  # fmt: skip


# ---- VQA accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("Yes.", "yes"),
        ("The Dogs", "dogs"),
        ("two  dogs", "2 dogs"),
        ("None", "0"),
        ("an apple, a pear", "apple pear"),
        ("it's", "it 's"),
        ("dont know", "don't know"),
        ("cant", "can't"),
        ("shouldnt've", "shouldn't've"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("U.S.A.", "usa"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("black -white-red", "black whitered"),  # a mark next to a space anywhere goes everywhere
        ("what?!", "what"),
        ("a\tb\nc", "b c"),
        ("10:30", "10:30"),
        ("no. 5", "no 5"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_challenge_does(said, compared):
    assert normalize(said) == compared


@pytest.mark.parametrize(
    ("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)  # each person left out in turn: of 3 who agree, 3 x 2/3 and 7 x 1
def test_vqa_accuracy_leaves_each_person_out(same, expected):
    people = ["Red."] * same + [f"other {i}" for i in range(10 - same)]
    assert vqa_accuracy("the red", people) == pytest.approx(expected, abs=1e-12)


# ---- tasks -----------------------------------------------------------------------------------------------------


def test_gqa(tmp_path, capsys):
    questions = {
        "1": {"question": "Is it red?", "answer": "yes", "imageId": "7", "isBalanced": True,
              "types": {"structural": "verify"}},
        "2": {"question": "What is it?", "answer": "dog", "imageId": "7", "isBalanced": True,
              "types": {"structural": "query"}},
        "3": {"question": "Who?", "answer": "man", "imageId": "8", "isBalanced": True,
              "types": {"structural": "query"}},
        "4": {"question": "Left out", "answer": "x", "imageId": "8", "isBalanced": False,
              "types": {"structural": "query"}},
    }  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    (data / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    file = answers(tmp_path, ("2", "", "Dog."), ("1", "", "No"), ("3", "", "the man"))
    main(["score", "gqa", "--predictions", str(file), "--data", str(data)])
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == pytest.approx(100 / 3) and result["binary"] == 0 and result["open"] == 50
    assert result["items"] == 3 and result["protocol"] == "llava" and len(result["interval_95"]) == 2
    ours = lines(tmp_path / "results.jsonl", [
        {"task": "gqa", "id": i, "question": "", "prediction": t} for i, t in (("1", "yes"), ("2", "dog"), ("3", "boy"))
    ] + [{"task": "tiny_world", "id": "1", "question": "", "prediction": "not ours"}])  # fmt: skip
    assert score_file("gqa", ours, data)["accuracy"] == pytest.approx(200 / 3)


def textvqa_data(tmp_path):
    record = {"image_id": "img1", "answers": ["coca cola"] * 7 + ["coke"] * 3}
    data = tmp_path / "data"
    data.mkdir()
    annotations = [{**record, "question": "what brand is this?"}, {**record, "question": "What colour?",
                    "answers": ["red"] * 10}]  # fmt: skip
    (data / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": annotations}))
    return data


def test_textvqa_pairs_by_picture_and_question_whatever_the_prompt(tmp_path):
    data = textvqa_data(tmp_path)
    with_ocr = answers(tmp_path, ("img1", f"What colour?\nReference OCR token: Coca, Cola\n{S}", "Red."),
                       ("img1", f"What brand is this?\nReference OCR token: Coca, Cola\n{S}", "Coke"))  # fmt: skip
    result = score_file("textvqa", with_ocr, data)
    assert result["accuracy"] == pytest.approx((100 + 90) / 2)
    assert result["prompt"] == "question, reference OCR tokens, short answer"
    without = answers(tmp_path, ("img1", f"What colour?\n{S}", "red"), ("img1", f"What brand is this?\n{S}", "Pepsi"))
    result = score_file("textvqa", without, data)
    assert result["accuracy"] == 50 and result["prompt"] == "question, short answer"


def test_textvqa_may_ask_the_same_twice(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    record = {"image_id": "img", "question": "What?", "answers": ["red"] * 10}
    (data / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [record, {**record, "answers": ["blue"] * 10}]}))
    ask = f"What?\n{S}"
    file = answers(tmp_path, ("img", ask, "red"), ("img", ask, "blue"))
    assert score_file("textvqa", file, data)["accuracy"] == 50  # LLaVA compares both with the last annotation
    with pytest.raises(TaskError, match="line 3: question 'img/what[?]#2' was answered in line 2"):
        score_file("textvqa", answers(tmp_path, *[("img", ask, "red")] * 3), data)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (f"Q?\nReference OCR token: a\n{S}", "Q?"),
        (f"Reference OCR token: a\nQ?\n{S}", "Q?"),
        (f"Q?\n{S}", "Q?"),
        ("OCR tokens: a, b. Question: Q? Short answer:", "Q?"),
    ],
)
def test_textvqa_prompt_forms(prompt, question):
    assert question_of(prompt, "here") == question


def test_vqav2_and_vizwiz(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    ten = [{"answer": "yes"}] * 8 + [{"answer": "no"}] * 2
    (data / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(
        {"annotations": [{"question_id": 1, "answers": ten, "answer_type": "yes/no"},
                         {"question_id": 2, "answers": [{"answer": "3"}] * 10, "answer_type": "number"}]}))  # fmt: skip
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(
        {"questions": [{"question_id": 1, "image_id": 9, "question": "Is it?"},
                       {"question_id": 2, "image_id": 9, "question": "How many?"}]}))  # fmt: skip
    result = score_file("vqav2", answers(tmp_path, (2, "", "three"), (1, "", "No.")), data)
    assert result["accuracy"] == pytest.approx((60 + 100) / 2)
    assert result["by_answer_type"] == {"number": pytest.approx(100), "yes/no": pytest.approx(60)}
    (data / "val.json").write_text(json.dumps(
        [{"image": "VizWiz_val_1.jpg", "question": "What?", "answers": [{"answer": "unanswerable"}] * 10,
          "answer_type": "unanswerable"}]))  # fmt: skip
    assert score_file("vizwiz", answers(tmp_path, ("VizWiz_val_1.jpg", "", "Unanswerable")), data)["accuracy"] == 100


def test_an_id_that_the_annotations_hold_twice_stops(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    record = {"image": "a.jpg", "question": "What?", "answers": [{"answer": "x"}] * 10}
    (data / "val.json").write_text(json.dumps([record, record]))
    with pytest.raises(TaskError, match=r"vizwiz: question 'a.jpg' is in the files in .* 2 times"):
        score_file("vizwiz", answers(tmp_path, ("a.jpg", "", "x")), data)


def pope_data(tmp_path, categories=("random", "popular", "adversarial")):
    data, asked, number = tmp_path / "data", [], 0
    for category in categories:
        labels = [{"question_id": n + 1, "image": f"{n // 2}.jpg", "text": f"Is there a {what} in the image?",
                   "label": label} for n, (what, label) in enumerate(
                       [("dog", "yes"), ("cat", "no"), ("dog", "no"), ("cup", "yes")])]  # fmt: skip
        lines(data / "coco" / f"coco_pope_{category}.json", labels)
        for record in reversed(labels):  # other ids and another order than the label file's
            asked.append({"question_id": number, "image": record["image"], "text": f"{record['text']}\n{S}",
                          "category": category})  # fmt: skip
            number += 1
    lines(data / "llava_pope_test.jsonl", asked)
    return data, asked


def test_pope_pairs_by_question_and_not_by_order(tmp_path):
    data, asked = pope_data(tmp_path)
    truth = {("0.jpg", "dog"): "yes", ("0.jpg", "cat"): "no", ("1.jpg", "dog"): "no", ("1.jpg", "cup"): "yes"}
    rows = []
    for record in asked:
        right = truth[record["image"], record["text"].split()[3]]
        said = {"yes": "Yes, it is.", "no": "No"}[right]
        if record["category"] == "popular" and right == "no":
            said = "Yes"
        if record["category"] == "adversarial":
            said = "Nothing of the kind"  # no whole word "no": counts as yes
        rows.append((record["question_id"], record["text"], said))
    result = score_file("pope", answers(tmp_path, *rows), data)
    assert result["categories"]["random"] == {
        "items": 4, "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.5,
        "TP": 2, "FP": 0, "TN": 2, "FN": 0}  # fmt: skip
    popular = result["categories"]["popular"]
    assert (popular["TP"], popular["FP"], popular["TN"], popular["FN"]) == (2, 2, 0, 0)
    assert popular["f1"] == pytest.approx(2 / 3) and popular["yes_ratio"] == 1
    assert result["mean"]["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert any("order" in note for note in result["notes"])


def test_pope_never_divides_by_zero(tmp_path):
    data, asked = pope_data(tmp_path)
    result = score_file("pope", answers(tmp_path, *[(r["question_id"], r["text"], "no") for r in asked]), data)
    assert result["categories"]["random"]["precision"] is None and result["categories"]["random"]["recall"] == 0
    assert result["categories"]["random"]["f1"] is None and result["mean"]["f1"] is None
    assert result["mean"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("said", "means"),
    [("No, there is not.", "no"), ("Yes. No doubt.", "yes"), ("There is not, I think", "no"), ("NO", "yes"),
     ("No,", "no"), ("no\n", "yes"), ("", "yes"), ("Not there", "yes")],
)  # fmt: skip
def test_pope_reads_the_first_sentence(said, means):
    assert pope.says(said) == means


@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_mme_scores_pictures_and_answers(tmp_path, layout):
    data = tmp_path / "data"
    root = data / "MME_Benchmark_release_version"
    texts = {"a": [("Is it A?", "Yes"), ("Is it B?", "No")], "b": [("Is it C?", "Yes"), ("Is it D?", "No")]}
    for subtask in ("existence", "code_reasoning"):
        for name, pair in texts.items():
            folder = root / subtask / "questions_answers_YN" if layout == "folders" else root / subtask
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text(
                "".join(f"{question} Please answer yes or no.\t{answer}\n" for question, answer in pair)
            )
    rows = []
    for subtask, end in (("existence", "jpg"), ("code_reasoning", "png")):
        for name, pair in reversed(texts.items()):
            for question, answer in reversed(pair):
                said = "Yes" if (subtask, name, question) == ("existence", "b", "Is it D?") else f"{answer}."
                middle = "/images" if layout == "folders" else ""
                rows.append((f"{subtask}{middle}/{name}.{end}", f"{question}\n{S}", said))
    result = score_file("mme", answers(tmp_path, *rows), data)
    assert result["subtasks"]["existence"] == {"score": 125.0, "accuracy": 75.0, "accuracy_plus": 50.0}
    assert result["perception"] == 125 and result["cognition"] == 200 and result["total"] == 325
    assert len(result["missing_subtasks"]) == 12 and "count" in result["missing_subtasks"]
    again = [*rows, (rows[0][0], rows[0][1], "the first answer counts")]
    repeated = score_file("mme", answers(tmp_path, *again), data)
    assert repeated["total"] == 325 and repeated["repeated"] == 1


@pytest.mark.parametrize(
    ("said", "means"), [("Yes, it is", "yes"), (" yes", "yes"), ("No", "no"), ("Not at all", "no"), ("It is", "other")]
)
def test_mme_reads_four_characters(said, means):
    assert mme.says(said) == means


def test_scienceqa_total_and_pictures(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    problem = {"question": "Which?", "choices": ["x", "y", "z"], "hint": "", "answer": 1}
    (data / "problems.json").write_text(json.dumps(
        {"1": {**problem, "image": "image.png"}, "2": {**problem, "image": None},
         "3": {**problem, "image": "image.png"}, "9": problem}))  # fmt: skip
    (data / "pid_splits.json").write_text(json.dumps({"test": ["1", "2", "3"], "train": ["9"]}))
    file = answers(tmp_path, ("1", "<image>\nWhich?", "B"), ("2", "Which?", "B. y"), ("3", "<image>\nWhich?", "y"))
    result = score_file("scienceqa", file, data)
    assert result["accuracy"] == pytest.approx(200 / 3) and result["image_accuracy"] == 50


def test_scienceqa_counts_a_missing_answer_as_wrong_as_llava_does(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    problem = {"question": "Which?", "choices": ["x", "y"], "hint": "", "answer": 1, "image": "image.png"}
    (data / "problems.json").write_text(json.dumps({"1": problem, "2": problem}))
    (data / "pid_splits.json").write_text(json.dumps({"test": ["1", "2"]}))
    result = score_file("scienceqa", answers(tmp_path, ("2", "<image>\nWhich?", "B")), data)
    assert (result["accuracy"], result["image_accuracy"], result["missing"]) == (50, 100, 1)


@pytest.mark.parametrize(
    ("said", "choice"),
    [("B", 1), ("B. y", 1), ("The answer is B.", 1), ("So. The answer is C. Yes", 2), ("D", -1), ("b", -1), ("B.", -1),
     ("The answer is A. The answer is B.", -1), ("", -1), ("E", -1)],
)  # fmt: skip
def test_scienceqa_letters(said, choice):
    assert scienceqa.chosen(said, 3) == choice


def item(answer, source="s", number="1"):
    return Item(number, source, "x.png", "?", answer)


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [("105", "100", 1), ("105.1", "100", 0), ("Yes", "yes", 1), ("50%", "0.5", 1), ("0", "0", 1), ("0.0", "0", 0),
     ("-95", "-100", 1), ("95", "-100", 0), ("1,000", "1000", 0), ("blue", "blues", 0)],
)  # fmt: skip
def test_chartqa_is_relaxed_about_numbers_alone(said, true, right):
    assert chartqa.score(said, item(true)) == right


@pytest.mark.parametrize(
    ("said", "answer", "formula", "right"),
    [("The sign says STOP.", "stop", False, 1), ("sto p", "stop", False, 0), ("x ^ 2", "x^2", True, 1),
     ("X^2", "x^2", True, 0), ("two\nlines", "two lines", False, 1)],
)  # fmt: skip
def test_ocrbench_looks_for_the_answer(said, answer, formula, right):
    assert ocrbench.score(said, item({"any": ["nothing of it", answer], "formula": formula})) == right


OPTIONS = {"A": "red", "B": "dark blue", "C": "blue"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [("B", "B"), ("B. dark blue", "B"), ("(C)", "C"), ("A red one", "A"), ("Apple", ""), ("it is red", "A"),
     ("dark blue", ""), ("D", ""), ("", ""), ("The answer is C.", "C"), ("Option B", "B"), ("A B", ""),
     ("**C**", "C"), ("[B], I think", "B"), ("B is what I would say here", ""), ("C as in dark blue sea", ""),
     ("A. red or maybe another", "A"), ("b", ""), ("Z", "Z"), ("Cannot determine the answer from A", "Z"),
     ("it is red, " * 4, "")],
)  # fmt: skip
def test_mmbench_reads_the_letter_or_the_only_option_named(said, letter):
    assert mmbench.chosen(said, OPTIONS) == letter


def test_mmbench_counts_a_question_when_all_its_turns_are_right():
    answer = {"letter": "A", "options": OPTIONS}
    pairs = [("A", item(answer, number="1")), ("A", item(answer, number="1000001")),
             ("A", item(answer, number="2")), ("B", item(answer, number="1000002"))]  # fmt: skip
    scored = [get_task("mmbench").score(*pair) for pair in pairs]
    assert mmbench.summarise(scored) == {
        "accuracy": 50.0, "single_round": 100.0, "questions": 2, "evaluation": "circular"}  # fmt: skip
    assert mmbench.summarise(scored[2:3])["evaluation"] == "single round"


LINES = [
    "person, man, woman, baby",
    "toilet",
    "chair, seat",
    "tie",
    "dog, puppy",
    "hot dog",
    "bus",
    "knife",
    "bear",
    "teddy bear",
    "train",
    "wine glass",
]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Two puppies and a dog.", ["dog", "dog"]),
        ("a man eats a hot dog", ["person", "hot dog"]),
        ("women with knives near buses", ["person", "knife", "bus"]),
        ("a teddy bear and a baby bear", ["teddy bear", "bear"]),
        ("the passenger train, wine glasses", ["train", "wine glass"]),
        ("nothing here", []),
        ("a man's hand, the dogs' bowl and women's hats", ["person", "dog", "person"]),
        ("the man\u2019s dog isn't here.", ["person", "dog"]),
        ("a toilet seat", ["toilet"]),
        ("a toilet with its seat up beside a chair", ["toilet", "chair"]),
        ("seats and chairs", ["chair", "chair"]),
        ("a bus-stop, a man/woman sign and a dog-like thing", []),
        ('dog,man:bus (knife)... bear; "train"!', ["dog", "person", "bus", "knife", "bear", "train"]),
        ("baby animals and baby bears", ["bear"]),
        ("a baby and adult dogs", ["person", "dog"]),
        ("Two hot dogs. A hot day, dogs", ["hot dog", "dog"]),
        ("a **dog**, 'stop' and a 'train'; bus\u2014dog", ["dog", "train", "bus", "dog"]),
        ("a bow tie, bow ties", ["tie", "tie"]),
        ("passenger trains", ["train"]),
    ],
)
def test_chair_knows_synonyms_plurals_and_double_words(text, named):
    assert Objects(LINES).of(text) == named


def test_chair_takes_a_subset_of_images(tmp_path, capsys):
    data = tmp_path / "data"
    FILES["chair"](data)
    said = {n: ("A man and a dog." if n % 2 else "Nothing.") for n in range(12)}
    whole = answers(tmp_path, *[(n, "", text) for n, text in said.items()])
    assert score_file("chair", whole, data)["missing"] == 0
    # COCO's own form, and the names that papers' scripts write.
    file = lines(
        tmp_path / "captions.jsonl", [{"image_id": 3, "caption": said[3]}, {"image_id": 4, "caption": said[4]}]
    )
    part = score_file("chair", file, data)
    assert (part["items"], part["missing"], part["C_S"], part["C_I"]) == (2, 10, 50, 50)
    named = answers(
        tmp_path, ("COCO_val2014_000000000003.jpg", "", said[3]), ("COCO_val2014_000000000004", "", said[4])
    )
    assert score_file("chair", named, data)["C_I"] == 50
    (data / "chair_images.txt").write_text("7\nCOCO_val2014_000000000003.jpg\n\n")
    assert [item.id for item in get_task("chair").read(data)] == ["7", "3"]
    with pytest.raises(TaskError, match="line 2: question '4' is not in the annotations"):
        score_file("chair", file, data)
    (data / "chair_images.txt").write_text("7\n99\n")
    with pytest.raises(TaskError, match="chair_images.txt, line 2: image '99' is not in instances_val2014.json"):
        get_task("chair").read(data)


def test_chair_counts_what_is_invented():
    truth = {"1": {"dog", "person"}, "2": {"bus"}}
    result = chair_metrics({"1": "A dog and a bus and a dog.", "2": "One bus"}, truth, Objects(LINES))
    assert result == {"C_S": 50, "C_I": 25, "recall": pytest.approx(200 / 3), "length": 5}
    nothing = chair_metrics({"1": "sky", "2": "sky"}, truth, Objects(LINES))
    assert nothing["C_I"] is None and nothing["C_S"] == nothing["recall"] == 0


# ---- what is wrong is named ------------------------------------------------------------------------------------


def test_bad_files_stop_with_their_line(tmp_path):
    data = textvqa_data(tmp_path)
    ask = f"What colour?\n{S}"
    good = ("img1", ask, "red"), ("img1", f"What brand is this?\n{S}", "coke")
    with pytest.raises(TaskError, match=r"answers.jsonl, line 3: question 'img1/what colour\?' was answered in line 1"):
        score_file("textvqa", answers(tmp_path, *good, ("img1", ask, "blue")), data)
    with pytest.raises(TaskError, match="line 1: question 'img2/what colour.*not in the annotations"):
        score_file("textvqa", answers(tmp_path, ("img2", ask, "blue")), data)
    with pytest.raises(TaskError, match="no prediction for 1 of 2 questions, such as 'img1/what brand"):
        score_file("textvqa", answers(tmp_path, good[0]), data)
    with pytest.raises(TaskError, match="line 2: neither LLaVA's format"):
        file = answers(tmp_path, good[0])
        file.write_text(file.read_text() + '{"qid": 1, "answer": "x"}\n')
        score_file("textvqa", file, data)
    with pytest.raises(TaskError, match="line 1: the answer is no text but None"):
        score_file("textvqa", answers(tmp_path, ("img1", ask, None)), data)
    with pytest.raises(TaskError, match="line 1 is not valid JSON"):
        file.write_text("{nothing\n")
        score_file("textvqa", file, data)
    with pytest.raises(TaskError, match=r"testdev_balanced_questions.json is not in .*cs.stanford.edu"):
        score_file("gqa", answers(tmp_path, *good), data)
    with pytest.raises(TaskError, match="answers of vqav2_testdev are hidden"):
        score_file("vqav2_testdev", answers(tmp_path, *good), data)
    with pytest.raises(TaskError, match="scored by protocol 'llava', not 'lmms-eval'"):
        score_file("gqa", answers(tmp_path, *good), data, "lmms-eval")
    with pytest.raises(TaskError, match="did you mean 'textvqa'"):
        score_file("textvqaa", answers(tmp_path, *good), data)
