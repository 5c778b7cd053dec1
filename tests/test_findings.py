"""The study's own training and scoring against the project's: losses, gradients, greedy answers, and going on."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from findings_study import bars, carrying, plan, training, tries
from findings_study.intervals import accuracy, difference
from findings_study.page import write_page
from findings_study.plan import ORIGINAL, Group, Projector, Score, elastic, one, specialist
from findings_study.results import Results
from findings_study.running import Runner
from findings_study.scoring import right_answers
from findings_study.store import Store
from findings_study.training import Recipe
from findings_study.world import DENSE, Cell, World

from prunetune.configs import EngineConfig, RecalibrateConfig, load_config
from prunetune.configs.schema import ObjectiveConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.models.arm import with_own_projector
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.tiny_world import ask, sample_scene
from prunetune.tiny_world.images import SceneImages
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.objectives.aim import Aim
from prunetune.train.objectives.live import LiveTeacher
from prunetune.train.objectives.objective import Objective

CELLS = [DENSE, Cell("divprune", 16), Cell("vispruner", 8), Cell("random", 36)]
POOL = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), pool=POOL, test=POOL)


@pytest.fixture(scope="module")
def moved(world):
    """A projector that is not the original one."""
    draws = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in world.original.state_dict().items():
        weights[name] = value + 0.05 * value.std() * torch.randn(value.shape, generator=draws)
    return world.projector(weights)


@contextmanager
def arm_of(world, projector, cell):
    """The project's own way to run a cell: an arm of the bundled model with this projector in its place."""
    spec = PruningSpec() if cell.pruner is None else PruningSpec(cell.pruner, cell.keep)
    world.arm.model.model.multi_modal_projector = projector
    yield world.arm.with_pruning(spec)
    world.arm.model.model.multi_modal_projector = world.original


def samples_of(pool, index):
    found = []
    for seed in (pool.seeds[number] for number in index):
        for number, question in enumerate(ask(sample_scene(seed))):
            found.append(
                Sample(f"{seed}-{number}", question.source, f"scene:{seed}", (Turn(question.text, question.answer),))
            )
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("tuned", [False, True])
def test_loss_and_gradient_are_those_of_the_pruned_model(world, moved, cell, tuned):
    projector = world.projector(moved.state_dict() if tuned else None).requires_grad_(True)
    pool, index = world.pool("recalibration"), torch.tensor([0, 3, 4, 9])
    recipe = Recipe(((cell, 1.0),))
    loss = training.backward(world, projector, recipe, {cell: index}, np.random.default_rng(0))
    mine = [weight.grad.clone() for weight in projector.parameters()]

    projector.zero_grad()
    with arm_of(world, projector, cell) as arm:
        batch = arm.formatter(SceneImages()).training_batch(samples_of(pool, index.tolist()))
        mean = arm.pruned.forward(**batch).loss
        mean.backward()
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert loss * supervised == pytest.approx(float(mean.detach()) * supervised, rel=1e-5)
    for own, weight in zip(mine, projector.parameters(), strict=True):
        torch.testing.assert_close(own, weight.grad, rtol=1e-3, atol=1e-5 * float(weight.grad.abs().max()))


@pytest.mark.parametrize(("weights", "layer"), [({"gce": 1.0, "hidden": 0.5}, 0), ({"kl": 1.0, "feature": 2.0}, 0),
                                                ({"hidden": 1.0}, 2), ({"ce": 1.0, "hidden": 1.0}, 0)])  # fmt: skip
def test_objectives_are_those_of_a_recalibration(world, moved, weights, layer):
    """The project's engine and its teacher, on samples of two cells in one update."""
    parts = {Cell("fastervlm", 16): torch.tensor([0, 3]), DENSE: torch.tensor([4])}
    recipe = Recipe(((DENSE, 1.0),), tuple(weights.items()), hidden_layer=layer)
    projector = world.projector(moved.state_dict()).requires_grad_(True)
    loss = training.backward(world, projector, recipe, parts, np.random.default_rng(0))
    mine = torch.cat([weight.grad.flatten() for weight in projector.parameters()])

    objective = Objective(ObjectiveConfig(terms=weights, hidden_layer=layer or None))
    config = EngineConfig(packing=False)
    teacher = LiveTeacher(world.arm, config, objective.teacher_reads)
    model = with_own_projector(world.arm.model)
    model.model.multi_modal_projector = projector = world.projector(moved.state_dict()).requires_grad_(True)
    batches, summed = [], 0
    for cell, index in parts.items():
        spec = PruningSpec() if cell.pruner is None else PruningSpec(cell.pruner, cell.keep)
        pruned = PrunedModel(model, spec, world.arm.processor.tokenizer)
        engine = Engine(pruned, config, None, objective.reads)
        aim = Aim(engine, objective, teacher, None, head_of(pruned, config, partitioned=False))
        samples = samples_of(world.pool("recalibration"), index.tolist())
        batches.append((aim, world.arm.formatter(SceneImages()).training_batch(samples)))
    units = {}
    for aim, batch in batches:
        units = {name: units.get(name, 0) + count for name, count in aim.units(batch).items()}
    for aim, batch in batches:
        with aim.attached("cpu"):
            for unit, part in aim.losses(model, batch).units.items():
                summed = summed + part / units[unit]
    summed.backward()
    theirs = torch.cat([weight.grad.flatten() for weight in projector.parameters()])
    assert loss == pytest.approx(float(summed.detach()), rel=1e-5)
    assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_right_answers_are_those_that_greedy_generation_gives(world, moved):
    pool, count = world.pool("test"), 0
    for projector in (world.original, moved):
        for cell in CELLS:
            mine = right_answers(world, projector, projector, cell, "test")
            samples = samples_of(pool, range(POOL))
            with arm_of(world, projector, cell) as arm:
                asked = [replace(sample, turns=(Turn(sample.turns[0].question, None),)) for sample in samples]
                answers = arm.answer(arm.formatter(SceneImages()), asked, max_new_tokens=6)
            right = []
            for answer, sample in zip(answers, samples, strict=True):
                right.append(answer.text.split() == sample.turns[0].answer.split())
            assert mine.tolist() == np.array(right).reshape(POOL, 8).sum(1).tolist(), (cell, projector is moved)
            count += len(right)
    assert count >= 500


def test_the_tuned_projector_chooses_for_itself_and_the_original_one_can(world, moved):
    pool, index, cell = world.pool("test"), torch.arange(POOL), Cell("divprune", 16)
    own, original = pool.chosen(index, cell, moved), pool.chosen(index, cell, world.original)
    assert own.shape == (POOL, 16) and not torch.equal(own, original)
    again = pool.chosen(index, cell, world.projector())  # the same weights in another module: chosen anew
    assert torch.equal(again, original)


def test_inner_layers_are_the_stock_models(world):
    pool, index = world.pool("test"), torch.arange(4)
    texts = pool.texts.at(index)
    rows = world.rows(training.visual_tokens(pool, index, None, world.original), texts)
    output = world.llm(inputs_embeds=rows.embeds, attention_mask=rows.mask, position_ids=rows.positions,
                       output_hidden_states=True)  # fmt: skip
    second = world.llm.norm(output.hidden_states[2])[:, rows.start :]
    for layers, states in ((2, second), (None, output.last_hidden_state[:, rows.start :])):
        for wanted in (texts.is_text, texts.is_asked):
            torch.testing.assert_close(world.states(rows, wanted, layers), states[wanted], rtol=1e-4, atol=1e-4)


def test_dense_pictures_with_the_original_projector_are_the_teacher(world):
    pool, index = world.pool("recalibration"), torch.arange(POOL)
    recipe = Recipe(((DENSE, 1.0),), (("hidden", 1.0), ("kl", 1.0), ("feature", 1.0)))
    same = training.sums(world, world.projector(), recipe, index, None)
    assert set(same) == {"hidden", "kl", "feature"}
    for name, value in same.items():
        assert abs(float(value)) < 1e-5, name
    kept = pool.chosen(index, Cell("fastervlm", 8), world.original)
    pruned = training.sums(world, world.projector(), recipe, index, kept)
    assert min(float(value) for value in pruned.values()) > 1e-2


def test_parts_of_an_update_draw_cells_by_their_weights():
    recipe = replace(elastic(), seed=3)
    draws, seen, pictures = np.random.default_rng(0), {}, torch.arange(16)
    for _ in range(2000):
        parts = training.parts_of(recipe, pictures, draws)
        assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(16))
        for cell, own in parts.items():
            seen[cell] = seen.get(cell, 0) + len(own) / 32000
    assert seen[DENSE] == pytest.approx(0.25, abs=0.02)
    assert seen[Cell("divprune", 8)] == pytest.approx(0.75 * 3 / 6.5 / 4, abs=0.015)
    assert seen[Cell("fastervlm", 72)] == pytest.approx(0.75 / 6.5 / 4, abs=0.01)


def test_a_sandwich_has_everything_and_the_least_in_every_update():
    recipe = elastic(sandwich=True, dense=0.0)
    draws = np.random.default_rng(0)
    for _ in range(50):
        parts = training.parts_of(recipe, torch.arange(16), draws)
        assert parts[DENSE].tolist() == [0, 1, 2, 3]
        assert any(cell.keep == 8 and set(range(4, 8)) <= set(own.tolist()) for cell, own in parts.items())


def test_a_seed_decides_scenes_order_and_draws():
    first, second = (next(iter(training.batches(Recipe((), scenes=30, seed=seed), 100))) for seed in (0, 1))
    assert first.tolist() != second.tolist()
    order = training.batches(Recipe((), scenes=32, seed=0), 100)
    passed = [torch.cat([next(order), next(order)]).tolist() for _ in range(2)]
    assert sorted(passed[0]) == sorted(passed[1]) and passed[0] != passed[1] and len(set(passed[0])) == 32


@pytest.fixture
def small(world, tmp_path):
    """A study of two trainings and five scores, and what runs it into a folder."""
    recipe = Recipe(((Cell("divprune", 8), 1.0),), steps=3, scenes=POOL)
    whole = Projector((recipe, replace(recipe, seed=1)))
    scores = (Score(ORIGINAL, DENSE), Score(one(recipe), Cell("divprune", 8)),
              Score(one(recipe), Cell("divprune", 8), ORIGINAL), Score(whole, DENSE),
              Score(replace(whole, strength=0.5), Cell("random", 8)))  # fmt: skip

    def runner(name):
        said = []
        made = Runner(world, Store(tmp_path / name / "rows", tmp_path / name / "weights"), said.append)
        return made, said

    return Group("small", "a test", scores), runner


def rows_in(folder):
    lines = (folder / "small.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: value for name, value in row.items() if name not in ("seconds", "busy")} for row in rows]


def test_a_run_that_was_killed_goes_on(small, tmp_path, monkeypatch):
    group, runner = small
    whole, _ = runner("whole")
    whole.run(group)
    assert len(rows_in(tmp_path / "whole" / "rows")) == 7

    killed, _ = runner("killed")
    add, left = Store.add, [4]

    def dying(store, name, row):
        left[0] -= 1
        if not left[0]:
            with (tmp_path / "killed" / "rows" / "small.jsonl").open("a") as file:
                file.write('{"key": "half a li')  # the process died while it wrote
            raise KeyboardInterrupt
        add(store, name, row)

    monkeypatch.setattr(Store, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        killed.run(group)
    monkeypatch.undo()
    again, _ = runner("killed")
    assert 0 < len(again.missing(group)) < 5
    again.run(group)
    assert rows_in(tmp_path / "killed" / "rows") == rows_in(tmp_path / "whole" / "rows")
    third, said = runner("killed")
    third.run(group)
    assert said == [] and third.missing(group) == []


def test_a_row_is_outdated_with_anything_that_it_depends_on(world, monkeypatch):
    score = Score(one(specialist(Cell("divprune", 16))), Cell("divprune", 16))
    keys = {score.key("model", 300), score.key("other model", 300), score.key("model", 200)}
    for other in (replace(score, split="validation"), replace(score, chooser=ORIGINAL), replace(score, cell=DENSE),
                  Score(one(specialist(Cell("divprune", 16), seed=1)), score.cell)):  # fmt: skip
        keys.add(other.key("model", 300))
    monkeypatch.setattr(plan, "STUDY", plan.STUDY + 1)
    keys.add(score.key("model", 300))
    assert len(keys) == 8
    unread = Score(score.projector, Cell("vispruner", 16))  # by attention, so nobody's projector chooses
    assert unread.key("model", 300) == replace(unread, chooser=ORIGINAL).key("model", 300)


def test_groups_hold_at_least_three_seeds_and_every_name_is_its_own():
    made = plan.groups(3)
    assert [group.name for group in made][:5] == ["base", "specialists", "elastic", "controls", "choices"]
    assert len({group.name for group in made}) == len(made)
    seeds = SimpleNamespace(**{group.name: {recipe.seed for recipe in group.recipes()} for group in made})
    for name in ("specialists", "elastic", "controls", "choices", "objectives", "data", "rates", "sampling", "weights"):
        assert getattr(seeds, name) == {0, 1, 2}, name


def test_intervals_hold_pictures_and_seeds():
    draws = np.random.default_rng(0)
    one_seed = draws.binomial(8, 0.7, (1, 300))
    found = accuracy(one_seed)
    error = 100 * one_seed.std() / 8 / np.sqrt(300)  # of a mean over pictures
    assert found.value == pytest.approx(100 * one_seed.mean() / 8) and found.seeds == 1
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    apart = np.concatenate([one_seed, one_seed - 1, one_seed + 1])  # seeds 12.5 points apart
    wide = accuracy(apart)
    assert wide.value == pytest.approx(found.value) and wide.high - wide.low > 4 * (found.high - found.low)


def test_differences_are_taken_picture_by_picture():
    draws = np.random.default_rng(0)
    hard = draws.integers(0, 7, (1, 300))
    above = difference(hard + 1, hard)
    assert (above.value, above.low, above.high) == pytest.approx((12.5, 12.5, 12.5))
    other = difference(draws.integers(0, 7, (1, 300)), hard)
    assert other.low < 0 < other.high
    assert difference(hard, hard + 1).value == pytest.approx(-12.5)


@pytest.fixture
def report(world, tmp_path):
    """A study without rows, in the folder of its page."""
    (tmp_path / "images").mkdir()
    return Runner(world, Store(tmp_path / "rows", tmp_path / "weights"), print), tmp_path


def stored_everywhere(runner, groups):
    """Every row that groups ask for, with answers drawn at random."""
    draws = np.random.default_rng(0)
    for group in groups:
        for score in group.scores:
            right = draws.integers(3, 7, POOL)
            runner.store.rows.setdefault(runner.key(score), {"right": "".join(map(str, right))})
        for recipe in group.recipes():
            runner.store.rows[runner.training_key_of(recipe)] = {
                "recipe": recipe.settings(), "busy": 10.0, "on": "one core of a test",
            }  # fmt: skip


def test_the_page_says_what_is_missing(report):
    runner, docs = report
    write_page(docs, runner, 3)
    page = (docs / "findings.md").read_text()
    assert "| specialists | 276 of 276 |" in page and "not there yet" in page and "](images/" not in page
    assert list((docs / "images").iterdir()) == []


def test_the_page_of_a_whole_study_has_every_number(report, monkeypatch):
    runner, docs = report
    monkeypatch.setattr(carrying, "section", lambda results: iter(()))
    stored_everywhere(runner, plan.groups(1))
    stored_everywhere(runner, tries.filled(plan.groups(1), runner))  # that of the chosen recipe, too
    write_page(docs, runner, 1)
    page = (docs / "findings.md").read_text()
    assert "not there yet" not in page and "scores missing" not in page
    for line in page.splitlines():
        if line.startswith("| ") and "running mean" not in line and "| original | original |" not in line:
            assert " - |" not in line, line
        assert len(line) <= 120 or line.startswith(("|", "E=")), line
    pictures = {path.name for path in (docs / "images").iterdir()}
    assert pictures == {"findings_elastic.png", "findings_transfer.png", "findings_objectives.png"}
    assert all(f"](images/{name})" in page for name in pictures)


def test_bars_are_met_and_missed_by_the_numbers(report):
    runner, _ = report
    stored_everywhere(runner, plan.groups(1))
    for group in plan.groups(1):
        for score in group.scores:
            elastic_one = score.projector == one(elastic(0))
            level = {True: 6, False: 5}[elastic_one]
            if score.projector == ORIGINAL:
                level = 4 if score.cell != DENSE else 6
            if elastic_one and score.cell == Cell("divprune", 8):
                level = 4
            runner.store.rows[runner.key(score)] = {"right": str(level) * POOL}
    text = "\n".join(bars.section(Results(runner, 1)))
    assert "15 of 16 cells (15 of them with their whole interval); further below: divprune 8 -12.5" in text
    assert text.count("**met**") == 8 and "**missed**" not in text
    row = next(line for line in text.splitlines() if "recovery" in line and "divprune" in line)
    assert "100 % of the loss, specialist 50 %" in row
    for cell in plan.GRID[:3]:
        key = runner.key(Score(one(elastic(0)), cell))
        runner.store.rows[key] = {"right": "4" * POOL}
    text = "\n".join(bars.section(Results(runner, 1)))
    assert "12 of 16 cells" in text and text.count("**missed**") == 2  # fastervlm 16 recovers nothing, too


def test_validation_scenes_choose_by_the_rule(report):
    """Bars before cells before the mean; what is longer is not chosen."""
    runner, _ = report

    def scored(made, cells, digit):
        for cell in cells:
            runner.store.rows[runner.key(Score(made, cell, split="validation"))] = {"right": str(digit) * POOL}

    scored(ORIGINAL, (*plan.GRID, DENSE), 6)
    for cell in plan.GRID:
        scored(one(specialist(cell)), [cell], 5)
    for changes in plan.TRIES.values():
        scored(one(elastic(**changes)), (*plan.GRID, DENSE), 4)
    levels = {  # of the dense and the pruned cells; 5 and 6 are the specialists' and the untrained model's
        "dense share 0.4": (6, 4),
        "gce + kl + hidden": (5, 6),
        "kl + hidden": (6, 6),
        "8 cells an update": (6, 5),
        "the recipe, 2,000 updates": (6, 8),
    }
    for name, (dense, pruned) in levels.items():
        made = one(elastic(**plan.TRIES[name]))
        scored(made, plan.GRID, pruned)
        scored(made, [DENSE], dense)
    worse = one(elastic(**plan.TRIES["kl + hidden"]))
    scored(worse, [plan.GRID[1], plan.GRID[2], plan.GRID[3]], 4)  # fastervlm 16, and too few near cells
    stands = {name: tries.standing(runner, plan.TRIES[name]) for name in levels}
    assert {name: (own.met, own.near) for name, own in stands.items()} == {
        "dense share 0.4": (1, 0),
        "gce + kl + hidden": (6, 16),
        "kl + hidden": (5, 13),
        "8 cells an update": (7, 16),
        "the recipe, 2,000 updates": (7, 16),
    }
    assert stands["kl + hidden"].lowest == (plan.GRID[1], -12.5)
    assert tries.best(runner) == "8 cells an update"
    groups = {group.name: group for group in tries.filled(plan.groups(3), runner)}
    group = groups["chosen"]
    longer = [elastic(seed, **plan.TRIES["the recipe, 2,000 updates"]) for seed in range(3)]
    assert groups["longer"].recipes() == longer
    assert group.recipes() == [elastic(seed, groups=8) for seed in range(3)]
    assert {score.split for score in group.scores} == {"test"} and len(group.scores) == 3 * 25
    del runner.store.rows[runner.key(Score(one(elastic()), DENSE, split="validation"))]
    assert tries.best(runner) is None


def test_every_line_for_real_models_is_a_configuration():
    for check in carrying.CHECKS:
        config = load_config(RecalibrateConfig, check.config, [*check.options, "--output", "runs/x"])
        assert config.elastic.on == ("--elastic.budgets" in check.options)
        plan = carrying.planned(check.config, check.options)
        assert (plan.cost.teacher > 0) == config.objective.asks_dense_model
    lines = "\n".join(carrying.section(None))
    for number in range(1, len(carrying.CHECKS) + 1):
        assert f"--output runs/findings/{number} " in lines
    assert lines.count("Planned:") == len(carrying.CHECKS)
