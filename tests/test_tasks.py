"""Each benchmark end to end on small files in its published format: files, prompts, answers, score, resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_files import FILES, S
from conftest import ROOT

from prunetune.configs import EvaluateConfig, load_config, to_yaml
from prunetune.evaluation.records import read_manifest, read_results, write_manifest
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError, get_task, tasks
from prunetune.evaluation.tasks.video import NAMES as VIDEO
from prunetune.train.launchers import free_port


@pytest.fixture
def settings(untrained_folder, tmp_path):
    def make(task, name, *overrides):
        base = ["--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks", f"[{task}]",
                "--data", str(tmp_path / "data"), "--batch_size", "3", "--max_new_tokens", "2",
                "--pruning.pruner", "divprune", "--pruning.keep", "16", "--output", str(tmp_path / name)]  # fmt: skip
        return load_config(EvaluateConfig, None, [*base, *overrides])

    return make


def test_every_benchmark_is_proved_end_to_end():
    elsewhere = {*VIDEO, "mvbench", "videomme"}  # tests/test_video.py
    assert set(FILES) | elsewhere == {name for name in tasks() if not name.startswith(("tiny_world", "hard_world"))}


CAPTIONS = pytest.mark.skipif(shutil.which("java") is None, reason="the caption tokenizer needs Java")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=CAPTIONS) if n in ("coco_caption", "nocaps") else n for n in FILES]
)
def test_files_to_score_and_a_second_run_resumes(name, settings, tmp_path):
    FILES[name](tmp_path / "data")
    task = get_task(name)
    items = task.read(tmp_path / "data")
    assert len({item.id for item in items}) == len(items) == 12
    folder = evaluate(settings(name, "whole"))
    rows = read_results(folder)
    assert [row.id for row in rows] == [item.id for item in items]
    assert all(row.question == item.question for row, item in zip(rows, items, strict=True))
    images = {row.id: row.image.count(",") + 1 if row.image and "/" in row.image else 1 for row in rows}
    several = images if name == "mmmu" else {}  # each image has the budget to itself
    assert all(row.kept in (0, 16 * several.get(row.id, 1)) for row in rows)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"][name]

    if task.hidden:
        text = (folder / metrics["upload"]).read_text()
        if name == "llava_bench":  # a line for each, as LLaVA's judging script reads them
            upload = [json.loads(line) for line in text.splitlines()]
            assert [row["text"] for row in upload] == [row.prediction for row in rows]
        else:
            upload = json.loads(text)
            assert name == "mmvet" or all("answer" in row for row in upload)
        assert len(upload) == 12
        (value,) = compare([folder]).rows[0].values.values()
        assert value.value is None and value.note == f"hidden answers: {metrics['upload']}"
    else:
        again = score_file(name, folder / "results.jsonl", tmp_path / "data")
        assert {key: again[key] for key in metrics if key != "upload"} == {
            k: v for k, v in metrics.items() if k != "upload"
        }
        values = compare([folder]).rows[0].values
        assert values and all(key.startswith(f"{name}/") for key in values)

    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    part = settings(name, "part")
    Path(part.output).mkdir()
    write_manifest(Path(part.output), unfinished(folder))
    (Path(part.output) / "results.jsonl").write_text("".join(lines[:7]))
    assert (evaluate(part) / "results.jsonl").read_text() == "".join(lines)


def unfinished(folder):
    """The manifest of an arm as it was before its last item was answered."""
    outcome = ("metrics", "kept_tokens", "items_per_second", "results_hash")
    return read_manifest(folder).model_copy(update={"complete": False, **dict.fromkeys(outcome)})


def test_prompts_are_the_published_ones(tmp_path):
    for name, fill in FILES.items():
        fill(tmp_path / name)
    asked = {name: get_task(name).read(tmp_path / name)[1].question for name in FILES}
    assert asked["gqa"] == f"what number is shown ?\n{S}"
    assert asked["textvqa"] == f"What number is shown ? 1\nReference OCR token: 4, 7\n{S}"
    assert asked["textvqa_no_ocr"] == f"What number is shown ? 1\n{S}"
    assert asked["vizwiz"].splitlines() == [
        "what number is shown ?",
        "When the provided information is insufficient, respond with 'Unanswerable'.",
        S,
    ]
    assert asked["okvqa"].splitlines() == asked["vizwiz"].splitlines()
    assert asked["scienceqa"].endswith("C. red\nAnswer with the option's letter from the given choices directly.")
    assert asked["mme"] == f"Is there a star?\n{S}" and asked["pope"] == f"Is there a star in the image?\n{S}"


def test_one_folder_holds_the_files_of_many_tasks(settings, tmp_path):
    FILES["gqa"](tmp_path / "data" / "gqa")
    FILES["textvqa"](tmp_path / "data" / "textvqa")
    folder = evaluate(settings("gqa, textvqa_no_ocr", "both", "--limit", "3"))
    assert json.loads((folder / "manifest.json").read_text())["metrics"].keys() == {"gqa", "textvqa_no_ocr"}


def test_missing_files_are_named_with_their_source(settings, tmp_path):
    with pytest.raises(TaskError, match=r"data folder .* does not exist"):
        evaluate(settings("gqa", "a"))
    with pytest.raises(TaskError, match=r"testdev_balanced_questions.json is not in <data is not set>"):
        evaluate(settings("gqa", "a").model_copy(update={"data": None}))
    (tmp_path / "data").mkdir()
    for name in FILES:
        with pytest.raises(TaskError, match=r"(get it from|name the folder)"):
            evaluate(settings(name, "a"))


def test_two_ranks_write_what_one_process_writes(settings, tmp_path):
    """Under torchrun; and shards that a killed run left behind are taken in by the next, on any number of ranks."""
    FILES["gqa"](tmp_path / "data")
    whole = evaluate(settings("gqa", "whole", "--batch_size", "2"))
    config = settings("gqa", "two", "--batch_size", "2")
    file = tmp_path / "two.yaml"
    file.write_text(to_yaml(config))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
            "-m", "prunetune", "evaluate", "--config", str(file)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert (two / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (two, whole))
    for key in ("metrics", "kept_tokens", "complete"):
        assert ours[key] == theirs[key]
    assert not list(two.glob("results.rank*"))

    lines = (two / "results.jsonl").read_text().splitlines(keepends=True)
    (two / "results.jsonl").write_text("".join(lines[:2]))
    (two / "results.rank0.jsonl").write_text("".join(lines[6:8]))
    (two / "results.rank2.jsonl").write_text("".join(lines[8:11]) + lines[11][:20])
    write_manifest(two, unfinished(two))
    assert (evaluate(config) / "results.jsonl").read_text() == "".join(lines)


@CAPTIONS
def test_captions_are_scored_by_the_coco_servers_code():
    from prunetune.evaluation.metrics.captions import caption_metrics

    people = {"1": ["A red ring on the left.", "the ring is red"], "2": ["a blue star", "There is a star!"]}
    same = caption_metrics({"1": "A red ring, on the left", "2": "there is a star"}, people)
    assert same["BLEU-4"] == pytest.approx(1) and same["CIDEr"] > 4
    other = caption_metrics({"1": "two dogs", "2": "a green hill"}, people)
    assert other["CIDEr"] < 0.2 and other["BLEU-1"] < 0.3


@pytest.mark.parametrize("name", ["vqav2_testdev", "vizwiz_test", "mmvet"])
def test_questions_without_picture_or_with_a_repeated_id_stop_with_their_line(name, tmp_path):
    FILES[name](tmp_path)
    file = next(tmp_path.glob("*.jsonl"))
    lines = file.read_text().splitlines()
    broken = json.loads(lines[4])
    del broken["image"]
    file.write_text("\n".join([*lines[:4], json.dumps(broken), *lines[5:]]))
    with pytest.raises(TaskError, match=r"jsonl, line 5: question .*4.* has no image"):
        get_task(name).read(tmp_path)
    file.write_text("\n".join([*lines, lines[2]]))
    with pytest.raises(TaskError, match=r"jsonl, line 13: question_id .* is in line 3 already"):
        get_task(name).read(tmp_path)


@pytest.mark.parametrize("name", ["gqa", "vqav2", "vizwiz", "chartqa", "ocrbench", "scienceqa", "nocaps", "chair"])
def test_files_of_another_kind_are_named(name, tmp_path):
    FILES[name](tmp_path)
    for file in tmp_path.glob("*.json"):
        value = json.loads(file.read_text())
        strip = {"question", "questions", "query", "problems", "images", "test", "structural", "1"}
        text = json.dumps(value)
        for key in strip:
            text = text.replace(f'"{key}":', f'"no_{key}":')
        file.write_text(text)
    with pytest.raises(TaskError, match=rf"a record of {name}'s files in .* has no '"):
        get_task(name).read(tmp_path)
