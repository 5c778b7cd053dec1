"""The lmms-lab layout gives the same questions, answers and pictures as the published files."""

import json

import pytest
from benchmark_files import FILES
from datasets import Dataset
from datasets import Image as ImageColumn

from prunetune.configs import EvaluateConfig, load_config
from prunetune.evaluation.lmms_lab import ParquetRows
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError, get_task, tasks

ROWS = [name for name, task in tasks().items() if any(isinstance(reader, ParquetRows) for reader in task.readers)]


def row_of(name, item):
    """What lmms-lab's data set has for an item of the published files."""
    question = item.question.split("\n")[0]
    answers = item.answer
    if name == "gqa":
        kind = "query" if item.source == "open" else "verify"
        return {"id": item.id, "imageId": item.image.split(".")[0], "question": question, "answer": answers,
                "types": {"structural": kind, **item.kinds}}  # fmt: skip
    if name.startswith("textvqa"):
        return {"image_id": item.id.split("/")[0], "question": question, "answers": answers, "ocr_tokens": ["4", "7"]}
    if name in ("vqav2", "okvqa"):
        return {"question_id": int(item.id), "question": question, "answer_type": item.source,
                "answers": [{"answer": a} for a in answers]}  # fmt: skip
    if name == "vizwiz":
        return {"question_id": item.id, "question": question, "answers": answers, "category": item.source}
    if name == "pope":
        category, image, _ = item.id.split("/")
        return {"category": category, "image_source": image, "question": question, "answer": answers}
    if name == "mme":
        subtask, stem, _ = item.id.split("/")
        return {"question_id": f"{subtask}/{stem}.png", "question": f"{question} Please answer yes or no.",
                "answer": answers.capitalize(), "category": subtask}  # fmt: skip
    if name == "scienceqa":
        lines = item.question.splitlines()
        return {"question": lines[1], "hint": "N/A", "choices": [line[3:] for line in lines[2:-1]],
                "answer": answers["index"],
                "subject": {"NAT": "natural science", "LAN": "language science"}[item.kinds["subject"]]}  # fmt: skip
    if name.startswith("mmbench"):
        options = {letter: answers["options"].get(letter, "nan") for letter in "ABCD"}
        hint = question if question == "look" else "nan"
        asked = item.question.split("\n")[1 if hint != "nan" else 0]
        return {"index": int(item.id), "hint": hint, "question": asked, "answer": answers["letter"], **options,
                "category": item.source}  # fmt: skip
    if name == "mmvet":
        return {"question_id": f"v1_{item.id}", "question": question, "answer": "", "capability": "ocr"}
    if name == "coco_caption":
        return {"question_id": "x", "id": int(item.id), "question": "Please carefully observe", "answer": answers}
    if name == "nocaps":
        return {"image_id": int(item.id), "annotations_captions": answers, "image_domain": item.source}
    if name == "chartqa":
        return {"type": f"{item.source}_test", "question": question, "answer": answers}
    return {"question_type": item.source, "question": item.question, "answer": answers["any"],
            "dataset": "HME100k" if answers["formula"] else "set"}  # fmt: skip


@pytest.fixture
def both(tmp_path):
    """A task's published files and the same as Parquet."""

    def make(name):
        published, lab = tmp_path / "published", tmp_path / "lab" / "data"
        FILES[name](published)
        lab.mkdir(parents=True)
        task = get_task(name)
        questions = task.open(published)
        items, images = questions.items, questions.open_images()
        pictures = [None if item.image is None else images.open(item.image, item.id) for item in items]
        rows = [row_of(name, item) for item in items]
        if name == "gqa":
            names = {row["imageId"]: picture for row, picture in zip(rows, pictures, strict=True)}
            own = Dataset.from_list([{"id": key, "image": picture} for key, picture in names.items()])
            own.cast_column("image", ImageColumn()).to_parquet(lab / "pictures.parquet")
        else:
            rows = [row | {"image": picture} for row, picture in zip(rows, pictures, strict=True)]
        table = Dataset.from_list(rows)
        table = table.cast_column("image", ImageColumn()) if name != "gqa" else table
        table.select(range(7)).to_parquet(lab / "test-0.parquet")
        table.select(range(7, 12)).to_parquet(lab / "test-1.parquet")
        return published, tmp_path / "lab"

    return make


def test_sixteen_benchmarks_come_in_two_layouts():
    assert len(ROWS) == 16


@pytest.mark.parametrize("name", ROWS)
def test_both_layouts_hold_the_same(name, both):
    published, lab = both(name)
    task = get_task(name)
    theirs, ours = task.open(published), task.open(lab)
    loose = name in ("scienceqa", "chartqa", "ocrbench")  # these rows carry no id of their own
    for one, other in zip(theirs.items, ours.items, strict=True):
        assert (one.source, one.answer, one.kinds) == (other.source, other.answer, other.kinds)
        assert one.question == other.question and (loose or one.id == other.id)
        if one.image is None:
            assert other.image is None
            continue
        first = theirs.open_images().open(one.image, "")
        assert list(first.getdata()) == list(ours.open_images().open(other.image, "").getdata())


def test_an_arm_runs_on_it(both, untrained_folder, tmp_path):
    _, lab = both("gqa")
    config = load_config(EvaluateConfig, None, [
        "--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks", "[gqa]", "--data", str(lab),
        "--batch_size", "4", "--max_new_tokens", "2", "--output", str(tmp_path / "arm")])  # fmt: skip
    folder = evaluate(config)
    assert len(read_results(folder)) == 12
    assert json.loads((folder / "manifest.json").read_text())["metrics"]["gqa"]["accuracy"] >= 0


def test_other_columns_and_two_splits_are_named(tmp_path, both):
    Dataset.from_list([{"question": "q", "id": 1}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(TaskError, match=r"of gqa have no column 'types'"):
        get_task("gqa").read(tmp_path)
    _, lab = both("vqav2")
    (lab / "again.parquet").write_bytes((lab / "data" / "test-0.parquet").read_bytes())
    with pytest.raises(TaskError, match="questions of vqav2 repeat"):
        get_task("vqav2").read(lab)
