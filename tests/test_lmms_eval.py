"""The lmms-eval plugin, against a stand-in with the interface of lmms-eval 0.7.

lmms-eval pins other versions of our libraries, so it is not installed beside them. What is used of it is small: the
base class, the manifest, and requests whose ``args`` are (context, options, doc_to_visual, doc_id, task, split).
"""

import importlib
import sys
import types
from dataclasses import dataclass
from importlib.metadata import entry_points

import pytest
from PIL import Image

from prunetune.configs import EvaluateConfig, load_config, to_yaml
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError
from prunetune.tiny_world import render, sample_scene


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module with lmms_eval replaced by what it documents."""
    base, registry = types.ModuleType("lmms_eval.api.model"), types.ModuleType("lmms_eval.models.registry_v2")

    class Lmms:
        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple = ()

    base.lmms, registry.ModelManifest = Lmms, ModelManifest
    for name, module in (("lmms_eval", types.ModuleType("lmms_eval")), ("lmms_eval.api", types.ModuleType("a")),
                         ("lmms_eval.api.model", base), ("lmms_eval.models", types.ModuleType("m")),
                         ("lmms_eval.models.registry_v2", registry)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "prunetune.evaluation.run.lmms_eval_plugin", raising=False)
    yield importlib.import_module("prunetune.evaluation.run.lmms_eval_plugin")
    sys.modules.pop("prunetune.evaluation.run.lmms_eval_plugin", None)


@pytest.fixture
def config(untrained_folder, tmp_path):
    overrides = ["--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks",
                 "[tiny_world_validation]", "--limit", "6", "--batch_size", "2", "--max_new_tokens", "3",
                 "--pruning.pruner", "divprune", "--pruning.keep", "16", "--output", str(tmp_path / "arm")]  # fmt: skip
    file = tmp_path / "arm.yaml"
    file.write_text(to_yaml(load_config(EvaluateConfig, None, overrides)))
    return file


def request(context, doc, options=None, task="t"):
    def visual(document):
        return document["visuals"]

    options = options or {"max_new_tokens": 3, "until": ["\n\n"]}
    return types.SimpleNamespace(args=(context, options, visual, doc, task, "v"))


def test_it_is_registered_under_its_name(plugin):
    found = [point for point in entry_points(group="lmms_eval.models") if point.name == "prunetune"]
    assert found and found[0].value == "prunetune.evaluation.run.lmms_eval_plugin:manifest"
    made = plugin.manifest()
    module, name = made.simple_class_path.rsplit(".", 1)
    assert made.model_id == "prunetune" and getattr(importlib.import_module(module), name).is_simple


def test_it_answers_as_prunetune_evaluate_does(plugin, config):
    rows = read_results(evaluate(load_config(EvaluateConfig, config)))
    model = plugin.PrunetuneModel(config=str(config), batch_size="2", device="cpu", max_batch_size=None)
    docs = [{"visuals": [Image.fromarray(render(sample_scene(int(row.image.split(":")[1]))))]} for row in rows]
    model.task_dict = {"t": {"v": docs}}
    answers = model.generate_until([request(row.question, number) for number, row in enumerate(rows)])
    assert answers == [row.prediction for row in rows]
    assert model.generate_until([request(f"<image>\n{rows[0].question}", 0)]) == answers[:1]
    first = answers[0].split()[0]
    stopped = model.generate_until([request(rows[0].question, 0, {"max_new_tokens": 3, "until": first})])
    assert stopped == [""]


def test_what_it_can_not_do_is_said(plugin, config):
    model = plugin.PrunetuneModel(config=str(config), device="cpu")
    picture = Image.new("RGB", (84, 84))
    model.task_dict = {"t": {"v": [{"visuals": [picture, picture]}, {"visuals": ["film.mp4"]}, {"visuals": []}]}}
    with pytest.raises(TaskError, match="t/v/0 comes with 2 pictures"):
        model.generate_until([request("what ?", 0)])
    with pytest.raises(TaskError, match="comes with str"):
        model.generate_until([request("what ?", 1)])
    with pytest.raises(TaskError, match="decodes greedily"):
        model.generate_until([request("what ?", 2, {"temperature": 0.7})])
    assert isinstance(model.generate_until([request("what is red ?", 2)])[0], str)  # text alone
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])
