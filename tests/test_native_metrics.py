"""Every benchmark's native metrics: what its summary says, from counts, with intervals of those very metrics."""

import dataclasses
import shutil

import numpy as np
import pytest
from benchmark_files import FILES
from test_scored_once import stub
from video_world import write_videos

from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.metrics import metric as module
from prunetune.evaluation.metrics.metric import interval, resampled
from prunetune.evaluation.records import read_results
from prunetune.evaluation.report.rows import item_of
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import Item, Scored, get_task, mmbench, mme, tasks
from prunetune.evaluation.tasks.base import items_hash
from prunetune.evaluation.tasks.captions import METRICS as CAPTIONS

JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="the caption tokenizer needs Java")
WORLDS = ("tiny_world", "hard_world")
WITH = [name for name, task in tasks().items() if not task.hidden]
# Where the summary has a metric by another name or on another scale; by the metric's own name otherwise.
ELSEWHERE = {
    ("pope", "f1"): lambda found: percent(found["mean"]["f1"]),
    ("pope", "accuracy"): lambda found: percent(found["mean"]["accuracy"]),
    ("coco_caption", "CIDEr"): lambda found: percent(found["CIDEr"]),
    ("nocaps", "CIDEr"): lambda found: percent(found["CIDEr"]),
}


def percent(share):
    return None if share is None else 100 * share


def expected(task, name, found):
    return ELSEWHERE.get((task.name, name), lambda found: found[name])(found)


def words_of(answer):
    """All texts and letters in an answer, whatever its form."""
    if isinstance(answer, dict):
        return [word for value in answer.values() for word in words_of(value)]
    if isinstance(answer, list):
        return [word for value in answer for word in words_of(value)]
    return [str(answer)]


def items_of(name, folder):
    task = get_task(name)
    folder.mkdir(exist_ok=True)
    if name in FILES:
        FILES[name](folder)
    elif task.video:
        write_videos(folder, name)
    return task.read(folder)[:60]


@pytest.mark.parametrize("name", [pytest.param(n, marks=JAVA) if n in ("coco_caption", "nocaps") else n for n in WITH])
def test_metrics_from_counts_are_those_of_the_summary(name, tmp_path):
    task, random = get_task(name), np.random.default_rng(7)
    items = items_of(name, tmp_path / "data")
    pool = ["yes", "no", "A", "B", "C", "a man and a dog", "nothing of it"]
    for item in items:
        pool += words_of(item.answer)[:3]
    for _ in range(4 if task.scorer.score.__name__ == "score_as_a_set" else 20):
        said = [pool[index] for index in random.integers(len(pool), size=len(items))]
        scored = [task.score(text, item) for text, item in zip(said, items, strict=True)]
        found = task.summarise(scored).metrics
        for metric in task.scorer.metrics:
            one, other = metric.of(scored), expected(task, metric.name, found)
            assert one == pytest.approx(other, abs=1e-9) if other is not None else one is None, metric.name
    names = [metric.name for metric in task.scorer.metrics]
    assert len(set(names)) == len(names)


def test_headlines_are_what_papers_print():
    first = {name: get_task(name).scorer.metrics[0] for name in WITH}
    assert {name: (one.name, one.unit) for name, one in first.items() if one.name != "accuracy"} == {
        "chair": ("C_S", "%"), "coco_caption": ("CIDEr", "score"), "mme": ("perception", "points"),
        "mvbench": ("task_mean", "%"), "nocaps": ("CIDEr", "score"), "ocrbench": ("score", "points"),
        "pope": ("f1", "%"), "scienceqa": ("image_accuracy", "%"), "docvqa": ("anls", "%"), "infovqa": ("anls", "%"),
        "mmstar": ("average", "%")}  # fmt: skip
    assert [one.name for one in get_task("chair").scorer.metrics if not one.higher] == ["C_S", "C_I"]


def pope_world(random):
    """Forty questions in each category about ten pictures, some of which two categories ask about."""
    scored = []
    for category in ("adversarial", "popular", "random"):
        for picture in range(10):
            for number in range(4):
                name = f"{picture}.jpg"
                item = Item(f"{category}/{name}/q{number}", category, name, "?", ("yes", "no")[number % 2])
                scored.append(Scored("", item, float(random.random() < 0.7)))
    return get_task("pope"), scored, lambda item: item.image, lambda item, _: item


def mme_world(random):
    scored = []
    for subtask in ("existence", "OCR", "code_reasoning"):
        for picture in range(12):
            for number in range(2):
                item = Item(f"{subtask}/{picture}/q{number}", subtask, f"{subtask}/{picture}.png", "?", "yes")
                scored.append(Scored("", item, float(random.random() < 0.6)))

    def copy(item, turn):
        subtask, picture, question = item.id.split("/")
        return dataclasses.replace(item, id=f"{subtask}/{picture}~{turn}/{question}")

    return get_task("mme"), scored, lambda item: item.image, copy


def mmbench_world(random):
    scored = []
    for question in range(30):
        for turn in range(2 + question % 3):
            item = Item(str(question + turn * mmbench.ROUND), "kind", "index:1", "?", {})
            scored.append(Scored("", item, float(random.random() < 0.8)))

    def copy(item, turn):
        question, copies = int(item.id) % mmbench.ROUND, int(item.id) // mmbench.ROUND
        return dataclasses.replace(item, id=str(question + 1000 * turn + copies * mmbench.ROUND))

    return get_task("mmbench"), scored, lambda item: str(int(item.id) % mmbench.ROUND), copy


def chair_world(random):
    words = ["person, man, woman", "dog, puppy", "bus", "cat"]
    said = ["a man", "two dogs and a bus", "cats, a woman and a dog", "the sky and a bus", "nothing"]
    scored = []
    for number in range(25):
        there = [name for name in ("person", "dog", "bus", "cat") if random.random() < 0.6]
        item = Item(f"{number:02d}", "coco", f"{number:02d}.jpg", "?", {"objects": there, "words": words})
        scored.append(Scored(said[random.integers(5)], item, None))
    return get_task("chair"), scored, lambda item: item.id, lambda item, turn: dataclasses.replace(
        item, id=f"{item.id}~{turn}"
    )  # fmt: skip


def scienceqa_world(random):
    scored = []
    for number in range(30):
        image = f"{number:02d}/image.png" if number % 3 else None
        item = Item(f"{number:02d}", "image" if image else "text", image, "?", {"index": 0, "choices": 2})
        scored.append(Scored("", item, float(random.random() < 0.6)))
    return get_task("scienceqa"), scored, lambda item: item.image or item.id, lambda item, _: item


def mvbench_world(random):
    scored = []
    for task in ("action", "count"):
        for number in range(20 if task == "action" else 8):
            item = Item(f"{task}/{number}", task, f"{number:02d}.mp4", "?", {})
            scored.append(Scored("", item, float(random.random() < (0.4 if task == "action" else 0.8))))
    return get_task("mvbench"), scored, lambda item: item.image, lambda item, _: item


@pytest.mark.parametrize("world", [pope_world, mme_world, mmbench_world, chair_world, scienceqa_world, mvbench_world])
def test_an_interval_is_that_of_the_very_metric(world, monkeypatch):
    """Against a slow loop: draw units, copy their items, and let the benchmark summarise what was drawn."""
    monkeypatch.setattr(module, "RESAMPLES", 200)
    task, scored, unit_of, copy = world(np.random.default_rng(3))
    units = {}
    for one in scored:
        units.setdefault(unit_of(one.item), []).append(one)
    names = sorted(units)
    draws = np.random.default_rng(0).integers(len(names), size=(200, len(names)))
    slow = {metric.name: [] for metric in task.scorer.metrics}
    for draw in draws:
        drawn = []
        for turn, index in enumerate(draw):
            drawn += [dataclasses.replace(one, item=copy(one.item, turn)) for one in units[names[index]]]
        found = task.scorer.summarise(drawn)
        for metric in task.scorer.metrics:
            slow[metric.name].append(expected(task, metric.name, found))
    stated = task.summarise(scored).metrics["intervals"]
    for metric in task.scorer.metrics:
        fast = metric.value(resampled([metric.tally(scored)])[:, 0])
        np.testing.assert_allclose(fast, np.array(slow[metric.name], dtype=float), rtol=0, atol=1e-9)
        low, high = np.percentile(slow[metric.name], [2.5, 97.5])
        assert interval(fast) == pytest.approx((low, high), abs=1e-9) and low < high
        # The mean score has its interval in interval_95, as every benchmark's has.
        if metric.name != "accuracy" or world in (pope_world, mmbench_world):
            assert stated[metric.name] == pytest.approx([low, high], abs=1e-9)


@JAVA
def test_cider_has_an_interval_over_pictures_with_the_whole_sets_frequencies(monkeypatch):
    from pycocoevalcap.cider.cider import Cider

    monkeypatch.setattr(module, "RESAMPLES", 200)
    random = np.random.default_rng(5)
    vocabulary = ["red", "blue", "ring", "star", "circle", "left", "right", "above", "below", "big"]
    scored, said, people = [], {}, {}
    for number in range(20):  # single words in lower case: the tokenizer leaves them as they are
        texts = [" ".join(random.choice(vocabulary, 6)) for _ in range(3)]
        name, answer = f"{number:02d}", " ".join([*texts[0].split()[:4], "ring"])
        scored.append(Scored(answer, Item(name, "coco", f"{name}.jpg", "?", texts), None))
        said[name], people[name] = [answer], texts
    _, by_image = Cider().compute_score(people, said)
    draws = np.random.default_rng(0).integers(20, size=(200, 20))
    slow = [100 * np.mean([by_image[index] for index in draw]) for draw in draws]
    (metric,) = CAPTIONS
    np.testing.assert_allclose(metric.value(resampled([metric.tally(scored)])[:, 0]), slow, rtol=0, atol=1e-9)
    found = get_task("coco_caption").summarise(scored)
    assert metric.of(scored) == pytest.approx(100 * found.metrics["CIDEr"], abs=1e-9)
    assert found.metrics["intervals"]["CIDEr"] == pytest.approx(list(np.percentile(slow, [2.5, 97.5])), abs=1e-9)
    assert found.interval_95 is None


def test_a_sum_of_no_subtask_is_no_number():
    task, scored, *_ = mme_world(np.random.default_rng(0))
    own = [one for one in scored if one.item.source in mme.PERCEPTION]
    found = task.summarise(own).metrics
    assert found["cognition"] is None and found["total"] == found["perception"]
    assert {metric.name: metric.of(own) for metric in task.scorer.metrics}["cognition"] is None


def test_kinds_tell_questions_apart_and_are_in_no_hash(tmp_path):
    task, items = get_task("gqa"), items_of("gqa", tmp_path / "gqa")
    assert task.kinds(items[0]) == {"form": "binary", "structural": "verify", "semantic": "attr"}
    without = [dataclasses.replace(item, kinds={}) for item in items]
    assert items_hash(without) == items_hash(items)
    assert get_task("vqav2").kinds(Item("1", "yes/no", "x", "?", [])) == {"answer type": "yes/no"}
    assert get_task("mmbench").kinds(Item("1", "ocr", "x", "?", {})) == {"category": "ocr"}


def test_rows_hold_the_kinds_that_a_source_does_not(tmp_path):
    for name in ("scienceqa", "vqav2"):
        FILES[name](tmp_path / "data" / name)
    config = EvaluateConfig(model=ModelConfig(path="none"), tasks=["scienceqa", "vqav2"], batch_size=4,
                            data=str(tmp_path / "data"), output=str(tmp_path / "arm"))  # fmt: skip
    folder = evaluate(config, stub(config))
    rows = {name: [row for row in read_results(folder) if row.task == name] for name in config.tasks}
    task = get_task("scienceqa")
    assert [task.kinds(item_of(row))["subject"] for row in rows["scienceqa"]] == ["NAT", "LAN"] * 6
    assert {task.kinds(item_of(row))["picture"] for row in rows["scienceqa"]} == {"image", "text"}
    assert not any(row.kinds for row in rows["vqav2"]) and '"kinds"' not in rows["vqav2"][0].to_line()


@pytest.mark.parametrize("world", [pope_world, mme_world])
def test_questions_of_no_known_part_are_in_no_metric(world):
    task, scored, *_ = world(np.random.default_rng(1))
    other = [dataclasses.replace(one, item=dataclasses.replace(one.item, source="else")) for one in scored[:7]]
    rest = scored[7:]
    for metric in task.scorer.metrics:
        whole = expected(task, metric.name, task.scorer.summarise([*rest, *other]))
        assert metric.of([*rest, *other]) == pytest.approx(whole) == metric.of(rest)
