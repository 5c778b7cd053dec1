"""A dozen items of SEED-Bench, MMMU, MMStar, AI2D, DocVQA, InfographicVQA, RealWorldQA and LLaVA-Bench as published."""

import json

from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from prunetune.tiny_world import render, sample_scene

ASKED = ("where is the circle ?", "what number is shown ?", "what color is the red ring ?")
SAID = ("northwest", "4 7", "red")


def scene(seed):
    return Image.fromarray(render(sample_scene(seed)))


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    scene(seed).save(path, None if path.suffix else "PNG")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def parquet(path, rows, images=("image",)):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    for name in images:
        table = table.cast_column(name, ImageColumn())
    table.to_parquet(path)


def seedbench(data):
    """Twelve questions about images, with two about videos between them."""
    names = ["Scene Understanding", "Instance Identity", "Instance Location", "Instance Attributes"]
    questions = []
    for n in range(14):
        video = n in (3, 7)
        if not video:
            picture(data / "SEED-Bench-image" / f"{n % 5}_{n % 5}", n % 5)
        questions.append({"answer": "ABCD"[n % 3], "choice_a": SAID[0], "choice_b": SAID[1], "choice_c": SAID[2],
                          "choice_d": "none", "data_id": f"{n}.webm" if video else f"{n % 5}_{n % 5}",
                          "data_type": "video" if video else "image", "question": ASKED[n % 3],
                          "question_id": f"v{n}" if video else str(100 + n), "segment": None,
                          "question_type_id": 10 if video else 1 + n % 4})  # fmt: skip
    kinds = {name: number for number, name in enumerate(names, start=1)} | {"Action Recognition": 10}
    write(data / "SEED-Bench.json", {"questions": questions, "question_type": kinds})


def mmmu(data):
    """Nine questions with options and three open ones; some with two images, one with images for options."""
    rows = []
    for n in range(12):
        subject = ("Art", "Accounting", "Math")[n % 3]
        row = {"id": f"validation_{subject}_{n + 1}", "question": f"<image 1> {ASKED[n % 3]}", "answer": "ABC"[n % 3],
               "options": str(list(SAID)), "question_type": "multiple-choice", "explanation": "?",
               "image_1": scene(n), "image_2": None, "image_3": None}  # fmt: skip
        if n % 4 == 3:
            row |= {"options": "[]", "question_type": "open", "answer": ("0.5", "red", "1,000")[n // 4]}
        if n in (4, 5):
            row |= {"question": f"Compare <image 1> and <image 2>. {ASKED[n % 3]}", "image_2": scene(20 + n)}
        if n == 8:
            row |= {"question": f"{ASKED[2]} <image 1>", "options": "['<image 3>', '<image 2>', 'neither']"}
            row |= {"image_2": scene(30), "image_3": scene(31)}
        rows.append(row)
    other = rows[0] | {"id": "dev_Art_1"}  # lies in the same folder, and is another split's
    parquet(data / "data" / "validation-0.parquet", [*rows, other], ("image_1", "image_2", "image_3"))


MMSTAR = ("coarse perception", "math", "logical reasoning")


def mmstar(data):
    rows = []
    for n in range(12):
        options = ", ".join(f"{letter}: {said}" for letter, said in zip("ABC", SAID, strict=True))
        rows.append({"index": n, "question": f"{ASKED[n % 3]}\nOptions: {options} ", "image": scene(n),
                     "answer": "ABC"[n % 3], "category": MMSTAR[min(n % 5, 2)], "l2_category": f"kind {n % 4}",
                     "meta_info": {"source": "x", "split": "val", "image_path": f"{n}.jpg"}})  # fmt: skip
    parquet(data / "mmstar.parquet", rows)


def ai2d(data):
    for n in range(6):
        picture(data / "ai2d" / "images" / f"{n}.png", n)
        picture(data / "ai2d" / "abc_images" / f"{n}.png", 10 + n)
        questions = {}
        for k, text in enumerate((ASKED[n % 3], "What is A?")):
            questions[text] = {"abcLabel": k == 1, "answerTexts": [*SAID, "none"], "correctAnswer": (n + k) % 3,
                               "questionId": f"{n}.png-{k}"}  # fmt: skip
        write(data / "ai2d" / "questions" / f"{n}.png.json", {"imageName": f"{n}.png", "questions": questions})
    write(data / "ai2d" / "questions" / "99.png.json", {"imageName": "99.png", "questions": {}})  # a training diagram
    (data / "ai2d_test_ids.csv").write_text("".join(f"{n}\n" for n in (4, 0, 5, 1, 2, 3)))


def document(n, **others):
    return {"questionId": 500 + n, "question": ASKED[n % 3], "answers": [SAID[n % 3], f"the {SAID[n % 3]}"], **others}


def docvqa(data, file="val_v1.0_withQT.json", split="val"):
    records = []
    for n in range(12):
        picture(data / "documents" / f"p{n % 4}.png", n % 4)
        record = document(n, image=f"documents/p{n % 4}.png", docId=n % 4, data_split=split,
                          question_types=["form", "layout"] if n % 2 else ["form"])  # fmt: skip
        if split == "test":
            del record["answers"], record["question_types"]
        records.append(record)
    write(data / file, {"dataset_name": "docvqa", "dataset_split": split, "data": records})


def infovqa(data, file="infographicsVQA_val_v1.0_withQT.json", split="val"):
    records = []
    for n in range(12):
        picture(data / "images" / f"{n % 4}.jpeg", n % 4)
        record = document(n, image_local_name=f"{n % 4}.jpeg", image_url="https://example.org/x", data_split=split,
                          answer_type=["single span"], **{"operation/reasoning": []})  # fmt: skip
        if split == "test":
            del record["answers"], record["answer_type"]
        records.append(record)
    write(data / file, {"dataset_name": "infographicVQA", "dataset_split": split, "data": records})


def realworldqa(data):
    records = []
    for n in range(12):
        picture(data / "images" / f"{n}.webp", n)
        question = f"{ASKED[n % 3]}\n\nA. {SAID[0]}\nB. {SAID[1]}\nC. {SAID[2]}\nPlease answer directly."
        answer = "ABC"[n % 3] if n % 4 else "Downhill"
        records.append({"image": f"{n}.webp", "question": question, "answer": answer})
    write(data / "annotations.json", records)


def llava_bench(data):
    questions, answers, contexts = [], [], []
    for n in range(12):
        image = f"{n % 4:03d}.jpg"
        picture(data / "images" / image, n % 4)
        questions.append({"question_id": n, "image": image, "category": ("conv", "detail", "complex")[n % 3],
                          "text": ASKED[n % 3]})  # fmt: skip
        answers.append({"question_id": n, "prompt": ASKED[n % 3], "answer_id": f"a{n}", "model_id": "gpt-4",
                        "text": f"GPT-4 says {SAID[n % 3]}."})  # fmt: skip
        if n < 4:
            contexts.append({"id": str(n), "image": image, "caption": f"A scene numbered {n}."})
    write_lines(data / "questions.jsonl", questions)
    write_lines(data / "answers_gpt4.jsonl", answers)
    write_lines(data / "context.jsonl", contexts)


MORE = {
    "ai2d": ai2d,
    "docvqa": docvqa,
    "docvqa_test": lambda data: docvqa(data, "test_v1.0.json", "test"),
    "infovqa": infovqa,
    "infovqa_test": lambda data: infovqa(data, "infographicsVQA_test_v1.0.json", "test"),
    "llava_bench": llava_bench,
    "mmmu": mmmu,
    "mmstar": mmstar,
    "realworldqa": realworldqa,
    "seedbench": seedbench,
}
