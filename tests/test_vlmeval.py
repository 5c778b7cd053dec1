"""The VLMEvalKit class, against a stand-in for the base class of that package, which is in no package index.

The stand-in has what VLMEvalKit's own has and the class relies on: ``generate`` turns texts, paths and dictionaries
into a list of parts, checks their types and hands them to ``generate_inner``; VLMEvalKit asks for custom prompts first.
"""

import importlib
import sys
import types

import pytest
import torch
from PIL import Image

from prunetune.configs import EvaluateConfig, load_config, to_yaml
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError
from prunetune.tiny_world import render, sample_scene


class StandInBaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def use_custom_prompt(self, dataset):
        return False

    def generate(self, message, dataset=None):
        parts = message if isinstance(message, list) else [message]
        found = []
        for part in parts:
            if isinstance(part, str):
                part = {"type": "image" if part.endswith((".png", ".jpg")) else "text", "value": part}
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
            found.append(part)
        return self.generate_inner(found, dataset)


@pytest.fixture
def module(monkeypatch):
    base = types.ModuleType("vlmeval.vlm.base")
    base.BaseModel = StandInBaseModel
    for name, own in (("vlmeval", types.ModuleType("vlmeval")), ("vlmeval.vlm", types.ModuleType("vlm")),
                      ("vlmeval.vlm.base", base)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, own)
    monkeypatch.delitem(sys.modules, "prunetune.evaluation.run.vlmeval_model", raising=False)
    yield importlib.import_module("prunetune.evaluation.run.vlmeval_model")
    sys.modules.pop("prunetune.evaluation.run.vlmeval_model", None)


@pytest.fixture
def config(untrained_folder, tmp_path):
    overrides = ["--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks",
                 "[tiny_world_validation]", "--limit", "4", "--batch_size", "1", "--max_new_tokens", "3",
                 "--pruning.pruner", "divprune", "--pruning.keep", "16", "--output", str(tmp_path / "arm")]  # fmt: skip
    file = tmp_path / "arm.yaml"
    file.write_text(to_yaml(load_config(EvaluateConfig, None, overrides)))
    return file


def saved(path, seed):
    Image.fromarray(render(sample_scene(seed))).save(path)
    return str(path)


def test_it_answers_as_prunetune_evaluate_does(module, config, tmp_path):
    model = module.PrunetuneVLM(config=str(config), device="cpu", verbose=False)
    assert model.INTERLEAVE and not model.is_api and not model.use_custom_prompt("MMBench_DEV_EN")
    for row in read_results(evaluate(load_config(EvaluateConfig, config))):
        image = saved(tmp_path / f"{row.id}.png", int(row.image.split(":")[1]))
        message = [{"type": "image", "value": image}, {"type": "text", "value": row.question}]
        assert model.generate(message, dataset="MMBench_DEV_EN") == row.prediction
        assert model.generate([image, row.question]) == row.prediction
    assert isinstance(model.generate("what is red ?"), str)  # text alone


def test_images_stand_where_the_message_has_them(module, config, tmp_path, monkeypatch):
    model = module.PrunetuneVLM(config=str(config), device="cpu", max_new_tokens=2)
    first, second = saved(tmp_path / "1.png", 1), saved(tmp_path / "2.png", 2)
    seen = []
    prompt = model.bridge._formatter.prompt_batch
    monkeypatch.setattr(
        model.bridge._formatter, "prompt_batch", lambda samples: seen.append(prompt(samples)) or seen[-1]
    )
    model.generate([{"type": "text", "value": "what is"}, {"type": "image", "value": first},
                    {"type": "text", "value": "and"}, {"type": "image", "value": second},
                    {"type": "text", "value": "red ?"}], dataset="MMMU")  # fmt: skip
    model.generate([first, "what ?"])
    model.generate([second, "what ?"])
    both, alone, other = (batch["pixel_values"] for batch in seen)
    assert torch.equal(both, torch.cat([alone, other]))
    token, ids = model.bridge.arm.processor.image_token_id, seen[0]["input_ids"][0]
    edges = (ids == token).int().diff(prepend=torch.zeros(1, dtype=torch.int32))
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    decode = model.bridge.arm.processor.tokenizer.decode
    assert decode(ids[ends[0] : starts[1]]).strip() == "and" and "red ?" in decode(ids[ends[1] :])


def test_what_it_can_not_do_is_said(module, config, tmp_path):
    model = module.PrunetuneVLM(config=str(config), device="cpu")
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        model.generate([{"type": "video", "value": "film.mp4"}])
    with pytest.raises(TaskError, match="takes text and images, got 'audio'"):
        model.generate_inner([{"type": "audio", "value": "x.wav"}], "Set")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(TaskError, match="broken.png can't be opened"):
        model.generate([str(broken), "what ?"])
