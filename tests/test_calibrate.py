"""`prunetune calibrate`: the numbers are the definition's, and the file keeps what people wrote."""

import shutil

import numpy as np
import oracles
import pytest
import torch
from conftest import ROOT, TINY_VLM

from prunetune.cli import main
from prunetune.configs import ConfigError, RecalibrateConfig, load_config
from prunetune.data_recipes import Formatter, load_recipe
from prunetune.evaluation.run.calibrate import Calibration, Spread, calibrate, write_averages
from prunetune.models import load_model
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.pruning.ops.complexity import attention_entropy, erank

CONFIG = ROOT / "configs" / "recalibrate" / "tiny_adaptive_16.yaml"


def test_erank_of_known_matrices():
    eye = torch.eye(6)[None]
    assert erank(eye).item() == pytest.approx(6)
    assert erank(torch.ones(1, 5, 9)).item() == pytest.approx(1, abs=1e-4)
    assert erank(torch.zeros(1, 5, 9)).item() == pytest.approx(1)
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    for item in range(2):
        assert erank(x)[item].item() == pytest.approx(oracles.erank(x[item].double().numpy()), rel=1e-5)
    low = (x[:, :, :2] @ torch.randn(2, 2, 500, generator=torch.Generator().manual_seed(1))).float()
    assert erank(low)[0].item() < 2.01  # two directions; float32 noise in the others does not count


def test_entropy_of_known_attention():
    assert attention_entropy(torch.full((1, 3, 16), 0.01)).item() == pytest.approx(np.log(16))
    one = torch.zeros(1, 3, 16)
    one[..., 5] = 0.7
    assert attention_entropy(one).item() == pytest.approx(0)


def test_calibrate_measures_the_configured_sample_and_writes_it(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    shutil.copy(CONFIG, file)
    before = file.read_text()
    main(["calibrate", "--config", str(file), "--count", "12", "--batch-size", "5"])
    assert "12 items of recipe tiny_world, pruner adaptive" in capsys.readouterr().out
    config = load_config(RecalibrateConfig, file)
    changed = {line for line in file.read_text().splitlines() if line not in before.splitlines()}
    assert {line.split(":")[0].strip() for line in changed} == {"erank_avg", "entropy_avg"}  # comments are still there
    assert all(
        line.endswith("# measured by prunetune calibrate, 12 items of tiny_world, assets/tiny_vlm") for line in changed
    )

    data = load_recipe("tiny_world")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.data.seed or 0))[:12].tolist()
    model, processor = load_model(str(TINY_VLM))
    batch = Formatter(processor, data.images).prompt_batch([data[index] for index in order])
    with torch.no_grad():
        (tokens,) = PrunedModel(model, PruningSpec("fastervlm", 16)).prepare(batch).vision["image"].groups
    ranks = [oracles.erank(oracles.of(tokens, "projected", item)) for item in range(12)]
    assert config.pruning.options["erank_avg"] == pytest.approx(np.mean(ranks), abs=2e-3)
    p = tokens.signals["cls_attention"].double().mean(1)
    p = p / p.sum(1, keepdim=True)
    assert config.pruning.options["entropy_avg"] == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=2e-3)


def test_other_pruners_are_measured_and_nothing_is_written(tmp_path, capsys):
    file = tmp_path / "divprune.yaml"
    shutil.copy(ROOT / "configs" / "recalibrate" / "tiny_divprune_16.yaml", file)
    before = file.read_text()
    main(["calibrate", "--config", str(file), "--count", "6"])
    printed = capsys.readouterr().out
    assert "nothing written" in printed and "erank, kept tokens" in printed and file.read_text() == before
    config = load_config(RecalibrateConfig, file)
    result = calibrate(config, 6)
    assert result.after["erank"].mean < result.before["erank"].mean and result.before.keys() == {"erank"}
    with pytest.raises(ConfigError, match="prunes by 'divprune'"):
        write_averages(file, result, "6 items")


def test_spread_of_few_values():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 3.0, 4.0)


def test_the_comment_beside_a_number_says_where_it_comes_from(tmp_path):
    """What was quoted is measured now; comments of other keys and lines stay."""
    file = tmp_path / "mine.yaml"
    quoted = (ROOT / "configs" / "recalibrate" / "llava15_7b_adaptive_64.yaml").read_text()
    file.write_text(quoted)
    spread = Spread.of([7.25])
    write_averages(file, Calibration(3, {"erank": spread}, {}), "3 items of vg, model m")
    before, after = quoted.splitlines(), file.read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert changed == ["    erank_avg: 7.25  # measured by prunetune calibrate, 3 items of vg, model m"]
    assert len(after) == len(before) and "quoted: the paper's mean" not in file.read_text()
    file.write_text(
        "pruning:\n  pruner: adaptive\n  options:\n    erank_avg: 1 # old\n    # below\n    scale: 1 # mine\n"
    )
    write_averages(file, Calibration(3, {"erank": spread, "attention_entropy": spread}, {}), "x")
    text = file.read_text()
    assert "    # below\n    scale: 1 # mine\n" in text and "# old" not in text
    assert "entropy_avg: 7.25 # measured by prunetune calibrate, x" in text


@pytest.mark.parametrize("asked", ["recalibrate/tiny_adaptive_16", "configs/recalibrate/tiny_adaptive_16.yaml", "link"])
def test_a_shipped_file_is_never_edited(asked, tmp_path, monkeypatch):
    """By name, by path and behind a link; said before minutes of measuring."""
    monkeypatch.chdir(ROOT)
    if asked == "link":
        (tmp_path / "link.yaml").symlink_to(CONFIG)
        asked = str(tmp_path / "link.yaml")
    monkeypatch.setattr("prunetune.evaluation.run.calibrate.calibrate", lambda *_: pytest.fail("it measured"))
    before = CONFIG.read_bytes()
    with pytest.raises(SystemExit, match="is shipped.*`prunetune configs copy recalibrate/tiny_adaptive_16`"):
        main(["calibrate", "--config", asked])
    assert CONFIG.read_bytes() == before
    with pytest.raises(ConfigError, match="is shipped"):
        write_averages(CONFIG, Calibration(1, {}, {}), "x")
