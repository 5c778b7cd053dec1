"""Exports for engines: the very answers, names and flags that vLLM wants; OpenVINO by its percentage; refusals."""

import json
import os
import subprocess
from itertools import pairwise

import pytest
import yaml
from conftest import TINY_VLM
from PIL import Image
from safetensors import safe_open
from tuned import tuned

from prunetune.cli import main
from prunetune.configs import ModelConfig, ServeConfig, load_config
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.serving.references import drawn, read_references


def export(adapter, output, engine, *arguments):
    line = ["export", "--model", str(TINY_VLM), "--adapter", str(adapter), "--output", str(output), "--for", engine]
    main([*line, *arguments])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tuned(TINY_VLM, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def exported(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(adapter, folder, "vllm")
    return folder


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_towers_weights_have_the_names_that_vllm_reads_and_the_same_answers(adapter, exported):
    tower = {name for name in names_in(exported) if "vision_tower" in name}
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert names_in(TINY_VLM) == {name.replace(".vision_model", "") for name in names_in(exported)}
    # Loaded with every hash of its record, and equal to base and adapter bit for bit.
    spec, config = PruningSpec("divprune", 16), ModelConfig(path=str(exported), dtype="float32")
    own = Arm.load(config, spec, device="cpu")
    other = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), spec, adapter, device="cpu")
    state = own.model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in other.model.state_dict().items())
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(exported)])
    assert ended.value.code == 0


def test_the_references_are_what_the_tuned_arm_answers(adapter, exported):
    arm = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), PruningSpec("divprune", 16), adapter, device="cpu")
    found = read_references(exported / "reference.json")
    assert [row.question for row in found] == [row.question for row in drawn(8)]
    for row, made in zip(found, drawn(8), strict=True):
        assert row.image.tobytes() == made.image.tobytes()
        prompt = f"<s>USER: <image>\n{row.question} ASSISTANT:"
        inputs = arm.processor(images=row.image, text=prompt, return_tensors="pt", add_special_tokens=False)
        tokens = arm.pruned.generate(**inputs, max_new_tokens=8, do_sample=False).tokens
        assert row.answer == arm.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def test_script_and_configuration_fit_each_other(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported)
    config = load_config(ServeConfig, "serve.yaml")
    assert (config.engine, config.pruning.pruner, config.pruning.keep) == ("vllm", "divprune", 16)
    # What the script runs: a python that writes down its arguments.
    (tmp_path / "python").write_text('#!/bin/sh\nfor one in "$@"; do echo "$one"; done\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    line = [str(exported / "serve.sh"), "--max-num-seqs", "16"]
    told = subprocess.run(line, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, cwd="/")
    arguments = told.stdout.splitlines()
    assert arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"] and arguments[-2:] == ["--max-num-seqs", "16"]
    given = dict(pairwise(arguments))
    assert json.loads(given["--limit-mm-per-prompt"]) == {"image": 0} and "--enable-mm-embeds" in arguments
    assert config.vllm.url == f"http://{given['--host']}:{given['--port']}"
    assert given["--dtype"] == config.model.dtype == "float32"
    assert (exported / "chat_template.jinja").read_text() == (TINY_VLM / "chat_template.jinja").read_text()


def test_openvino_gets_a_percentage_that_is_called_approximate(tmp_path, capsys):
    adapter = tuned(TINY_VLM, tmp_path / "tuned", pruner="cdpruner", keep=16, text_tower=str(TINY_VLM / "clip"))
    export(adapter, tmp_path / "out", "openvino")
    said = json.loads((tmp_path / "out" / "openvino.json").read_text())
    assert (said["servable"], said["pruning_ratio"]) == ("approximate", round(100 * (144 - 16) / 144))
    assert "approximate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "change", "why"),
    [
        ("openvino", {}, "by a relative of cdpruner alone .* tuned for divprune"),
        ("vllm", {"position_policy": "original"}, "engines number positions 0..n"),
        ("vllm", {"stages": [{"name": "vtw", "boundaries": [1]}]}, "pruning.stages run between the layers"),
    ],
)
def test_what_an_engine_can_not_serve_is_not_exported(adapter, tmp_path, engine, change, why):
    if change:
        adapter = tuned(TINY_VLM, tmp_path / "tuned", **change)
    with pytest.raises(SystemExit, match=why):
        export(adapter, tmp_path / "out", engine)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_references_file_of_another_kind_is_one_line(tmp_path):
    from prunetune.serving.errors import ServingError

    for content in ("", "{}", '{"format": 9}', '{"format": 1, "questions": [{"image": "x"}]}'):
        (tmp_path / "reference.json").write_text(content)
        with pytest.raises(ServingError, match="holds no reference questions"):
            read_references(tmp_path / "reference.json")


def test_drawn_pictures_differ():
    pictures = [row.image for row in drawn(8)]
    assert len({picture.tobytes() for picture in pictures}) == 8
    assert all(isinstance(picture, Image.Image) and picture.size == (336, 336) for picture in pictures)


def test_the_written_configuration_is_plain_yaml(exported):
    assert yaml.safe_load((exported / "serve.yaml").read_text())["model"] == {"path": ".", "dtype": "float32"}
