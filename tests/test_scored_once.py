"""A prediction is scored once: when it is answered, or when it is read. Nothing that computes metrics scores again.

A comparison scores once more, to check what is stored, and computes with what is stored.
"""

import dataclasses
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from benchmark_files import FILES
from video_world import write_videos

from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.records import read_results
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import Item, TaskError, base, get_task, tasks
from prunetune.evaluation.tasks.video import NAMES as VIDEO
from prunetune.evaluation.tasks.video import write_predictions
from prunetune.models import Answer
from prunetune.models.stored import BaseHashes


def stub(config):
    """An arm without a model, which says "yes" to everything."""

    def answer(formatter, samples, max_new_tokens, share_prefix=False):
        return [Answer(sample.id, "yes", 0 if sample.image is None else 16) for sample in samples]

    return SimpleNamespace(
        base=SimpleNamespace(
            config=config.model, hashes=BaseHashes("f", "o", ("p",)), settings_hash="s", exported=None
        ),
        text_tower_hash=None,
        spec=config.pruning,
        adapter=None,
        profile=None,
        pruning=config.pruning,
        template="t",
        template_hash="t",
        projector_hash="p",
        processor=SimpleNamespace(image_processor=None),
        device=torch.device("cpu"),
        formatter=lambda images: None,
        answer=answer,
        pruned=SimpleNamespace(family=SimpleNamespace(name="stub", pixels=("image", "video"))),
    )


@pytest.fixture
def calls(monkeypatch):
    """Count how often a benchmark's score is computed, by its scorer or by its name within its module."""

    def count(name):
        task, counted = get_task(name), Counter()
        if task.hidden:
            return counted
        real = task.scorer.score

        def score(prediction, item):
            counted[item.id] += 1
            return real(prediction, item)

        monkeypatch.setattr(sys.modules[real.__module__], real.__name__, score)
        scorer = dataclasses.replace(task.scorer, score=score)
        monkeypatch.setitem(base._TASKS, name, dataclasses.replace(task, scorer=scorer))
        return counted

    return count


def config(name, folder):
    model, data, output = ModelConfig(path="none"), str(folder / "data"), str(folder / "arm")
    return EvaluateConfig(model=model, tasks=[name], limit=12, batch_size=4, data=data, output=output)


@pytest.mark.parametrize("name", list(tasks()))
def test_an_answer_is_scored_when_it_is_made_and_never_again(name, calls, tmp_path):
    if name in ("coco_caption", "nocaps") and shutil.which("java") is None:
        pytest.skip("the caption tokenizer needs Java")
    (tmp_path / "data").mkdir()
    if name in FILES:
        FILES[name](tmp_path / "data")
    elif get_task(name).video:
        write_videos(tmp_path / "data", name)
    counted = calls(name)
    arm = config(name, tmp_path)
    folder = evaluate(arm, stub(arm))
    rows = read_results(folder)
    once = {} if get_task(name).hidden else {row.id: 1 for row in rows}
    assert len(rows) == (4 if get_task(name).video else 12) and counted == once
    evaluate(arm, stub(arm))  # a finished arm: its metrics are written again, its answers are not scored again
    assert counted == once
    if rows[0].score is not None:
        compare([folder])  # which takes no score at its word: it scores each once more, and keeps the stored ones
        assert counted == dict.fromkeys(once, 2)


@pytest.mark.parametrize("name", [name for name in tasks() if not name.startswith(("tiny_world", "hard_world"))])
def test_a_saved_prediction_is_scored_when_it_is_read_and_never_again(name, calls, tmp_path):
    if name in ("coco_caption", "nocaps") and shutil.which("java") is None:
        pytest.skip("the caption tokenizer needs Java")
    data, counted = tmp_path / "data", calls(name)
    if name in VIDEO:
        data.mkdir()
        (data / "test_q.json").write_text('[{"video_name": "v", "question_id": "q", "question": "what ?"}]')
        (data / "test_a.json").write_text('[{"question_id": "q", "answer": "dog"}]')
        items = get_task(name).read_answers(data)
    else:
        if get_task(name).video:
            data.mkdir()
            write_videos(data, name)
        else:
            FILES[name](data)
        items = get_task(name).read(data)
    write_predictions([("yes", item) for item in items], tmp_path / "said.jsonl")
    if get_task(name).hidden:
        with pytest.raises(TaskError, match="are hidden|are judged"):
            score_file(name, tmp_path / "said.jsonl", data)
        return
    score_file(name, tmp_path / "said.jsonl", data)
    assert counted == {item.id: 1 for item in items}


def test_the_count_notices_a_summary_that_scores_again(calls):
    counted = calls("chartqa")
    module, item = sys.modules["prunetune.evaluation.tasks.chartqa"], Item("1", "human", None, "?", "yes")
    scored = get_task("chartqa").score("yes", item)
    module.summarise([scored])
    assert counted == {"1": 1}
    module.score("yes", item)
    assert counted == {"1": 2}
