"""Inputs that are wrong end in one line that says so, before anything is written; none in a traceback."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VLM
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))

import bad_inputs

from prunetune.cli import main
from prunetune.configs import ConfigError, ModelConfig, RecalibrateConfig, load_config
from prunetune.data_recipes import DataError, Turn, load_recipe
from prunetune.data_recipes.images import FolderImages, TooLarge, limited
from prunetune.data_recipes.parquet import ParquetImages
from prunetune.models import CheckpointError, load_model, read_record
from prunetune.models.record import required
from prunetune.pruning import PruningError, build_pruner
from prunetune.reading import parse_json, parse_yaml, shown

EVERY = 5  # of the table in benchmarks/bad_inputs.py, which benchmarks/reliability.py runs whole


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bad_inputs.World(tmp_path_factory.mktemp("bad") / "world")


def test_bad_inputs_are_answered_in_one_line(world, tmp_path):
    wrong = []
    table = bad_inputs.cases(world)
    assert len(table) >= 150 and len({case.name for case in table}) == len(table)
    for number, case in enumerate(table[::EVERY]):
        outcome = bad_inputs.try_case(case, tmp_path / str(number))
        if not outcome.readable:
            wrong.append(f"{outcome.verdict}: {case.name}\n{outcome.text}")
    assert not wrong, "\n".join(wrong)


def test_the_harness_knows_a_traceback_from_a_line(monkeypatch):
    def broken(*_):
        raise KeyError("oops")

    monkeypatch.setattr("prunetune.data_recipes.prepare.plan", broken)
    assert bad_inputs.run(["data", "prepare", "--recipe", "vg"]).verdict == "TRACEBACK"
    assert bad_inputs.run(["configs", "list"]).verdict == "accepted"
    assert bad_inputs.run(["configs", "show", "x"]).verdict == "one line"
    assert bad_inputs._ended("error: a\nTraceback", "", "").verdict == "TRACEBACK"
    assert bad_inputs._ended(1, "", "").verdict == "TRACEBACK"


# ---- records that are no conversation ----------------------------------------------------------------------------


def conversations(folder, *records, good=200):
    """A data file with good text samples and some others."""
    said = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    all_records = [{"id": f"{n}", "conversations": said} for n in range(good)] + list(records)
    (folder / "mix.json").write_text(json.dumps(all_records))
    return {"file": str(folder / "mix.json"), "image_root": str(folder)}


def said(*turns):
    return [{"from": who, "value": value} for who, value in turns]


ODD = {"id": "odd", "conversations": said(("human", "a"), ("gpt", "b"), ("human", "c"))}
MARKED = {"id": "marked", "conversations": said(("human", "<image> a"), ("gpt", "b"))}


def test_a_leading_gpt_message_is_dropped_as_llava_does(tmp_path):
    greeting = {"id": "g", "conversations": said(("gpt", "hello"), ("human", "a"), ("gpt", "b"))}
    data = load_recipe("custom", **conversations(tmp_path, greeting, good=1))
    assert data[1].turns == (Turn("a", "b"),) and data.broken == []


def test_broken_records_are_left_out_counted_and_named(tmp_path):
    files = conversations(tmp_path, ODD, MARKED)
    data = load_recipe("custom", **files)
    assert len(data) == 200 and len(data.broken) == 2
    assert data.broken[0].startswith("mix.json, record 200: ") and "got 3 messages" in data.broken[0]
    assert "1 <image> placeholders, but 0 image" in data.broken[1]
    clean = tmp_path / "clean"
    clean.mkdir()
    assert load_recipe("custom", **conversations(clean)).content_hash == data.content_hash
    with pytest.raises(
        DataError, match=r"2 of 202 records are no conversation \(mix.json, record 200.*max_broken=0.50%"
    ):
        load_recipe("custom", **files, max_broken=0.005)


def test_the_share_of_broken_records_stands_in_the_recipe_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\nformat: llava_json\nmax_broken: 0.5\n")
    files = conversations(tmp_path, ODD, good=2)
    assert len(load_recipe(str(recipe), **files)) == 2
    with pytest.raises(DataError, match="max_broken=10"):
        load_recipe(str(recipe), **files, max_broken=0.1)


def test_data_check_tolerates_what_a_run_tolerates(tmp_path, capsys):
    files = conversations(tmp_path, ODD)
    line = ["data", "check", "--recipe", "custom", "--file", files["file"], "--image-root", files["image_root"]]
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 0 and "malformed                     1\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*line, "--max-broken", "0"])
    assert stop.value.code == 1 and "1 of 201 records are no conversation" in capsys.readouterr().out


# ---- image paths and sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../out.png", "vg/../../out.png", "{folder}/out.png"])
def test_image_paths_that_leave_the_folder_are_refused_with_the_samples_name(tmp_path, path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    path = path.format(folder=tmp_path)
    record = {"id": "thief", "image": path, "conversations": said(("human", "<image> a"), ("gpt", "b"))}
    files = {**conversations(tmp_path, record), "image_root": str(images)}
    with pytest.raises(DataError, match=r"sample 'thief': image path .* leaves the image folder"):
        load_recipe("custom", **files, max_broken=1.0, max_missing=1.0)
    with pytest.raises(DataError, match=r"sample 'thief': image path"):  # benchmarks' files name images, too
        FolderImages(images).open(path, "thief")
    assert not FolderImages(images).exists(path)
    with pytest.raises(SystemExit):
        main(["data", "check", "--recipe", "custom", "--file", files["file"], "--image-root", str(images)])


def test_links_in_the_image_folder_may_lead_elsewhere(tmp_path):
    (tmp_path / "disk").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "disk" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "vg").symlink_to(tmp_path / "disk")
    assert FolderImages(tmp_path / "images").open("vg/a.png", "x").size == (4, 4)


def test_an_image_above_the_limit_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "big.png")
    tracemalloc.start()
    with pytest.raises(TooLarge, match=r"sample 'x'.*9,000 x 9,000 = 81,000,000 pixels, max_pixels is 50,000,000"):
        FolderImages(tmp_path).open("big.png", "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert limited(FolderImages(tmp_path), 81_000_000).open("big.png", "x").size == (9000, 9000)
    rows = [{"image": {"bytes": (tmp_path / "big.png").read_bytes()}}]
    with pytest.raises(TooLarge, match="row:0"):
        ParquetImages(rows).open("row:0", "x")


def test_the_limit_of_a_configuration_reaches_training_and_evaluation(tmp_path, world):
    mix, images = world.file("mix.json"), world.file("images")
    data = load_recipe("custom", file=mix, image_root=images, max_pixels=100)
    with pytest.raises(TooLarge):
        data.images.open("vg/good.png", "x")
    gqa = tmp_path / "gqa"
    (gqa / "images").mkdir(parents=True)
    Image.new("RGB", (84, 84)).save(gqa / "images" / "1.jpg")
    for name in ("testdev_balanced_questions.json", "llava_gqa_testdev_balanced.jsonl"):
        (gqa / name).write_text((world.folder / "gqa" / name).read_text())
    line = ["evaluate", "--config", world.file("evaluate.yaml"), "--tasks", "[gqa]", "--data", str(tmp_path),
            "--output", str(tmp_path / "out"), "--max_new_tokens", "2"]  # fmt: skip
    with pytest.raises(SystemExit, match="max_pixels is 100"):
        main([*line, "--max_pixels", "100"])
    main(line)


def test_broken_images_of_any_kind_name_the_sample(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    good = (tmp_path / "a.png").read_bytes()
    for content in (b"", good[:100], b"GIF89a", good[:30] + b"\xff" * 30):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"sample 's'.*a.png can't be decoded"):
            FolderImages(tmp_path).open("a.png", "s")


# ---- options, records, models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "takes"), [
    ("prismprune", {"pool_factor": "abc"}, "'pool_factor' of pruner 'prismprune' takes int, got 'abc'"),
    ("prismprune", {"pool_factor": 2.0}, "takes int, got 2.0"),
    ("prismprune", {"salient_ratio": True}, "takes float, got True"),
    ("crisprune", {"alpha": float("nan")}, "takes float, got nan"),
    ("crisprune", {"general_prompts": "one"}, r"takes tuple\[str, ...\] \| list\[str\], got 'one'"),
    ("fps", {"start": ["far"]}, r"takes str, got \['far'\]"),
])  # fmt: skip
def test_options_of_a_method_have_their_annotations_type(name, options, takes):
    with pytest.raises(PruningError, match=takes):
        build_pruner(name, options)


def test_an_int_is_a_float_and_a_list_is_a_tuple():
    assert build_pruner("prismprune", {"salient_ratio": 1}).salient_ratio == 1
    assert build_pruner("crisprune", {"general_prompts": ["a"]}).general_prompts == ["a"]


def test_a_key_of_a_configuration_is_a_word(tmp_path):
    file = tmp_path / "c.yaml"
    for text in ("1: x\n", "[a]: x\n", "model: {2024-01-01: x}\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="line 1: a key is a word"):
            load_config(RecalibrateConfig, file)
    file.write_text("model: {path: m}\npruning: {self: x}\ndata: {recipe: r}\noutput: o\n")
    with pytest.raises(ConfigError, match="pruning.self: unknown key"):
        load_config(RecalibrateConfig, file)


@pytest.mark.parametrize(
    "text", ["a: 2024-13-45", "a: 0x_", "a: &a [*a]", 'a: "\\0"', 'a: "\\ud800"', "a: " + "[" * 3000]
)
def test_yaml_that_python_chokes_on_is_one_line(text):
    with pytest.raises(DataError, match="^here is not valid YAML: [^\n]*$"):
        parse_yaml(text, "here", DataError)


@pytest.mark.parametrize("text", ["[" * 100_000, '"\\ud800"', "1" * 5000, "{", ""])
def test_json_that_python_chokes_on_is_one_line(text):
    with pytest.raises(DataError, match="^here is [^\n]*$"):
        parse_json(text, "here", DataError)
    assert parse_json('"\\ud83d\\ude00"', "here", DataError) == "\U0001f600"


def test_long_values_are_cut_in_messages():
    assert len(shown("x" * 10_000)) < 200 and len(shown(list(range(10_000)))) < 200


def test_a_record_that_is_a_list_or_lacks_a_key_is_named(world, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "prunetune.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="it holds list, expected an object"):
        read_record(folder)
    (folder / "prunetune.json").write_text('{"format": 1, "frozen_hash": 7}')
    with pytest.raises(CheckpointError, match="frozen_hash is int, expected str"):
        read_record(folder)
    (folder / "prunetune.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has format None, this version reads"):
        read_record(folder)
    (folder / "prunetune.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="lacks 'pruning'"):
        required(read_record(folder), "pruning", folder)
    assert read_record(world.folder / "adapter")["pruning"]["pruner"] == "divprune"


def test_a_model_that_lacks_weights_is_not_filled_with_random_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    for file in TINY_VLM.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(TINY_VLM / "model.safetensors")
    name = next(name for name in weights if "multi_modal_projector" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 of its weights, such as .*multi_modal_projector"):
        load_model(str(tmp_path))


def test_flash_attention_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = ModelConfig(path="no/such/model/anywhere", attention="flash_attention_2")
    with pytest.raises(CheckpointError, match="needs a GPU"):
        load_model(config.path, attention=config.attention, dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CheckpointError, match="half precision alone, got model.dtype float32"):
        load_model(config.path, attention=config.attention, dtype="float32")
