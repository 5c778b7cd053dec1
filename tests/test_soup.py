"""The mean of several projectors: its weights, what its record says, and which have none."""

import json
import shutil

import pytest
import torch
from conftest import TINY_VLM
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from tuned import shifted, tuned

import prunetune
from prunetune.cli import main
from prunetune.models.record import text_of
from prunetune.scripts.verify import verify

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapters(untrained_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup")
    settings = {"divprune": 16, "fastervlm": 8, "vispruner": 36}
    return [
        tuned(untrained_folder, folder / name, name, keep, lambda tensor, by=number: shifted(tensor, 0.02 * (by + 1)))
        for number, (name, keep) in enumerate(settings.items())
    ]


def record_of(folder):
    return json.loads((folder / "prunetune.json").read_text())


@pytest.mark.parametrize("weights", [None, [1, 1, 2]])
def test_it_is_the_mean_of_the_tensors(adapters, untrained_folder, tmp_path, weights):
    more = [] if weights is None else ["--weights", ",".join(map(str, weights))]
    main(["soup", *map(str, adapters), *more, "--output", str(tmp_path / "soup")])
    written, sources = (
        load_file(tmp_path / "soup" / "adapter" / FILE),
        [load_file(folder / FILE) for folder in adapters],
    )
    assert written.keys() == sources[0].keys()
    for name, tensor in written.items():
        values = [source[name].numpy().astype("float64") for source in sources]
        expected = sum(value * weight for value, weight in zip(values, weights or [1, 1, 1], strict=True))
        expected = torch.from_numpy(expected / sum(weights or [1, 1, 1]))
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-7, atol=1e-9)
    record = record_of(tmp_path / "soup" / "adapter")
    assert [source["projector_hash"] for source in record["soup"]] == [record_of(f)["projector_hash"] for f in adapters]
    assert [(s["pruning"]["pruner"], s["pruning"]["keep"]) for s in record["soup"]][1:] == [
        ("fastervlm", 8),
        ("vispruner", 36),
    ]
    assert sum(source["weight"] for source in record["soup"]) == pytest.approx(1)
    assert record["pruning"]["pruner"] == "divprune" and "step" not in record and "data" not in record
    checks = verify(tmp_path / "soup", str(untrained_folder))
    assert not [check for check in checks if check.holds is False]
    assert {check.link for check in checks if check.holds} >= {"seal", "projector_hash", "frozen_hash"}


def test_it_is_loaded_here_and_by_stock_peft_and_says_what_it_is(adapters, untrained_folder, tmp_path):
    main(["soup", *map(str, adapters[:2]), "--output", str(tmp_path / "soup")])
    folder = tmp_path / "soup" / "adapter"
    arm = prunetune.load(tmp_path / "soup", untrained_folder, "cpu")
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(untrained_folder), folder)
    theirs = stock.get_base_model().model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    assert arm.spec.pruner == "divprune" and torch.equal(theirs, arm.model.model.multi_modal_projector.linear_1.weight)
    card = (folder / "README.md").read_text()
    assert "50.0% of it is the projector" in card and "tuned for `fastervlm`, keep 8" in card


def test_of_one_projector_it_is_that_one_to_the_bit(adapters, tmp_path):
    main(["soup", str(adapters[0]), str(adapters[0].parent), str(adapters[0]), "--output", str(tmp_path / "soup")])
    assert record_of(tmp_path / "soup" / "adapter")["projector_hash"] == record_of(adapters[0])["projector_hash"]


def test_what_has_no_mean_is_one_line(adapters, tmp_path):
    other = tuned(TINY_VLM, tmp_path / "other")
    broken = shutil.copytree(adapters[1], tmp_path / "broken")
    shutil.copy(adapters[2] / FILE, broken / FILE)
    original = shutil.copytree(adapters[1], tmp_path / "original")
    values = record_of(original) | {"original_projector_hash": "0" * 64}
    (original / "prunetune.json").write_text(text_of(values))
    first, second = map(str, adapters[:2])
    for arguments, said in (
        ([first, str(other)], "are of different bases.*: the base's stored weights but the projector's"),
        ([first, str(original)], "are of different bases.*: the projector that the base's files hold"),
        ([first, str(broken)], "was changed after it was written"),
        ([first], "a mean is of two projectors at least, got 1"),
        ([first, second, "--weights", "1"], "there are 2 adapters and 1 weights"),
        ([first, second, "--weights", "1,-1"], "weights are 0 or more"),
        ([first, second, "--weights", "1,x"], "--weights is numbers with commas"),
        ([first, str(tmp_path)], "is no recalibrated projector"),
    ):
        with pytest.raises(SystemExit, match=said) as raised:
            main(["soup", *arguments, "--output", str(tmp_path / "o")])
        assert "\n" not in str(raised.value) and not (tmp_path / "o").exists()
    with pytest.raises(SystemExit, match=r"not empty|holds a recalibration|is read"):
        main(["soup", first, second, "--output", str(adapters[0].parent)])
