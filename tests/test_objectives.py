"""Objectives: each term against a loop in float64, what is read of the model, the teacher, and how sums are divided."""

import json
import math

import pytest
import torch
from conftest import scene_sample
from launches import arguments, run, run_several

from prunetune.configs import ConfigError, EngineConfig, ModelConfig, RecalibrateConfig
from prunetune.configs.schema import DataConfig, ObjectiveConfig, TrainConfig
from prunetune.data_recipes import DataError, Sample, Turn
from prunetune.models import Arm
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.head import PIECE, Scores
from prunetune.train.engine.reading import Reads, text_behind_images
from prunetune.train.objectives import terms
from prunetune.train.objectives.aim import Aim, scales_of
from prunetune.train.objectives.anchor import Anchor
from prunetune.train.objectives.live import LiveTeacher
from prunetune.train.objectives.objective import Objective
from prunetune.train.objectives.start import check_answers, check_objective

PLAIN = {"packing": False, "supervised_logits": False, "shared_prefix": False, "project_kept": False,
         "stop_tower": False}  # fmt: skip
ALL = {"ce": 1.0, "gce": 0.5, "kl": 0.3, "hidden": 0.7, "feature": 0.2}


# ---- terms ---------------------------------------------------------------------------------------------------------


def softmax(row, temperature=1.0):
    raised = [math.exp(value / temperature) for value in row]
    return [value / sum(raised) for value in raised]


@pytest.fixture
def numbers():
    torch.manual_seed(3)
    return torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))


def test_ce_and_gce_by_their_formula(numbers):
    logits, _, targets = numbers
    p = [softmax(row)[target] for row, target in zip(logits.tolist(), targets.tolist(), strict=True)]
    assert float(terms.ce(logits, targets)) == pytest.approx(-sum(math.log(own) for own in p), rel=1e-12)
    for q in (0.3, 0.7, 1.0):
        assert float(terms.gce(logits, targets, q)) == pytest.approx(sum((1 - own**q) / q for own in p), rel=1e-12)
    assert float(terms.gce(logits, targets, 1e-9)) == pytest.approx(float(terms.ce(logits, targets)), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_by_its_formula_and_over_the_likeliest_words_and_the_rest(numbers, temperature):
    logits, teacher, _ = numbers
    whole = top = 0.0
    words = teacher.topk(3, dim=1).indices
    rows = []
    for own, other, chosen in zip(logits.tolist(), teacher.tolist(), words.tolist(), strict=True):
        s, t = softmax(own, temperature), softmax(other, temperature)
        whole += temperature**2 * sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))
        merged = [[values[word] for word in chosen] for values in (t, s)]
        merged = [[*values, 1 - sum(values)] for values in merged]
        top += temperature**2 * sum(a * math.log(a / b) for a, b in zip(*merged, strict=True))
        rows.append([math.log(value) for value in merged[0]])
    assert float(terms.kl(logits, teacher, temperature)) == pytest.approx(whole, rel=1e-12)
    stored = torch.tensor(rows, dtype=torch.float64)
    assert float(terms.kl_of_top(logits, words, stored, temperature)) == pytest.approx(top, rel=1e-10)
    assert top < whole
    assert float(terms.kl(logits, logits, temperature)) == pytest.approx(0, abs=1e-12)


def test_words_that_are_all_there_are_leave_no_rest(numbers):
    logits, teacher, _ = numbers
    logits = logits.requires_grad_()
    words = torch.arange(9).expand(6, 9)
    taught = torch.cat([teacher.log_softmax(1), torch.full((6, 1), -torch.inf, dtype=torch.float64)], dim=1)
    found = terms.kl_of_top(logits, words, taught)
    torch.testing.assert_close(found, terms.kl(logits, teacher))
    assert torch.autograd.grad(found, logits)[0].isfinite().all()


def test_hidden_feature_and_anchor_are_relative_squares(numbers):
    student, teacher, _ = numbers
    expected = 0.0
    for own, other in zip(student.tolist(), teacher.tolist(), strict=True):
        expected += sum((a - b) ** 2 for a, b in zip(own, other, strict=True)) / sum(b * b for b in other)
    assert float(terms.hidden(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(terms.feature(student, teacher)) == pytest.approx(expected, rel=1e-12)
    weights = {"a": student, "b": teacher[0]}
    originals = {"a": teacher, "b": student[0]}
    moved = float((student - teacher).square().sum() + (teacher[0] - student[0]).square().sum())
    assert float(terms.anchor(weights, originals)) == pytest.approx(
        moved / float(teacher.square().sum() + student[0].square().sum()), rel=1e-12
    )


def test_terms_in_pieces_have_the_gradient_of_the_whole():
    torch.manual_seed(0)
    count = PIECE + 70
    hidden = torch.randn(count, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 11).double().requires_grad_(False)
    targets, teacher = torch.randint(11, (count,)), torch.randn(count, 11, dtype=torch.float64)
    weights = torch.tensor([0.4, 1.5], dtype=torch.float64)

    def made(logits, piece):
        return torch.stack([terms.gce(logits, targets[piece], 0.7), terms.kl(logits, teacher[piece], 2.0)])

    total, sums = Scores(hidden, head).summed(made, weights)
    (total * 3).backward()
    mine, hidden.grad = hidden.grad, None
    whole, other = Scores(head(hidden)).summed(made, weights)
    (whole * 3).backward()
    torch.testing.assert_close(mine, hidden.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close((total.detach(), sums), (whole.detach(), other))
    with torch.no_grad():
        torch.testing.assert_close(Scores(hidden, head).summed(made, weights)[0], whole)


# ---- what is read, and the teacher -----------------------------------------------------------------------------------


@pytest.fixture
def batch(reading, samples):
    """Conversations of unlike length that begin alike, one of them without a picture."""
    question = "you are asked about a scene , look closely and answer in a word or two . what color is it ?"
    texts = [Turn(question, "red"), Turn(f"{question} is it small ?", "no red blue")]
    rows = [Sample(str(n), "vg", samples[n].image, (texts[n % 2], *samples[n].turns[: n + 1])) for n in range(3)]
    return reading.training_batch([*rows, Sample("t", "text", None, (texts[1],))])


@pytest.fixture(scope="module")
def arm(untrained_folder):
    loaded = Arm.load(ModelConfig(path=str(untrained_folder), dtype="float32"), PruningSpec("divprune", 16))
    loaded.model.requires_grad_(False).double()
    return loaded


def moved(arm):
    """The arm with a projector that is not the original one any more, which trains."""
    from prunetune.models.arm import with_own_projector

    model = with_own_projector(arm.model).train()
    torch.manual_seed(5)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
        parameter.requires_grad_(True)
    return model


def in_double(batch):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def made(arm, batch, weights, switches=PLAIN, name="vispruner", prefix=True, whole_head=False, **options):
    """Losses, gradient and aim of one batch, by the engine."""
    model = moved(arm)
    objective = Objective(ObjectiveConfig(terms=weights, **options))
    config = EngineConfig(**switches)
    ids = batch["input_ids"][0, :1] if prefix else None
    pruned = PrunedModel(model, PruningSpec(name, 16), arm.processor.tokenizer)
    engine = Engine(pruned, config, ids, objective.reads)
    teacher = None
    if objective.teacher_reads is not None:
        teacher = LiveTeacher(arm, config, objective.teacher_reads, ids)
    head = None if whole_head else head_of(pruned, config, partitioned=False)
    anchor = None
    if "anchor" in weights:
        anchor = Anchor(arm.model)
        anchor.hold(model)
    aim = Aim(engine, objective, teacher, anchor, head)
    with aim.attached("cpu"):
        losses = aim.losses(model, in_double(batch))
        units = aim.units(batch)
        loss = sum(own / max(units[unit], 1) for unit, own in losses.units.items())
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.model.multi_modal_projector.parameters()])
    return {name: float(own) for name, own in losses.terms.items()}, gradient, aim, loss.detach()


def by_hand(arm, batch, name, layer=None, q=0.7, temperature=1.0):
    """Every term of a batch, row by row on stock models, without the engine: from padding-free rows of one sample."""
    tuned, original = moved(arm), arm.model
    image = arm.pruned.family.token_ids(original)
    found = dict.fromkeys([*ALL, "kl text"], 0.0)
    pixels = 0
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        own = {key: batch[key][row : row + 1, :length] for key in ("input_ids", "attention_mask", "labels")}
        is_image = torch.isin(own["input_ids"][0], torch.tensor(image))
        if is_image.any():
            own["pixel_values"] = batch["pixel_values"][pixels : pixels + 1].double()
            pixels += 1
        runs = []
        for model, spec in ((tuned, PruningSpec(name, 16)), (original, PruningSpec())):
            with torch.no_grad():
                plug = PrunedModel(model.eval(), spec, arm.processor.tokenizer)
                pruned = plug.prepare(dict(own))
                inputs = {k: v for k, v in pruned.inputs.items() if k != "labels"}
                output = model(**inputs, output_hidden_states=True)
            ids = inputs["input_ids"][0]
            visual = torch.isin(ids, torch.tensor(image))
            states = (
                output.hidden_states[-1]
                if layer is None
                else model.model.language_model.norm(output.hidden_states[layer])
            )
            first = int(visual.nonzero()[0, 0]) if visual.any() else len(ids)
            behind = [place for place in range(first, len(ids)) if not visual[place]]
            labels = pruned.inputs["labels"][0]
            answers = [place for place in range(len(ids) - 1) if labels[place + 1] != -100]
            mean = None
            if is_image.any():
                mean = pruned.inputs["mm_encoder_outputs"]["image"].pooler_output[0].mean(dim=0)
            runs.append((output.logits[0], states[0], behind, answers, labels, mean))
        (scores, states, behind, answers, labels, mean), (taught, others, behind2, answers2, _, whole) = runs
        for place, other in zip(answers, answers2, strict=True):
            p = scores[place].softmax(0)[labels[place + 1]]
            found["ce"] -= float(p.log())
            found["gce"] += float((1 - p**q) / q)
            found["kl"] += divergence(taught[other], scores[place], temperature)
        for place, other in zip(behind, behind2, strict=True):
            found["hidden"] += float((states[place] - others[other]).square().sum() / others[other].square().sum())
            found["kl text"] += divergence(taught[other], scores[place], temperature)
        if mean is not None:
            found["feature"] += float((mean - whole).square().sum() / whole.square().sum())
    return found


def divergence(teacher, student, temperature):
    t, s = (teacher / temperature).softmax(0), (student / temperature).softmax(0)
    return float((t * (t.log() - s.log())).sum()) * temperature**2


@pytest.mark.parametrize("name", ["vispruner", "divprune"])
def test_every_term_is_what_rows_by_themselves_give(arm, batch, name):
    expected = by_hand(arm, batch, name)
    for switches in (PLAIN, {}):
        found, *_ = made(arm, batch, ALL, switches, name)
        assert found == pytest.approx({key: expected[key] for key in ALL}, rel=1e-9)


def test_kl_at_text_with_temperature_and_a_layer_between(arm, batch):
    expected = by_hand(arm, batch, "vispruner", layer=2, temperature=2.0)
    for switches in (PLAIN, {}):
        options = {"kl_at": "text", "temperature": 2.0, "hidden_layer": 2}
        found, *_ = made(arm, batch, {"kl": 1.0, "hidden": 1.0, "ce": 0.5}, switches, **options)
        wanted = {"kl": expected["kl text"], "hidden": expected["hidden"], "ce": expected["ce"]}
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (ALL | {"anchor": 0.1}, {}),
        ({"kl": 1.0, "hidden": 1.0}, {"kl_at": "text"}),
        ({"hidden": 1.0}, {"hidden_layer": 1}),
        ({"ce": 1.0, "hidden": 1.0}, {"hidden_layer": 1}),
        ({"feature": 1.0}, {}),
    ],
)
def test_every_saving_leaves_losses_and_gradient_as_they_are(arm, batch, weights, options):
    expected, gradient, _, loss = made(arm, batch, weights, PLAIN, whole_head=True, **options)
    found, other, _, same = made(arm, batch, weights, {}, **options)
    torch.testing.assert_close(same, loss, rtol=1e-11, atol=0)
    assert found == pytest.approx(expected, rel=1e-9)
    assert gradient.norm() > 0 and (other - gradient).norm() <= 1e-10 * gradient.norm()


def test_layers_that_nothing_reads_do_not_run(arm, batch):
    """And stopping behind a layer gives what a hook behind it does while the others run."""
    stopped, gradient, aim, _ = made(arm, batch, {"hidden": 1.0}, hidden_layer=1)
    assert [len(aim.engine.states.left_out), len(aim.teacher.engine.states.left_out)] == [2, 2]
    hooked, other, aim, _ = made(arm, batch, {"hidden": 1.0, "ce": 1e-30}, hidden_layer=1)
    assert not aim.engine.states.left_out and len(aim.teacher.engine.states.left_out) == 2
    assert stopped["hidden"] == pytest.approx(hooked["hidden"], rel=1e-12)
    torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-15)
    assert len(made(arm, batch, {"feature": 1.0})[2].engine.states.left_out) == 3


def test_ce_with_other_terms_is_the_ce_of_itself(arm, batch):
    alone, gradient, *_ = made(arm, batch, {"ce": 2.0}, {})
    beside, *_ = made(arm, batch, {"ce": 1.0, "gce": 1.0}, {})
    once, whole, *_ = made(arm, batch, {"ce": 1.0}, {})
    assert alone == once and beside["ce"] == pytest.approx(once["ce"], rel=1e-12)
    torch.testing.assert_close(gradient, 2 * whole)


def test_the_teacher_keeps_the_original_projector_and_shares_all_else(arm):
    teacher = LiveTeacher(arm, EngineConfig(), Reads())
    shared = {id(parameter) for parameter in arm.model.parameters()}
    own = {name for name, parameter in teacher.model.named_parameters() if id(parameter) not in shared}
    assert own and all("multi_modal_projector" in name for name in own)


def test_the_tower_runs_once_for_model_and_teacher(arm, batch):
    calls = []
    handle = arm.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        model = moved(arm)  # a copy, hooks included
        objective = Objective(ObjectiveConfig(terms={"kl": 1.0}))
        engine = Engine(PrunedModel(model, PruningSpec("divprune", 16)), EngineConfig(), None, objective.reads)
        assert objective.teacher_reads is not None
        aim = Aim(engine, objective, LiveTeacher(arm, EngineConfig(), objective.teacher_reads))
        calls.clear()
        with aim.attached("cpu"):
            aim.losses(model, in_double(batch))
    finally:
        handle.remove()
    assert len(calls) == 1


def test_text_positions_are_behind_the_first_picture_of_their_row():
    ids = torch.tensor([[1, 9, 9, 5, 0], [1, 5, 6, 7, 8], [2, 9, 3, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1] * 5, [1] * 5])
    assert text_behind_images(ids, mask, [9]).nonzero().tolist() == [[0, 3], [2, 2], [2, 4]]


def test_units_are_counted_before_pruning(arm, batch):
    aim = made(arm, batch, ALL | {"anchor": 1.0})[2]
    ids, image = batch["input_ids"], arm.pruned.family.token_ids(arm.model)[0]
    behind = 0
    for row, mask in zip(ids.tolist(), batch["attention_mask"].tolist(), strict=True):
        seen = False
        for token, there in zip(row, mask, strict=True):
            seen = seen or token == image
            behind += seen and token != image and there
    answers = int((batch["labels"][:, 1:] != -100).sum())
    assert aim.units(batch) == {"answers": answers, "text": behind, "images": 3, "update": 1}
    assert aim.units(batch, first=False, counts=False) == {"answers": 0, "text": 0, "images": 0, "update": 0}


def test_each_unit_is_divided_by_its_own_number():
    units = [{"answers": 3, "text": 0}, {"answers": 1, "text": 7}]
    assert scales_of(units, "token_mean") == ([[1.0, 0.0], [1.0, 1.0]], [4, 7])
    assert scales_of(units, "micro_batch_mean") == ([[1 / 3, 0.0], [1.0, 1 / 7]], [2, 1])


# ---- what stops before the first step --------------------------------------------------------------------------------


def config_of(terms, stage="zero2", **objective):
    return RecalibrateConfig(
        model=ModelConfig(path="m"), pruning=PruningSpec("divprune", 16), data=DataConfig(recipe="r"), output="o",
        train=TrainConfig(deepspeed=stage), objective=ObjectiveConfig(terms=terms, **objective),
    )  # fmt: skip


def test_what_can_not_be_is_one_line():
    with pytest.raises(ConfigError, match="objective.teacher .* or train.deepspeed to zero2"):
        check_objective(config_of({"kl": 1.0}, "zero3"))
    with pytest.raises(ConfigError, match="the anchor alone"):
        check_objective(config_of({"anchor": 1.0, "ce": 0.0}))
    with pytest.raises(ConfigError, match="anchor measures whole weights"):
        check_objective(config_of({"ce": 1.0, "anchor": 1.0}, "zero3"))
    check_objective(config_of({"ce": 1.0, "kl": 1.0}))


def test_a_layer_that_is_not_there_is_one_line(model):
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    with pytest.raises(ConfigError, match="hidden_layer 4: the LLM has 3 layers"):
        Engine(pruned, EngineConfig(), None, Reads(answers=False, hidden=True, layer=4))


def test_samples_without_answers_train_what_reads_none(reading):
    from datasets import Dataset

    rows = [scene_sample(1), Sample("q", "vg", "scene:2", (Turn("what color is it ?", None),))]
    data = type("Data", (), {"rows": Dataset.from_list([row.to_row() for row in rows]), "name": "mine"})()
    check_answers(Objective(ObjectiveConfig(terms={"hidden": 1.0})), data)
    check_answers(Objective(ObjectiveConfig(terms={"kl": 1.0}, kl_at="text")), data)
    for weights in ({"kl": 1.0}, {"ce": 1.0, "hidden": 1.0}):
        with pytest.raises(DataError, match="such as sample 'q'; `prunetune answers`"):
            check_answers(Objective(ObjectiveConfig(terms=weights)), data)
    batch = reading.training_batch(rows)
    assert (batch["labels"][1] == -100).all() and (batch["labels"][0] != -100).any()


# ---- launched --------------------------------------------------------------------------------------------------------


def rows_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_sum_of_terms_is_the_same_however_an_update_is_laid_out(untrained_folder, tmp_path):
    """1 x 16, 8 x 2 and by budget, in one process."""
    towards = ("--objective.terms", json.dumps({"ce": 1.0, "kl": 0.5, "hidden": 1.0, "feature": 0.3, "anchor": 0.1}))
    layouts = {"1x16": ("16", "1"), "8x2": ("2", "8"), "budget": ("16", "1", "--engine.token_budget", "200")}
    lines = []
    for name, (size, accumulation, *more) in layouts.items():
        layout = ("--train.batch_size", size, "--train.accumulation", accumulation, *more, "--train.max_steps", "3")
        lines.append(arguments(untrained_folder, tmp_path / name, *layout, *towards, "--train.learning_rate", "1e-3"))
    run_several(lines, 1)
    first, *others = [rows_of(tmp_path / name) for name in layouts]
    keys = ["loss", *(f"loss_{term}" for term in ("ce", "kl", "hidden", "feature", "anchor"))]
    assert first[-1]["loss_anchor"] > 0 == first[0]["loss_anchor"]
    for rows in others:
        for row, expected in zip(rows, first, strict=True):
            assert [row[key] for key in keys] == pytest.approx([expected[key] for key in keys], rel=1e-5)
    weights = {"ce": 1.0, "kl": 0.5, "hidden": 1.0, "feature": 0.3, "anchor": 0.1}
    for row in first:
        assert row["loss"] == pytest.approx(sum(row[f"loss_{term}"] * own for term, own in weights.items()), rel=1e-3)
    record = json.loads((tmp_path / "1x16" / "adapter" / "prunetune.json").read_text())
    assert record["objective"]["terms"] == weights


def test_a_run_without_labels_holds_out_its_own_objective(untrained_folder, tmp_path):
    towards = ("--objective.terms", '{"hidden": 1.0}', "--objective.hidden_layer", "2", "--train.held_out", "16")
    printed = run(untrained_folder, tmp_path / "run", *towards, "--train.max_steps", "3", world=1)
    assert "lowest held-out loss (hidden)" in printed
    record = json.loads((tmp_path / "run" / "adapter" / "prunetune.json").read_text())
    assert record["held_out"]["loss"] == "hidden" and record["held_out"]["best_loss"] > 0
