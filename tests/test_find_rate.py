"""The learning-rate sweep: against a problem whose largest stable rate is known, and on the tiny VLM."""

import itertools
import json
import math

import pytest
import torch
from conftest import TINY_VLM
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunetune.cli import main
from prunetune.configs import RecalibrateConfig, load_config
from prunetune.outputs import OutputError
from prunetune.train import find_rate as module
from prunetune.train.engine.layout import Share
from prunetune.train.find_rate import Point, Sweep, Update, exponential, find_rate, lines, longest_fall, sweep, updates


def quadratic(curvature):
    """Gradient descent on curvature / 2 * x^2, which converges below the rate 2 / curvature and diverges above."""
    x = [1.0]

    def step(rate):
        loss = curvature / 2 * x[0] ** 2
        x[0] -= rate * curvature * x[0]
        return loss

    return step


@pytest.mark.parametrize("curvature", [0.5, 20.0, 1000.0])
def test_a_quadratic_diverges_above_its_known_rate_and_the_suggestions_are_below(curvature):
    limit = 2 / curvature
    found = sweep(quadratic(curvature), exponential(limit / 1e4, limit * 1e4, 100))
    assert found.diverged is not None and limit < found.diverged < limit * 1e4
    assert limit / 1e3 < found.steepest < limit and limit / 1e3 < found.valley < limit
    assert found.points[-1].rate < found.diverged and all(math.isfinite(point.loss) for point in found.points)


def test_the_smoothed_loss_is_the_weighted_mean_of_those_so_far():
    losses = [3.0, 1.0, 2.0, 0.5]
    given = iter(losses)
    found = sweep(lambda rate: next(given), [1e-3, 1e-2, 1e-1, 1.0])
    for number, point in enumerate(found.points):
        weights = [0.9**age for age in range(number, -1, -1)]
        mean = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert point.smoothed == pytest.approx(mean) and point.loss == losses[number]


def test_rates_rise_by_one_factor():
    rates = exponential(1e-6, 1.0, 7)
    assert rates == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_loss_that_is_no_number_ends_the_sweep():
    losses = iter([1.0, 0.9, float("nan"), 0.5])
    found = sweep(lambda rate: next(losses), [1.0, 2.0, 3.0, 4.0])
    assert [point.rate for point in found.points] == [1.0, 2.0] and found.diverged == 3.0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_the_longest_fall_is_that_of_all_subsequences(values):
    found = longest_fall(values)
    assert found == sorted(set(found)) and all(values[a] > values[b] for a, b in itertools.pairwise(found))
    longest = 0
    for chosen in range(1, 2 ** len(values)):
        part = [value for bit, value in enumerate(values) if chosen >> bit & 1]
        if all(a > b for a, b in itertools.pairwise(part)):
            longest = max(longest, len(part))
    assert len(found) == longest


def test_a_loss_that_never_falls_suggests_nothing():
    found = Sweep(tuple(Point(10.0**i, i, float(i)) for i in range(4)), None)
    assert found.valley is None and found.steepest is None
    assert "nothing is suggested" in lines(found, 1e-3)[-1]


def small(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("name: small\nformat: shapes_world\nsplit: recalibration\nscenes: 8\n")
    return str(recipe)


def settings(tmp_path, *more):
    line = ["--model.path", str(TINY_VLM), "--output", str(tmp_path / "run"), "--data.recipe", small(tmp_path),
            "--train.batch_size", "8", *more]  # fmt: skip
    return load_config(RecalibrateConfig, "recalibrate/tiny_divprune_16", line)


def test_an_update_over_micro_batches_is_that_over_the_whole_batch():
    """The mean over all tokens, whatever the layout; a batch is x, and its loss the sum of (w * x - 1)^2."""
    config = RecalibrateConfig.model_validate(
        {"model": {"path": "m"}, "pruning": {"pruner": "identity"}, "data": {"recipe": "r"}, "output": "o"}
    )
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    def batches(*sizes):
        labels = [torch.zeros(1, size + 1, dtype=torch.long) for size in sizes]
        parts = x.split(list(sizes))
        return iter([[{"x": part, "labels": label} for part, label in zip(parts, labels, strict=True)]] * 3)

    reached = []
    for sizes in ((5,), (1, 4), (2, 2, 1)):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 0.5)
        step = Update(model, batches(*sizes), lambda b, m=model: ((m.weight * b["x"] - 1) ** 2).sum(), config)
        losses = [step(0.1) for _ in range(3)]
        reached.append([*losses, model.weight.item()])
    assert reached[0][0] == pytest.approx(((0.5 * x - 1) ** 2).mean().item())
    assert reached[1] == pytest.approx(reached[0], rel=1e-6) and reached[2] == pytest.approx(reached[0], rel=1e-6)


def test_an_update_has_the_samples_of_all_devices_and_every_sample_comes_once_an_epoch():
    share = Share(0, 1, 8, accumulation=2 * 2)  # of two devices, each of which adds up two

    class Formatter:
        def training_batch(self, samples):
            return samples

    drawn = updates(list(range(70)), Formatter(), share, None, 42)
    first = [next(drawn) for _ in range(4)]
    assert [[len(batch) for batch in update] for update in first] == [[8] * 4, [8] * 4, [6], [8] * 4]
    seen = [index for update in first for batch in update for index in batch]
    assert sorted(seen[:70]) == list(range(70)) and seen[:70] != list(range(70))
    assert seen[70:] != seen[:32]  # the second epoch has an order of its own


def test_the_tiny_vlm_twice_gives_the_same_numbers_and_the_run_is_untouched(tmp_path, monkeypatch, capsys):
    line = ["find-rate", "--config", "recalibrate/tiny_divprune_16", "--model.path", str(TINY_VLM),
            "--output", str(tmp_path / "run"), "--data.recipe", small(tmp_path), "--train.batch_size", "8",
            "--steps", "8", "--lowest", "1e-3", "--highest", "10"]  # fmt: skip
    main(line)
    assert "updates, ended" in capsys.readouterr().out
    folder = tmp_path / "run_rate"
    assert not (tmp_path / "run").exists()
    values = json.loads((folder / "lr_finder.json").read_text())
    assert values["samples_per_update"] == 16 and values["seed"] == 42 and values["recipe"] == "small"
    rates = [update["rate"] for update in values["updates"]]
    assert rates == pytest.approx(exponential(1e-3, 10, 8)[: len(rates)])
    assert len(rates) >= 3 and values["suggested"] == values["valley"]
    assert Image.open(folder / "lr_finder.png").size[0] > 600
    before = (folder / "lr_finder.json").read_bytes()
    main(line)
    assert (folder / "lr_finder.json").read_bytes() == before
    other = settings(tmp_path, "--train.seed", "1")
    monkeypatch.setattr(module, "plot", lambda *_: None)
    again = find_rate(other, tmp_path / "other", 1e-4, 10, 3)
    assert again.points[0].loss != values["updates"][0]["loss"]


def test_a_folder_of_something_else_and_wrong_bounds_are_one_line(tmp_path, capsys):
    (tmp_path / "run_rate").mkdir()
    (tmp_path / "run_rate" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError):
        find_rate(settings(tmp_path), tmp_path / "run_rate", 1e-4, 1, 3)
    for bounds, said in ((["--lowest", "1", "--highest", "0.1"], "below --highest"), (["--steps", "2"], "at least 3")):
        with pytest.raises(SystemExit) as raised:
            main(["find-rate", "--config", "recalibrate/tiny_divprune_16", *bounds])
        assert said in str(raised.value.code)
