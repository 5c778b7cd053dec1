"""Questions on which arms differ, collected from finished evaluations for the report."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from conftest import TINY_VLM
from PIL import Image

from prunetune.configs import EvaluateConfig, ModelConfig, load_config
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.run.examples import collect_examples, told_answer
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.run.panels import ShownArm
from prunetune.evaluation.tasks import get_task
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.tiny_world.recipe import SceneImages

TASK = "tiny_world_validation"
SPECS = {"dense": PruningSpec(), "d36": PruningSpec("divprune", 36), "d9": PruningSpec("divprune", 9)}


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """A dense arm and one method at two budgets, each evaluated on 60 questions."""
    folder = tmp_path_factory.mktemp("arms")
    dense = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu")
    found = []
    for name, spec in SPECS.items():
        line = ["--model.path", str(TINY_VLM), "--model.dtype", "float32", "--tasks", f"[{TASK}]", "--limit", "60",
                "--batch_size", "20", "--pruning.pruner", spec.pruner, "--output", str(folder / name)]  # fmt: skip
        if name != "dense":
            line += ["--pruning.keep", str(spec.keep)]
        evaluate(load_config(EvaluateConfig, None, line))
        found.append(ShownArm(f"arm {name}", dense.with_pruning(spec), folder / name, id=name))
    return found


@pytest.fixture(scope="module")
def collected(arms):
    return collect_examples(arms, TASK, count=6)


def test_every_example_flips_and_no_picture_comes_twice(arms, collected):
    rows = {own.id: {row.id: row for row in read_results(own.folder)} for own in arms}
    pictures = set()
    for example in collected.examples:
        assert set(example.arms) == set(SPECS) and example.task == TASK
        for name, answered in example.arms.items():
            row = rows[name][example.id]
            assert (answered.prediction, answered.score) == (row.prediction, row.score)
            assert (example.question, example.answer) == (row.question, row.answer)
            assert len(answered.kept) == row.kept and answered.grid == (12, 12)
            pictures.add(row.image)
        scores = [answered.score for answered in example.arms.values()]
        assert scores[1:] != [scores[0]] * 2
    assert len(collected.examples) == len(pictures) == 6
    # The first question that 36 tokens lose, before any that 9 tokens alone lose.
    items = get_task(TASK).read(None)[:60]
    lost = [item.id for item in items if rows["dense"][item.id].score > rows["d36"][item.id].score]
    gained = [item.id for item in items if rows["dense"][item.id].score < rows["d36"][item.id].score]
    assert collected.examples[0].id == (gained or lost)[0]


def test_kept_tokens_and_pictures_are_those_of_the_model(arms, collected):
    """Against the model on a batch of all questions, and against the scenes themselves."""
    items = {item.id: item for item in get_task(TASK).read(None)}
    samples = [sample_of(items[example.id]) for example in collected.examples]
    for own in arms:
        inputs = own.arm.place(own.arm.formatter(SceneImages()).prompt_batch(samples))
        with torch.inference_mode():
            mask = own.arm.pruned.prepare(inputs).chosen["image"].kept_tokens().reshape(len(samples), 144)
        for example, expected in zip(collected.examples, mask, strict=True):
            assert example.arms[own.id].kept == expected.nonzero()[:, 0].tolist()
    for example, sample in zip(collected.examples, samples, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(example.picture.data))).convert("RGB"), dtype=int)
        assert example.picture.media == "image/png"
        assert np.abs(picture - np.asarray(SceneImages().open(sample.image, sample.id).convert("RGB"))).max() <= 1


def test_pairs_say_whose_flips_are_shown(arms):
    rows = {own.id: {row.id: row for row in read_results(own.folder)} for own in arms}
    found = collect_examples(arms, TASK, count=100, pairs=[("d36", "d9")]).examples
    assert found and all(one.arms["d36"].score != one.arms["d9"].score for one in found)
    flips = {row.image for row in rows["d9"].values() if row.score != rows["d36"][row.id].score}
    assert len(found) == len(flips)
    assert collect_examples(arms[:1], TASK).examples == []  # an arm alone flips nothing


def test_what_can_not_be_shown_is_one_line(arms, tmp_path):
    with pytest.raises(TaskError, match="no arm of these has the id 'tuned'; there are dense, d36, d9"):
        collect_examples(arms, TASK, pairs=[("dense", "tuned")])
    with pytest.raises(TaskError, match="dense holds no answer to tiny_world that has a score; choose a task that"):
        collect_examples(arms, "tiny_world")


def test_right_answers_are_told_in_words():
    assert told_answer("yes") == "yes"
    assert told_answer(["red", "dark red", "red"]) == "red, dark red"
    assert told_answer({"answer": "é"}) == '{"answer": "é"}'
