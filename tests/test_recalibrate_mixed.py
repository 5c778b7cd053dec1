"""Recalibration on mixed data: text alone, merging, bfloat16, workers, packing, broken pictures."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import TINY_VLM
from launched import left
from launches import arguments, call, losses, run, run_several
from PIL import Image
from safetensors.torch import load_file

from prunetune.models import load_model
from prunetune.models.adapter import projector_state
from prunetune.tiny_world import render, sample_scene


@pytest.fixture
def mixed_recipe(tmp_path):
    return mixed_data(tmp_path)


def mixed_data(tmp_path):
    """Write a LLaVA-format file with pictures, text alone and a long conversation; return the options that name it."""
    folder = tmp_path / "images" / "vg"
    folder.mkdir(parents=True)
    records = []
    for number in range(10):
        turns = [{"from": "human", "value": "what number is shown ?"}, {"from": "gpt", "value": "4 7"}]
        record = {"id": str(number), "conversations": turns}
        if number % 2:
            Image.fromarray(render(sample_scene(number))).save(folder / f"{number}.png")
            record["image"] = f"vg/{number}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append(record)
    records[0]["conversations"][0]["value"] = "what number is shown ? " * 60  # its answer lies beyond max_length
    (tmp_path / "mix.json").write_text(json.dumps(records))
    (tmp_path / "recipe.yaml").write_text("name: mixed\nformat: llava_json\nsources: [vg, text]\n")
    return ["--data.recipe", str(tmp_path / "recipe.yaml"), "--data.file", str(tmp_path / "mix.json"),
            "--data.image_root", str(tmp_path / "images"), "--data.max_samples", "10", "--train.batch_size", "1",
            "--train.max_steps", "5", "--train.save_steps", "5", "--train.max_length", "200",
            "--train.workers", "1"]  # fmt: skip


PRUNERS = ["downsample", "trim", "trimtokenator"]  # merging; merging by CLIP text; LLM text


@pytest.fixture(scope="module")
def mixed_runs(untrained_folder, tmp_path_factory):
    """Each pruner under ZeRO-2 and ZeRO-3, by stage and pruner: output folder; and by stage what was printed."""
    folder = tmp_path_factory.mktemp("mixed")
    options = mixed_data(folder)
    printed = {}
    for stage in ("zero2", "zero3"):
        runs = [arguments(untrained_folder, folder / stage / pruner, *options, "--model.dtype", "bfloat16",
                          "--pruning.pruner", pruner, "--pruning.text_tower", str(TINY_VLM / "clip"),
                          "--train.deepspeed", stage) for pruner in PRUNERS]  # fmt: skip
        printed[stage] = run_several(runs)
    return folder, printed


@pytest.mark.parametrize("pruner", PRUNERS)
def test_text_merging_bf16_and_workers_agree_under_zero2_and_zero3(mixed_runs, untrained_folder, pruner):
    """Batches of one: ranks see text alone, pictures, and a sample without any supervised token, in any order."""
    folder, printed = mixed_runs
    runs = {}
    for stage in ("zero2", "zero3"):
        assert printed[stage].count("1 samples lost every answer token to max_length=200") == len(PRUNERS)
        runs[stage] = losses(folder / stage / pruner)
    assert len(runs["zero2"]) == 5 and all(math.isfinite(loss) for loss in runs["zero2"].values())
    assert runs["zero3"] == pytest.approx(runs["zero2"], rel=0.02)
    tensors = [load_file(folder / stage / pruner / "adapter" / "adapter_model.safetensors") for stage in runs]
    base = projector_state(load_model(str(untrained_folder), dtype="bfloat16")[0])
    for name, tensor in tensors[0].items():
        # What DeepSpeed sums up in float32, of which the model ran with a rounded copy.
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())
        if pruner != "trimtokenator":  # its choice reads the projector, where a last bit in bfloat16 can flip a pick
            torch.testing.assert_close(tensor, tensors[1][name], rtol=0.05, atol=0.02)
        assert not torch.equal(tensor.bfloat16(), base[name.removeprefix("base_model.model.")])
    record = json.loads((folder / "zero2" / pruner / "adapter" / "prunetune.json").read_text())
    assert (record["trained_in"], record["stored_in"]) == ("bfloat16", "float32")


def test_grouped_sampling_resumes_into_its_second_epoch(untrained_folder, mixed_recipe, tmp_path):
    """10 samples on two ranks are 5 steps an epoch; the order of the second epoch is its own, and resuming finds it."""
    options = [*mixed_recipe, "--pruning.pruner", "divprune", "--train.sampling", "modality_length",
               "--train.max_steps", "8", "--train.save_steps", "6", "--engine.packing", "true"]  # fmt: skip
    output = tmp_path / "grouped"
    run(untrained_folder, output, *options)
    whole, projector = losses(output), load_file(output / "adapter" / "adapter_model.safetensors")
    assert len(whole) == 8
    for later in ("checkpoint-8", "adapter"):  # without an adapter a run has not finished
        shutil.rmtree(output / later)
    assert "resuming from" in run(untrained_folder, output, *options)
    assert losses(output) == whole
    again = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in projector.items())


def test_data_loading_processes_end_with_the_run(untrained_folder, mixed_recipe, tmp_path):
    """The next run of the same process would wait ten seconds for each that is left."""
    printed = call(left.main, arguments(untrained_folder, tmp_path / "out", *mixed_recipe), world=1)
    assert "data loading processes left: 0" in printed and len(losses(tmp_path / "out")) == 5


def test_a_corrupt_picture_on_any_rank_stops_with_its_name(untrained_folder, mixed_recipe, tmp_path):
    (tmp_path / "images" / "vg" / "5.png").write_bytes(b"no picture")  # the first rank that says so ends the others
    printed = run(untrained_folder, tmp_path / "out", *mixed_recipe, status=1)
    assert re.search(r"error( \(rank 1\))?: .*5\.png.* can't be decoded|error.*can't be decoded.*5\.png", printed), (
        printed
    )
