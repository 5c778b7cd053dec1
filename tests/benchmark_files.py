"""A dozen items of each benchmark in its published file format, with pictures drawn on the spot."""

import base64
import csv
import io

from more_benchmark_files import MORE, picture, write, write_lines
from PIL import Image

from prunetune.tiny_world import render, sample_scene

S = "Answer the question using a single word or phrase."
HINT = "When the provided information is insufficient, respond with 'Unanswerable'."
ASKED = ("where is the circle ?", "what number is shown ?", "what color is the red ring ?")
SAID = ("northwest", "4 7", "red")


def ten(answer):
    return [answer] * 8 + ["something else"] * 2


def gqa(data):
    questions = {}
    for n in range(12):
        picture(data / "images" / f"{n % 4}.jpg", n % 4)
        kind = "query" if n % 2 else "verify"
        questions[str(n)] = {"question": ASKED[n % 3], "answer": SAID[n % 3], "imageId": str(n % 4),
                             "isBalanced": True,
                             "types": {"structural": kind, "semantic": ("attr", "rel")[n // 6]}}  # fmt: skip
    write(data / "testdev_balanced_questions.json", questions)


def textvqa(data):
    annotations, asked = [], []
    for n in range(12):
        image, question = f"img{n % 4}", f"{ASKED[n % 3]} {n}"
        picture(data / "train_images" / f"{image}.jpg", n % 4)
        annotations.append({"image_id": image, "question": question, "answers": ten(SAID[n % 3])})
        asked.append(
            {"question_id": image, "image": f"{image}.jpg", "text": f"{question}\nReference OCR token: 4, 7\n{S}"}
        )
    write(data / "TextVQA_0.5.1_val.json", {"data": annotations})
    write_lines(data / "llava_textvqa_val_v051_ocr.jsonl", asked)


def coco_vqa(data, questions, annotations):
    asked, answered = [], []
    for n in range(12):
        picture(data / "val2014" / f"COCO_val2014_{n % 4:012d}.jpg", n % 4)
        asked.append({"question_id": n, "image_id": n % 4, "question": ASKED[n % 3]})
        answered.append({"question_id": n, "answer_type": ("yes/no", "number", "other")[n % 3],
                         "answers": [{"answer": a} for a in ten(SAID[n % 3])]})  # fmt: skip
    write(data / questions, {"questions": asked})
    write(data / annotations, {"annotations": answered})


def vqav2(data):
    coco_vqa(data, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")


def okvqa(data):
    coco_vqa(data, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


def vqav2_testdev(data):
    for n in range(4):
        picture(data / "test2015" / f"{n}.jpg", n)
    asked = [{"question_id": n, "image": f"{n % 4}.jpg", "text": f"{ASKED[n % 3]}\n{S}"} for n in range(12)]
    write_lines(data / "llava_vqav2_mscoco_test-dev2015.jsonl", asked)


def vizwiz(data):
    records = []
    for n in range(12):
        picture(data / "val" / f"VizWiz_val_{n}.jpg", n)
        records.append({"image": f"VizWiz_val_{n}.jpg", "question": ASKED[n % 3], "answer_type": "other",
                        "answers": [{"answer": a} for a in ten(SAID[n % 3])]})  # fmt: skip
    write(data / "val.json", records)


def vizwiz_test(data):
    for n in range(12):
        picture(data / "test" / f"VizWiz_test_{n}.jpg", n)
    write_lines(data / "llava_test.jsonl",
                [{"question_id": f"VizWiz_test_{n}.jpg", "image": f"VizWiz_test_{n}.jpg",
                  "text": f"{ASKED[n % 3]}\n{HINT}\n{S}"} for n in range(12)])  # fmt: skip


def pope(data):
    for category in ("adversarial", "popular", "random"):
        labels = []
        for n in range(4):
            picture(data / "val2014" / f"COCO_val2014_{n}.jpg", n)
            labels.append({"question_id": n + 1, "image": f"COCO_val2014_{n}.jpg",
                           "text": f"Is there a {('ring', 'star')[n % 2]} in the image?",
                           "label": ("yes", "no")[n % 2]})  # fmt: skip
        write_lines(data / "coco" / f"coco_pope_{category}.json", labels)


def mme(data):
    for subtask in ("existence", "OCR", "code_reasoning"):
        for n in range(2):
            picture(data / "MME_Benchmark_release_version" / subtask / f"{n}.png", n)
            (data / "MME_Benchmark_release_version" / subtask / f"{n}.txt").write_text(
                "Is there a ring? Please answer yes or no.\tYes\nIs there a star? Please answer yes or no.\tNo\n"
            )


def scienceqa(data):
    problems, asked = {}, []
    for n in range(12):
        image = "image.png" if n % 3 else None
        if image:
            picture(data / "test" / str(n) / image, n)
        problems[str(n)] = {
            "question": ASKED[n % 3],
            "choices": list(SAID),
            "hint": "",
            "image": image,
            "answer": n % 3,
            "subject": ("natural science", "language science")[n % 2],
        }
        choices = "\n".join(f"{letter}. {said}" for letter, said in zip("ABC", SAID, strict=True))
        text = f"Context: N/A\n{ASKED[n % 3]}\n{choices}"
        asked.append({"id": str(n), "conversations": [{"from": "human", "value": ("<image>\n" if image else "") + text},
                                                      {"from": "gpt", "value": "B"}]})  # fmt: skip
    write(data / "problems.json", problems)
    write(data / "pid_splits.json", {"test": [str(n) for n in range(12)]})
    write(data / "llava_test_CQM-A.json", asked)


def mmbench(data, file="mmbench_dev_20230712.tsv"):
    """Six questions and their circular copies, which name the row that holds the picture."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / file).open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"])
        for n in range(12):
            own, turn = n % 6, n // 6
            memory = io.BytesIO()
            Image.fromarray(render(sample_scene(own))).save(memory, "PNG")
            options = [SAID[(k + turn) % 3] for k in range(3)]
            picture = base64.b64encode(memory.getvalue()).decode() if turn == 0 else str(own)
            table.writerow([own + turn * 1_000_000, ASKED[own % 3], "look" if own else "nan", *options, "",
                            "ABC"[options.index(SAID[own % 3])], "kind", picture])  # fmt: skip


def mmvet(data):
    for n in range(12):
        picture(data / "images" / f"v1_{n}.png", n)
    write_lines(
        data / "llava-mm-vet.jsonl",
        [{"question_id": n, "image": f"v1_{n}.png", "text": ASKED[n % 3]} for n in range(12)],
    )


def chartqa(data):
    for kind in ("human", "augmented"):
        for n in range(6):
            picture(data / "png" / f"{kind}{n}.png", n)
        records = [{"imgname": f"{kind}{n}.png", "query": ASKED[n % 3], "label": SAID[n % 3]} for n in range(6)]
        write(data / f"test_{kind}.json", records)


def ocrbench(data):
    records = []
    for n in range(12):
        picture(data / "OCRBench_Images" / "set" / f"{n}.jpg", n)
        answers = [SAID[n % 3], "other"] if n % 2 else SAID[n % 3]
        records.append({"dataset_name": "HME100k" if n == 11 else "set", "type": f"kind {n % 2}", "id": n,
                        "question": ASKED[n % 3], "answers": answers, "image_path": f"set/{n}.jpg"})  # fmt: skip
    write(data / "OCRBench.json", records)


def captions(data, file, folder, domains=()):
    images, annotations = [], []
    for n in range(12):
        picture(data / folder / f"{n:012d}.jpg", n)
        image = {"id": n, "file_name": f"{n:012d}.jpg"}
        images.append(image | ({"domain": domains[n % len(domains)]} if domains else {}))
        annotations += [
            {"image_id": n, "id": 2 * n + k, "caption": f"A {SAID[n % 3]} thing, seen {k}."} for k in (0, 1)
        ]
    write(data / file, {"images": images, "annotations": annotations})


def chair(data):
    data.mkdir(parents=True, exist_ok=True)
    (data / "synonyms.txt").write_text("person, man, woman\ndog, puppy\nhot dog\nbus\n")
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in range(12)]
    for n, image in enumerate(images):
        picture(data / "val2014" / image["file_name"], n)
    write(data / "instances_val2014.json",
          {"images": images, "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
           "annotations": [{"image_id": n, "category_id": 1 + n % 2} for n in range(12)]})  # fmt: skip
    write(data / "captions_val2014.json",
          {"annotations": [{"image_id": 3, "caption": "A bus."}, {"image_id": 99, "caption": "a man"}]})  # fmt: skip


FILES = {
    "chair": chair,
    "chartqa": chartqa,
    "coco_caption": lambda data: captions(data, "captions_val2017.json", "val2017"),
    "nocaps": lambda data: captions(data, "nocaps_val_4500_captions.json", "val", ("in-domain", "out-domain")),
    "gqa": gqa,
    "mmbench": mmbench,
    "mmbench_cn": lambda data: mmbench(data, "mmbench_dev_cn_20231003.tsv"),
    "mme": mme,
    "mmvet": mmvet,
    "ocrbench": ocrbench,
    "okvqa": okvqa,
    "pope": pope,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "textvqa_no_ocr": textvqa,
    "vizwiz": vizwiz,
    "vizwiz_test": vizwiz_test,
    "vqav2": vqav2,
    "vqav2_testdev": vqav2_testdev,
    **MORE,
}
