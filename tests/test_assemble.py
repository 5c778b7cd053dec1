"""Tables of arms made by hand: every number is counted once more, or computed by a slow oracle."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from synthetic_arms import BENCHMARKS, f1, questions, register, says, write_arm
from synthetic_arms import right as is_right

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.metrics.metric import tallied
from prunetune.evaluation.records import CodeRecord, TaskSummary
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.places import without_folders
from prunetune.evaluation.report.quoted import Quote
from prunetune.evaluation.report.tables.arms import ArmRuns
from prunetune.evaluation.report.tables.assemble import assemble
from prunetune.evaluation.tasks.base import ACCURACY, Benchmark, Scorer
from prunetune.pruning import PruningSpec

DIVPRUNE = ("divprune", 16)
MANY, FEW = questions(1000), questions(36)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def arm(tmp_path):
    def write(name, answers, *more, **fields):
        return write_arm(tmp_path / name, answers, *more, **fields)

    return write


def many_and_few(many, few):
    return {"many": (MANY, says(many, 1000)), "few": (FEW, says(few, 36))}


def named(table):
    return {row.label: row for row in table.rows}


# ---- averages --------------------------------------------------------------------------------------------------


def test_the_relative_average_is_the_papers_and_not_that_of_pooled_items(arm):
    """A small benchmark that collapses beside a large one that does not: 97.8 % pooled, 72.2 % as papers count."""
    dense = arm("dense", many_and_few(873, 36))
    pruned = arm("pruned", many_and_few(873, 16), DIVPRUNE)
    table = compare([pruned, dense])
    one, other = table.rows
    assert (one.label, other.label) == ("dense", "divprune")
    assert 100 * other.pooled.value / one.pooled.value == pytest.approx(97.8, abs=0.05)
    assert other.relative.value == pytest.approx((100 + 100 * 16 / 36) / 2) == pytest.approx(72.2, abs=0.05)
    assert other.pooled.value == pytest.approx(100 * 889 / 1036) and one.relative.value == 100
    assert other.values["few/accuracy"].value == pytest.approx(100 * 16 / 36)
    assert any("mean of pruned / dense over many/accuracy, few/accuracy" in note for note in table.footnotes)


def test_intervals_of_metric_and_averages_equal_a_bootstrap_written_as_loops(arm):
    """Of an F1, whose interval is none of a mean, and of the relative average with the dense arm in every sample."""
    random = np.random.default_rng(0)
    items = [item if n % 3 else item.__class__(item.id, item.source, item.image, item.question, "no")
             for n, item in enumerate(questions(90, per_image=3, answer="yes"))]  # fmt: skip
    truth = np.array([item.answer for item in items])

    def answers(chance):
        flip = random.random(90) > chance
        return np.where(flip, np.where(truth == "yes", "no", "yes"), truth).tolist()

    few = questions(40, per_image=2)
    said = {"dense": answers(0.9), "free": answers(0.7)}
    right = {"dense": random.random(40) < 0.9, "free": random.random(40) < 0.5}
    folders = []
    for name, spec in (("dense", ("identity", "100%")), ("free", DIVPRUNE)):
        own = {"yes_no": (items, said[name]), "few": (few, np.where(right[name], "a", "b").tolist())}
        folders.append(arm(name, own, spec))
    dense, free = compare(folders).rows

    def counts(name, images):
        places = np.concatenate([np.arange(3 * image, 3 * image + 3) for image in images])
        yes, true = np.array(said[name])[places] == "yes", truth[places] == "yes"
        return f1(np.array([np.sum(yes & true), np.sum(yes & ~true), np.sum(true & ~yes)], dtype=float))

    def accuracy(name, images):
        return np.mean([right[name][2 * image : 2 * image + 2].mean() for image in images])

    found, shares = [], []
    for _ in range(4000):
        images, others = random.integers(0, 30, 30), random.integers(0, 20, 20)
        found.append(counts("free", images))
        ratios = [
            counts("free", images) / counts("dense", images),
            accuracy("free", others) / accuracy("dense", others),
        ]
        shares.append(100 * np.mean(ratios))
    value = free.values["yes_no/f1"]
    assert value.value == pytest.approx(counts("free", range(30)))
    assert value.interval == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=1.0)
    assert free.relative.interval == pytest.approx(np.percentile(shares, [2.5, 97.5]), abs=1.5)
    assert dense.relative.interval == pytest.approx((100, 100))
    assert set(free.values) == {"yes_no/f1", "yes_no/accuracy", "few/accuracy"}


def test_the_interval_of_a_benchmark_is_the_same_whatever_stands_beside_it(arm):
    alone = compare([arm("alone", {"few": (FEW, says(20, 36))})])
    beside = compare([arm("beside", many_and_few(700, 20))])
    key = "few/accuracy"
    assert alone.rows[0].values[key] == beside.rows[0].values[key]


def test_two_benchmarks_of_equal_size_are_drawn_apart(arm):
    """Drawn by the same numbers, the samples of two benchmarks with the same answers would fall and rise together."""
    same = {"few": (FEW, says(18, 36)), "many": (FEW, says(18, 36))}
    full = {"few": (FEW, says(36, 36)), "many": (FEW, says(36, 36))}
    pruned = compare([arm("dense", full), arm("pruned", same, DIVPRUNE)]).rows[1]
    low, high = pruned.values["few/accuracy"].interval
    width = pruned.relative.interval[1] - pruned.relative.interval[0]
    assert width == pytest.approx((high - low) / 2**0.5, rel=0.06)


def test_sets_hidden_answers_and_faults_stand_as_what_they_are(arm, monkeypatch):
    upload = TaskSummary(metrics={}, interval_95=None, upload="secret_upload.json")
    hidden = (questions(3, answer=None), ["x", "y", "z"])

    def own(number, cider):
        sets = TaskSummary(metrics={"CIDEr": cider, "by_domain": {"near": 1.0}}, interval_95=None)
        answers = {"few": (FEW, says(number, 36)), "faults": (FEW, says(number, 36)),
                   "captions": (questions(4), ["x"] * 4), "secret": hidden}  # fmt: skip
        return {"answers": answers, "metrics": {"captions": sets, "secret": upload}}

    dense, free = own(36, 1.1), own(18, 0.9)
    folders = [arm("dense", **dense), arm("free", **free, pruning=DIVPRUNE)]
    tuned = own(27, 1.0)
    folders.append(arm("tuned", **tuned, pruning=DIVPRUNE, adapter="a"))
    table = compare(folders)
    assert [column.key for column in table.columns] == [
        "few/accuracy", "faults/errors", "captions/CIDEr", "secret/accuracy"]  # fmt: skip
    row = table.rows[2]
    assert row.values["captions/CIDEr"].value == 1.0 and row.values["captions/CIDEr"].interval is None
    assert row.values["secret/accuracy"].value is None
    assert row.values["secret/accuracy"].note == "hidden answers: secret_upload.json"
    assert row.values["faults/errors"].value == 25
    assert row.relative.value == pytest.approx(75)  # of `few` alone
    (note,) = [note for note in table.footnotes if note.startswith("Relative average")]
    assert "over few/accuracy" in note and "faults/errors (less is better)" in note
    assert "captions/CIDEr (a score of the whole set)" in note and "secret_upload.json" in note
    gain = row.gains["captions/CIDEr"]
    assert gain.value == pytest.approx(0.1) and gain.interval is None and gain.p is None
    assert row.gains["faults/errors"].value == pytest.approx(-25) and "secret/accuracy" not in row.gains


def test_a_metric_that_is_not_defined_is_no_number_and_no_error(arm):
    items = questions(6, answer="no")
    dense = arm("dense", {"yes_no": (items, ["no"] * 6)})
    free = arm("free", {"yes_no": (items, ["no"] * 3 + ["yes"] * 3)}, DIVPRUNE)
    tuned = arm("tuned", {"yes_no": (items, ["no"] * 6)}, DIVPRUNE, adapter="a")
    table = compare([dense, free, tuned])
    row = table.rows[1]
    assert table.rows[0].values["yes_no/f1"].value is None
    assert table.rows[0].values["yes_no/f1"].note == "not defined for these answers"
    assert row.values["yes_no/f1"].value == 0 and row.values["yes_no/accuracy"].value == 50
    assert row.relative.value is None and row.relative.note == "the dense arm has no yes_no/f1 to be a share of"
    assert set(table.rows[2].gains) == {"yes_no/accuracy"} and table.rows[2].relative_gain is None


# ---- differences -----------------------------------------------------------------------------------------------


def test_independent_questions_are_tested_by_mcnemar_and_images_by_exchanges(arm):
    single, double = questions(10), questions(10, per_image=2)
    free = {"few": (single, says(3, 10)), "many": (double, says(3, 10))}
    tuned = {"few": (single, says(9, 10)), "many": (double, says(9, 10))}
    dense = {"few": (single, says(10, 10)), "many": (double, says(10, 10))}
    table = compare([arm("dense", dense), arm("free", free, DIVPRUNE), arm("tuned", tuned, DIVPRUNE, adapter="a")])
    row = table.rows[2]
    assert row.twin == table.rows[1].id and table.rows[1].gains == {}
    one, other = row.gains["few/accuracy"], row.gains["many/accuracy"]
    assert one.value == other.value == pytest.approx(60)
    assert one.test == "McNemar, exact" and one.p == pytest.approx(2 / 2**6)
    # Images differ by 0, 1, 2, 2, 1 questions: of the 16 ways to exchange those four, two are as far apart.
    assert other.test == "paired permutation" and other.p == pytest.approx(2 / 16, abs=0.01)
    assert one.interval[0] < 60 < one.interval[1]
    # Of both: the exchanges of ten units, with every difference of a half of its share.
    steps = [10 / 2] * 6 + [5, 10, 10, 5]
    every = [abs(sum(sign * step for sign, step in zip(signs, steps, strict=True)))
             for signs in product((1, -1), repeat=10)]  # fmt: skip
    exact = np.mean(np.array(every) >= sum(steps) - 1e-9)
    assert row.relative_gain.value == pytest.approx(60) and row.relative_gain.p == pytest.approx(exact, abs=0.002)
    assert row.pooled_gain.value == pytest.approx(60) and row.pooled_gain.test == "paired permutation"
    tested = [*row.gains.values(), row.relative_gain, row.pooled_gain]
    assert min(gain.adjusted for gain in tested) == pytest.approx(4 * min(gain.p for gain in tested))
    assert any("Holm-corrected over the 4 differences" in note for note in table.footnotes)


def test_of_one_benchmark_the_averages_are_not_tested_again(arm):
    folders = [arm("dense", {"few": (FEW, says(36, 36))}), arm("free", {"few": (FEW, says(10, 36))}, DIVPRUNE),
               arm("tuned", {"few": (FEW, says(20, 36))}, DIVPRUNE, adapter="a")]  # fmt: skip
    row = compare(folders).rows[2]
    assert row.gains["few/accuracy"].p == row.gains["few/accuracy"].adjusted == pytest.approx(2 / 2**10)
    assert row.relative_gain.p is None and row.relative_gain.interval[0] > 0
    assert row.pooled_gain.p is None and row.pooled_gain.value == row.gains["few/accuracy"].value


# ---- trainings -------------------------------------------------------------------------------------------------


def trained(arm, name, right, **more):
    return arm(name, {"few": (FEW, says(right, 36))}, DIVPRUNE, adapter=f"runs/{name}/adapter", **more)


def test_trainings_are_averaged_and_their_spread_stands_apart(arm):
    dense = arm("dense", {"few": (FEW, says(36, 36))})
    free = arm("free", {"few": (FEW, says(9, 36))}, DIVPRUNE)
    seeds = [trained(arm, f"seed{n}", right) for n, right in enumerate((18, 24, 27))]
    table = assemble([dense, free, ArmRuns("ours", seeds)])
    row = table.rows[2]
    value = row.values["few/accuracy"]
    each = np.array([18, 24, 27]) / 0.36
    assert row.label == "ours" and value.seeds == 3 and row.facts["trainings"] == 3
    assert value.value == pytest.approx(each.mean()) and value.between == pytest.approx(each.std(ddof=1))
    assert row.relative.value == pytest.approx(each.mean()) and row.relative.between == pytest.approx(value.between)
    gain = row.gains["few/accuracy"]
    assert gain.value == pytest.approx(each.mean() - 25) and gain.test == "paired permutation" and gain.p < 0.01
    # Over images: the mean of the three answers to a question is what is drawn.
    mean = np.array([sum(place < right for right in (18, 24, 27)) / 3 for place in range(36)])
    random = np.random.default_rng(0)
    draws = 100 * mean[random.integers(0, 36, (4000, 36))].mean(axis=1)
    assert value.interval == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=1.0)
    assert len(row.folders) == 3 and row.facts["adapter_hash"].count(" ") == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"tuned_for": PruningSpec("divprune", 9)}, "can't be one row: they differ in projector.tuned_for"),
        ({"elastic": {"budgets": [16]}}, "can't be one row: they differ in projector.elastic"),
    ],
)
def test_what_is_no_training_of_the_same_is_no_row(arm, second, message):
    free = arm("free", {"few": (FEW, says(9, 36))}, DIVPRUNE)
    seeds = [trained(arm, "seed0", 18), trained(arm, "seed1", 20, **second)]
    with pytest.raises(TaskError, match=message):
        assemble([free, ArmRuns("", seeds)])
    with pytest.raises(TaskError, match="only arms with a recalibrated projector"):
        assemble([ArmRuns("", [seeds[0], free])])
    again = arm("again", {"few": (FEW, says(18, 36))}, DIVPRUNE, adapter="runs/seed0/adapter")
    with pytest.raises(TaskError, match="ran with the same projector; name every training once"):
        assemble([free, ArmRuns("", [seeds[0], again])])
    with pytest.raises(TaskError, match="names no folder"):
        assemble([free, ArmRuns("empty", [])])


# ---- labels ----------------------------------------------------------------------------------------------------


def test_labels_and_ids_tell_any_two_adapters_apart(arm):
    free = [arm(f"free{keep}", {"few": (FEW, says(9, 36))}, ("divprune", keep)) for keep in (16, 9)]
    tuned = [
        arm(f"{name}{keep}", {"few": (FEW, says(12, 36))}, ("divprune", keep), adapter=f"runs/{name}/adapter",
            tuned_for=PruningSpec("divprune", 16))
        for name, keep in (("rate1", 16), ("rate2", 16), ("rate1", 9))
    ]  # fmt: skip
    table = compare([*tuned, *free])
    assert [(row.label, row.budget) for row in table.rows] == [
        ("divprune", "16"),
        ("divprune + tuned projector [rate1]", "16"),
        ("divprune + tuned projector [rate2]", "16"),
        ("divprune", "9"),
        ("divprune + tuned projector (for divprune, 16)", "9"),
    ]
    assert len({row.id for row in table.rows}) == 5 and table.rows[1].id == "divprune-tuned-projector-rate1-16"
    assert [row.projector for row in table.rows] == ["training-free", "tuned", "tuned", "training-free", "other"]
    assert [row.twin for row in table.rows] == [None, "divprune-16", "divprune-16", None, "divprune-9"]
    assert compare([*free, *reversed(tuned)]) == table  # whatever the order in which they are named


def test_adapters_of_one_folder_are_told_apart_by_their_hashes(arm):
    free = arm("free", {"few": (FEW, says(9, 36))}, DIVPRUNE)
    tuned = [arm(name, {"few": (FEW, says(12, 36))}, DIVPRUNE, adapter=f"{name}/run/adapter") for name in ("x", "y")]
    labels = [row.label for row in compare([free, *tuned]).rows]
    assert labels == ["divprune", *(f"divprune + tuned projector [{name}/run/ad]" for name in ("x", "y"))]
    with pytest.raises(TaskError, match="is named twice"):
        compare([free, free])


def test_a_method_is_called_as_it_was_named(arm):
    few, options = {"few": (FEW, says(9, 36))}, {"important_ratio": 0.3}
    free = [arm(f"free{n}", few, ("vispruner", 16, options)) for n in (1, 2)]
    tuned = arm("tuned", few, ("vispruner", 16, options), adapter="a")
    runs = [ArmRuns("", [free[0]], method="vispruner_30"), ArmRuns("", [free[1]], method="again"),
            ArmRuns("", [tuned], method="vispruner_30")]  # fmt: skip
    labels = [row.label for row in assemble(runs).rows]
    assert sorted(labels) == ["again", "vispruner_30", "vispruner_30 + tuned projector"]
    assert [row.label for row in compare([free[0]]).rows] == ["vispruner (important_ratio=0.3)"]
    assert {row.method for row in assemble(runs).rows} == {"vispruner"}


def test_no_folder_of_this_machine_stands_in_a_table(arm, tmp_path):
    """Rows that nothing but their folders tells apart, as a table of one benchmark has them, a path for a model, and
    notes that name files."""
    few = {"few": (FEW, says(9, 36))}
    fields = {"model": str(tmp_path / "models" / "tiny"), "device": "a GPU"}
    spec = PruningSpec("crisprune", 16, text_tower=str(tmp_path / "towers" / "clip"))
    runs = [arm(f"arms/{name}/few", few, ("identity", "100%"), **fields) for name in ("one", "other")]
    runs.append(arm("arms/third/few", few, **{**fields, "pruning": spec, "device": "another"}))
    runs = [folder.resolve() for folder in runs]
    lost = f"Left out: x failed (TaskError: {tmp_path}/arms/y/few/results.jsonl: no such file, /elsewhere/of/it)."
    table = assemble(runs, allow=["device"], output=tmp_path, notes=[lost])
    assert [row.label for row in table.rows] == ["dense [one/few]", "dense [other/few]", "crisprune"]
    assert table.footnotes[-1] == "Left out: x failed (TaskError: arms/y/few/results.jsonl: no such file, it)."
    assert "Allowed to differ, device: a GPU (one/few, other/few); another (third/few)." in table.footnotes
    assert str(tmp_path) not in table.model_dump_json() and table.rows[0].model == "tiny"
    assert (
        without_folders("and/or, https://a.b/c/d, 3/4 of ../x/y, 5 /s")
        == "and/or, https://a.b/c/d, 3/4 of ../x/y, 5 /s"
    )


# ---- kinds of questions, and the hard part ---------------------------------------------------------------------


def test_the_headline_stands_by_kind_of_question(arm):
    items = questions(12, kinds=("colour", "place", "count"))
    row = compare([arm("a", {"few": (items, ["a", "b", "a"] * 4)})]).rows[0]
    kinds = row.by_type["few/accuracy"]
    assert {kind: value.value for kind, value in kinds.items()} == {"colour": 100, "count": 100, "place": 0}
    assert kinds["place"].interval == (0, 0)
    assert compare([arm("b", {"few": (FEW, says(3, 36))})]).rows[0].by_type == {}


def test_the_hard_part_is_what_downsampling_gets_wrong(arm):
    other_items = questions(60)

    def both(first, second):
        return {"many": (other_items, says(first, 60)), "few": (FEW, says(second, 36))}

    down = arm("down", both(40, 30), ("downsample", 16))
    dense, free = arm("dense", both(60, 36)), arm("free", both(50, 33), DIVPRUNE)
    table = assemble([dense, free], baseline=down)
    row = table.rows[1]
    assert row.hard["many"].value == 50 and row.hard["few"].value == 50
    assert row.values["many/accuracy"].value == pytest.approx(100 * 50 / 60)
    assert row.hard["many"].interval[0] > 20
    assert any("Hard part: 26 of 96 items" in note for note in table.footnotes)
    with pytest.raises(TaskError, match="no training-free arm of downsample"):
        assemble([dense], baseline=free)
    easy = arm("easy", both(60, 36), ("downsample", 15))
    with pytest.raises(TaskError, match="so no item is hard"):
        compare([dense], hard_for=easy)
    # A table was hours of work: it stands without a hard part, and says why.
    table = assemble([dense, free], baseline=easy)
    assert all(row.hard == {} for row in table.rows) and table.rows[1].values == row.values
    assert "No hard part: downsample at 15 answers everything; use a smaller budget." in table.footnotes
    other = arm("other", both(10, 3), ("downsample", 16), model="another/model-13b")
    with pytest.raises(TaskError, match=r"differ in frozen_hash"):
        assemble([dense], baseline=other)


def test_the_hard_part_is_never_counted_by_a_metric_of_sets(arm, monkeypatch):
    """Of an F1, and of circles of two questions that count only if both are right: a hard half of a circle would be a
    whole one, and the perfect arm's F1 over nothing but "no" would be none."""
    items = questions(8, per_image=2, answer="no")

    def circles(scored):
        rights = [one.score * other.score for one, other in zip(scored[::2], scored[1::2], strict=True)]
        return tallied([str(place) for place in range(len(rights))], [(right, 1.0) for right in rights])

    circular = replace(ACCURACY, name="accuracy", tally=circles)
    registered = Benchmark("circles", "by hand", "question", "", [], Scorer(is_right, metrics=(circular,)))
    register(monkeypatch, circles=registered)
    said = {"down": ["no", "yes"] * 4, "free": ["yes", "no", "yes", "yes"] * 2, "dense": ["no"] * 8}
    specs = {"down": ("downsample", 16), "free": DIVPRUNE, "dense": ("identity", "100%")}
    folders = {}
    for name, answers in said.items():
        folders[name] = arm(name, {"yes_no": (items, answers), "circles": (items, answers)}, specs[name])
    dense, free = assemble([folders["dense"], folders["free"]], baseline=folders["down"]).rows
    assert dense.values["circles/accuracy"].value == 100 and free.values["circles/accuracy"].value == 0
    # The second question of each image: two of the four.
    assert {name: value.value for name, value in free.hard.items()} == {"yes_no": 50, "circles": 50}
    assert {name: value.value for name, value in dense.hard.items()} == {"yes_no": 100, "circles": 100}


# ---- what may differ -------------------------------------------------------------------------------------------


def test_a_field_that_differs_is_refused_or_allowed_and_told(arm):
    dense = arm("dense", {"few": (FEW, says(36, 36))}, device="one GPU")
    free = arm("free", {"few": (FEW, says(9, 36))}, DIVPRUNE, device="another", versions={"torch": "4"})
    with pytest.raises(TaskError, match=r"differ in device \('one GPU' and 'another'\).*--allow device"):
        compare([dense, free])
    with pytest.raises(TaskError, match=r"differ in versions.torch .*--allow versions.torch"):
        compare([dense, free], allow=["device"])
    table = compare([dense, free], allow=["device, versions.torch"])
    assert "Allowed to differ, device: one GPU (dense); another (free)." in table.footnotes
    assert "Allowed to differ, versions.torch: 3 (dense); 4 (free)." in table.footnotes
    assert compare([dense, free], allow=["device", "versions"]).rows == table.rows


def cells(arm, name, right, *more, **by_task):
    """Write an arm of a table: a folder for each benchmark, whose manifests may say different things."""
    return [[arm(f"{name}/{task}", {task: (FEW, says(right, 36))}, *more, **by_task[task]) for task in by_task]]


def test_evaluations_of_one_arm_may_differ_in_what_arms_may(arm):
    """A benchmark that was added on another machine."""
    here, there = {"device": "here"}, {"device": "there"}
    dense = ArmRuns("", cells(arm, "dense", 36, many=here, few=there))
    free = ArmRuns("", cells(arm, "free", 9, DIVPRUNE, many=here, few=here))
    with pytest.raises(TaskError, match=r"not of one arm: they differ in device .*; allow it with device"):
        assemble([dense, free])
    table = assemble([dense, free], allow=["device"])
    assert "Allowed to differ, device: here (dense/many, free); there (dense/few)." in table.footnotes
    other = ArmRuns("", cells(arm, "other", 9, DIVPRUNE, many={}, few={"template_hash": "another"}))
    with pytest.raises(TaskError, match="not of one arm: they differ in template_hash"):
        assemble([other], allow=["device"])


def test_sources_may_change_between_benchmarks_but_not_between_twins(arm):
    first, second = ({"prunetune": CodeRecord(version="1", sha256=mark * 64, commit=None, dirty=None)} for mark in "cd")
    free = ArmRuns("", cells(arm, "free", 9, DIVPRUNE, many=first, few=second))
    tuned = ArmRuns("", cells(arm, "tuned", 20, DIVPRUNE, "a", many=first, few=second))
    table = assemble([free, tuned])
    assert table.rows[1].gains["few/accuracy"].value == pytest.approx(100 * 11 / 36)
    assert "ccc" in table.rows[0].facts["prunetune"] and "ddd" in table.rows[0].facts["prunetune"]
    mixed = ArmRuns("", cells(arm, "mixed", 20, DIVPRUNE, "b", many=first, few=first))
    with pytest.raises(TaskError, match=r"few and .*few ran with different sources of prunetune"):
        assemble([free, mixed])
    assert len(assemble([free, mixed], allow=["prunetune"]).rows) == 2


def test_the_same_weights_in_two_folders_are_one_model_where_that_is_allowed(arm):
    few = {"few": (FEW, says(9, 36))}
    free = arm("free", few, DIVPRUNE)
    tuned = arm("tuned", few, DIVPRUNE, adapter="a", model="copy/model-7b", frozen_hash="some/model-7b-frozen")
    with pytest.raises(TaskError, match=r"differ in model.path .*--allow model.path"):
        compare([free, tuned])
    rows = compare([free, tuned], allow=["model.path"]).rows
    assert [row.label for row in rows] == ["divprune", "divprune + tuned projector"]
    assert {row.model for row in rows} == {"some/model-7b"} and rows[1].twin == rows[0].id


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tasks", "tasks may never differ"),
        ("frozen_hash", "frozen_hash may never differ"),
        ("template_hash", "template_hash may never differ"),
        ("devise", "no field 'devise' that may differ, did you mean 'device'"),
        ("device.name", "no field 'device.name'"),
        ("", "no field ''"),
    ],
)
def test_what_can_not_be_allowed_is_refused_in_one_line(arm, name, message):
    with pytest.raises(TaskError, match=message) as refused:
        compare([arm("dense", {"few": (FEW, says(36, 36))})], allow=[name])
    assert "\n" not in str(refused.value)


def test_an_allowed_twin_is_the_one_that_ran_most_alike(arm):
    few = {"few": (FEW, says(9, 36))}
    here, there = arm("here", few, DIVPRUNE, device="here"), arm("there", few, DIVPRUNE, device="there")
    tuned = arm("tuned", few, DIVPRUNE, adapter="a", device="there")
    rows = named(compare([here, there, tuned], allow=["device"]))
    assert set(rows) == {"divprune [here]", "divprune [there]", "divprune + tuned projector"}
    assert rows["divprune + tuned projector"].twin == rows["divprune [there]"].id


def test_several_models_stand_in_one_table_when_asked_for(arm):
    folders = []
    for model, right in (("some/small-7b", 30), ("some/large-13b", 36)):
        name = model[-3:]
        folders.append(arm(f"dense{name}", {"few": (FEW, says(right, 36))}, model=model))
        folders.append(arm(f"free{name}", {"few": (FEW, says(15, 36))}, DIVPRUNE, model=model))
    with pytest.raises(TaskError, match="differ in frozen_hash"):
        assemble(folders)
    rows = named(assemble(folders, several_models=True))
    assert list(rows) == ["some/small-7b: dense", "some/small-7b: divprune", "some/large-13b: dense",
                          "some/large-13b: divprune"]  # fmt: skip
    assert rows["some/small-7b: divprune"].relative.value == pytest.approx(50)
    assert rows["some/large-13b: divprune"].relative.value == pytest.approx(100 * 15 / 36)
    other = arm("other", {"few": (questions(35), says(15, 35))}, model="a/third")
    with pytest.raises(TaskError, match="were asked other questions of few"):
        assemble([*folders, other], several_models=True)


def test_one_checkpoint_under_two_names_is_two_models(arm):
    """Two dtypes of one path, say: each has a dense row, a twin and a hard part of its own, under the YAML's names."""
    runs, downs = [], []
    for name, right in (("in float32", 30), ("in bfloat16", 24)):
        fields = {"model": "/data/here/llava-1.5-7b-hf", "batch_size": right}  # stands for the dtype: it may not differ
        for part, number, spec, adapter in (
            ("dense", right, ("identity", "100%"), None),
            ("free", 12, DIVPRUNE, None),
            ("tuned", 18, DIVPRUNE, "a"),
        ):
            folder = arm(f"{part} {name}", {"few": (FEW, says(number, 36))}, spec, adapter, **fields)
            runs.append(ArmRuns("", [folder], name))
        down = arm(f"down {name}", {"few": (FEW, says(right - 18, 36))}, ("downsample", 4), **fields)
        downs.append(ArmRuns("", [down], name))
    with pytest.raises(TaskError, match="differ in batch_size"):
        assemble([folder for run in runs for folder in run.folders], several_models=True)
    quote = Quote("theirs", 16, {"few/accuracy": 30.0}, "a paper", model="LLaVA-1.5-7B", method="divprune")
    table = assemble(runs, baseline=downs, quoted=[quote], several_models=True)
    rows = named(table)
    assert [row.model for row in table.rows] == ["in float32"] * 3 + ["in bfloat16"] * 3
    assert list(rows)[3:] == ["in bfloat16: dense", "in bfloat16: divprune", "in bfloat16: divprune + tuned projector"]
    assert rows["in bfloat16: divprune"].relative.value == pytest.approx(100 * 12 / 24)
    assert rows["in float32: divprune + tuned projector"].twin == rows["in float32: divprune"].id
    # What 12 and 6 right answers leave: of 24 items the dense arm has 18, of 30 it has 18 as well.
    hard = [next(iter(rows[f"{name}: dense"].hard.values())).value for name in ("in float32", "in bfloat16")]
    assert hard == [pytest.approx(100 * 18 / 24), pytest.approx(100 * 18 / 30)]
    assert table.quoted[0].beside == rows["in float32: divprune"].id  # by the checkpoint, whatever it is called here


# ---- scores of today -------------------------------------------------------------------------------------------


def test_an_arm_is_scored_anew_when_asked_and_refused_otherwise(arm, monkeypatch):
    folder = arm("dense", {"few": (FEW, says(30, 36))})
    kind = Scorer(lambda prediction, item: 1.0)  # another version's, which is kinder
    register(monkeypatch, few=Benchmark("few", "by hand", "question", "", [], kind))
    with pytest.raises(TaskError, match="or the scorer is another: .*--rescore"):
        compare([folder])
    table = compare([folder], rescore=True)
    assert table.rows[0].values["few/accuracy"].value == 100
    (note,) = [note for note in table.footnotes if note.startswith("Scored anew")]
    assert "6 of 36 of few in dense" in note
    monkeypatch.setitem(BENCHMARKS, "few", BENCHMARKS["few"])
    register(monkeypatch)
    assert any("none differs" in note for note in compare([folder], rescore=True).footnotes)
    assert not any(note.startswith("Scored anew") for note in compare([folder]).footnotes)


def test_a_quoted_row_with_an_unknown_name_stops_before_anything_is_computed(arm, monkeypatch):
    folder = arm("dense", {"few": (FEW, says(30, 36))})
    quote = Quote("theirs", 64, {"few/accuray": 1.0}, "a paper, table 1")
    monkeypatch.setattr("prunetune.evaluation.report.tables.assemble.measured", lambda *_: pytest.fail("computed"))
    with pytest.raises(TaskError, match="few has no metric 'accuray', did you mean 'accuracy'"):
        compare([folder], quoted=[quote])


def test_a_table_is_the_same_every_time_and_no_arm_is_one_line(arm):
    folders = [arm("dense", {"few": (FEW, says(36, 36))}), arm("free", {"few": (FEW, says(9, 36))}, DIVPRUNE)]
    table = compare(folders)
    assert table == compare(folders) == table.model_validate_json(table.model_dump_json())
    with pytest.raises(TaskError, match="name at least one evaluated arm"):
        compare([])
