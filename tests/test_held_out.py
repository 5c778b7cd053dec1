"""The held-out slice, its loss over any number of ranks, and what a killed run remembers of it."""

import math
import random
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainerControl

from prunetune.configs import ConfigError
from prunetune.data_recipes import DataError, load_recipe
from prunetune.models.ranks import Ranks
from prunetune.train.best import BEST, PROGRESS, HeldOutCallback, Progress
from prunetune.train.callbacks import NothingToTrain
from prunetune.train.held_out import HeldOutLoss, split

CPU = torch.device("cpu")


def recipe(tmp_path, scenes=12, **more):
    file = tmp_path / "world.yaml"
    lines = ["name: world", "format: shapes_world", "split: recalibration", f"scenes: {scenes}"]
    file.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in more.items())]))
    return load_recipe(str(file))


# ---- the slice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 8, 9, 40])
def test_whole_images_are_taken_from_what_is_trained_on(tmp_path, number):
    data = recipe(tmp_path)
    train, held = split(data, number, seed=3)
    assert list(train.held_out["id"]) == list(held.rows["id"])  # a feature cache is asked for both
    assert len(train) + len(held) == len(data) == 96
    assert len(held) == 8 * math.ceil(number / 8)  # a scene has eight questions
    assert not set(train.rows["image"]) & set(held.rows["image"])
    ids = data.rows["id"]
    assert sorted([*train.rows["id"], *held.rows["id"]]) == sorted(ids)
    assert [index for index in ids if index in set(train.rows["id"])] == list(train.rows["id"])  # in file order
    assert sum(train.counts.values()) == len(train) and sum(held.counts.values()) == len(held)
    assert len({data.content_hash, train.content_hash, held.content_hash}) == 3


def test_the_draw_depends_on_the_seed_alone(tmp_path):
    data = recipe(tmp_path)
    first, again, other = (split(data, 16, seed) for seed in (0, 0, 1))
    assert list(first[1].rows["id"]) == list(again[1].rows["id"]) != list(other[1].rows["id"])
    assert first[0].content_hash == again[0].content_hash != other[0].content_hash


def test_a_recipe_that_holds_out_itself_is_trained_on_as_it_is(tmp_path):
    data = recipe(tmp_path, held_out=24)
    train, held = split(data, 8, seed=0)
    assert train is data and len(held) == 8 and set(held.rows["image"]) <= set(data.held_out["image"])
    assert len(split(data, 10_000, seed=0)[1]) == len(data.held_out) == 24


def test_an_overlap_and_a_slice_of_everything_are_one_line(tmp_path):
    data = recipe(tmp_path)
    shared = replace(data, held_out=data.rows.select(range(5)))
    with pytest.raises(
        DataError, match=r"'world' holds out 1 images that it also trains on, such as scene:\d+; a held"
    ) as e:
        split(shared, 8, seed=0)
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match=r"train.held_out 90 takes all 96 samples of recipe 'world'.*lower it"):
        split(data, 90, seed=0)


# ---- the loss --------------------------------------------------------------------------------------------------


class Numbers:
    """Samples that are numbers; their "loss" is the number to the power of 1.5, by label."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]

    @staticmethod
    def training_batch(samples):
        """Of a sample n there are n % 4 supervised tokens."""
        labels = torch.full((len(samples), 6), -100)
        for row, sample in enumerate(samples):
            labels[row, 1 : 1 + sample % 4] = sample
        labels[:, 0] = 7  # the first token is predicted by none
        return {"labels": labels}


def summed(batch):
    labels = batch["labels"][:, 1:]
    return (labels[labels != -100].float() ** 1.5).sum()


def over_ranks(values, world, size, monkeypatch):
    """The loss on every rank, the exchange played by adding up what each of them sends."""
    model = torch.nn.Linear(1, 1)
    sent, calls = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def run(rank):
        seen = []
        loss = HeldOutLoss(
            Numbers(values), Numbers, lambda b: seen.append(model.training) or summed(b), Ranks(rank, 0, world), size
        )
        reached = loss(model, CPU)
        calls.append(seen)
        return reached

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda told: sent.append(told.clone()))
    for rank in range(world):
        with suppress(DataError):  # of a rank that measures nothing itself, since here nothing is exchanged yet
            run(rank)
    total = sum(sent)
    assert all(((tensor == 0) | (tensor == total)).all() for tensor in sent)  # nothing is added to anything but zero
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda told: told.copy_(total))
    reached = [run(rank) for rank in range(world)]
    assert len({len(seen) for seen in calls}) == 1 and not any(any(seen) for seen in calls) and model.training
    return reached


def test_the_loss_is_the_mean_over_tokens_and_the_same_to_the_bit_over_ranks(monkeypatch):
    values = random.Random(0).sample(range(2, 500), 45)
    expected = sum((value % 4) * value**1.5 for value in values) / sum(value % 4 for value in values)
    reached = {loss for world in (1, 2, 3, 8, 64) for loss in over_ranks(values, world, 4, monkeypatch)}
    assert len(reached) == 1 and reached.pop() == pytest.approx(expected, rel=1e-6)


def test_nothing_to_measure_on_is_one_line(monkeypatch):
    with pytest.raises(
        DataError, match="none of the 3 held-out samples has an answer token left after train.max_length"
    ):
        over_ranks([4, 8, 12], 1, 2, monkeypatch)


# ---- what is best, and when to stop ----------------------------------------------------------------------------


def test_of_equal_losses_the_first_is_best():
    progress = Progress()
    assert [progress.take(loss, step) for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0])] == [1, 1, 0, 0, 1]
    assert (progress.loss, progress.step, progress.since, progress.last) == (1.0, 4, 0, 1.0)
    progress.take(1.0, 5)
    assert progress.record() == {"best_loss": 1.0, "best_step": 4, "last_loss": 1.0, "evaluations_since": 1}


class Run:
    """A trainer's loop around the callback: the projector of a step is its number, checkpoints every ``save`` steps."""

    def __init__(self, folder, losses, every=2, patience=2, steps=20, save=3, begin=0):
        self.folder, self.losses, self.save = folder, losses, save
        self.written, self.rows = {}, []
        checkpoint = folder / f"checkpoint-{begin}" if begin else None
        self.state = SimpleNamespace(global_step=begin, max_steps=steps, is_world_process_zero=True)
        self.callback = HeldOutCallback(
            lambda: self.losses[self.state.global_step],
            SimpleNamespace(
                tensors=lambda: {"w": torch.tensor([float(self.state.global_step)])},
                write=lambda tensors, progress: self.written.update(tensor=tensors["w"].item(), step=progress.step),
            ),
            lambda row, step: self.rows.append((step, row)),
            every,
            patience,
            Progress.read(checkpoint),
        )

    def go(self, until=None):
        """Train to the end, or to a kill."""
        args, control = SimpleNamespace(output_dir=str(self.folder)), TrainerControl()
        try:
            self.callback.on_train_begin(args, self.state, control)
        except NothingToTrain:
            return self
        while self.state.global_step < self.state.max_steps and not control.should_training_stop:
            if self.state.global_step == until:
                return self
            self.state.global_step += 1
            self.callback.on_step_end(args, self.state, control)
            if control.should_save or self.state.global_step % self.save == 0:
                (self.folder / f"checkpoint-{self.state.global_step}").mkdir(exist_ok=True)
                self.callback.on_save(args, self.state, control)
        return self

    def ended(self):
        progress = self.callback.progress
        return (self.state.global_step, self.callback.stopped_early, self.written, progress.record(),
                {name: tensor.tolist() for name, tensor in progress.tensors.items()})  # fmt: skip


def test_evaluations_come_before_the_first_step_every_so_many_and_after_the_last(tmp_path):
    run = Run(tmp_path, {step: 5.0 - step / 10 for step in range(8)}, every=3, patience=None, steps=7).go()
    assert [step for step, _ in run.rows] == [0, 3, 6, 7] and run.written == {"tensor": 7.0, "step": 7}
    assert [row["held_out_loss"] for _, row in run.rows] == [row["best_held_out_loss"] for _, row in run.rows]


def test_patience_counts_evaluations_without_a_lower_loss(tmp_path):
    losses = dict(enumerate([9, 9, 5, 9, 6, 9, 4, 9, 4, 9, 7, 9, 1, 9]))
    run = Run(tmp_path, losses, every=2, patience=2).go()
    assert run.ended()[:3] == (10, True, {"tensor": 6.0, "step": 6})
    assert (tmp_path / "checkpoint-10" / PROGRESS).exists()  # the end is remembered
    again = Run(tmp_path, losses, every=2, patience=2, begin=10).go()
    assert again.ended()[:3] == (10, True, {"tensor": 6.0, "step": 6}) and not again.rows
    assert Run(tmp_path, losses, every=2, patience=3, steps=13).go().ended()[:2] == (13, False)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6))
def test_a_killed_run_ends_as_one_that_was_not(tmp_path_factory, seed):
    draw = random.Random(seed)
    losses = {step: float(draw.randint(0, 6)) for step in range(21)}
    every, patience, save, kill = (
        draw.randint(1, 5),
        draw.choice([None, 1, 2, 3]),
        draw.randint(1, 6),
        draw.randint(1, 20),
    )
    options = {"losses": losses, "every": every, "patience": patience, "save": save}
    whole = Run(tmp_path_factory.mktemp("whole"), **options).go()
    folder = tmp_path_factory.mktemp("killed")
    killed = Run(folder, **options).go(until=kill)
    begin = killed.state.global_step // save * save
    resumed = Run(folder, **options, begin=begin)
    resumed.go()
    assert resumed.ended() == whole.ended()
    before = [row for row in killed.rows if row[0] <= begin] if begin else []  # the log is cut there
    assert before + resumed.rows == whole.rows


def test_a_loss_that_is_no_number_stops_before_anything_is_written(tmp_path):
    run = Run(tmp_path, {0: 1.0, 2: float("nan")})
    with pytest.raises(FloatingPointError, match="the held-out loss became nan at step 2"):
        run.go()
    assert run.written == {"tensor": 0.0, "step": 0} and not list(tmp_path.iterdir())


def test_a_checkpoint_without_it_is_refused_in_one_line(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ConfigError, match=r"held_out.json can't be read .*; use another output folder") as raised:
        Progress.read(tmp_path / "checkpoint-2")
    assert "\n" not in str(raised.value)
    progress = Progress(1.5, 4, 1, 2.0, {"w": torch.ones(2)})
    progress.write(tmp_path / "checkpoint-2")
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == {PROGRESS, BEST}
    assert Progress.read(tmp_path / "checkpoint-2").record() == progress.record()
