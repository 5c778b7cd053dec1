"""The lmms-eval plugin, with the installed package: its evaluator, its command line, one process and two."""

import importlib
import json
import os
import subprocess
import sys
import types
from importlib.metadata import entry_points

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from prunetune.configs import EvaluateConfig, load_config, to_yaml
from prunetune.data_recipes import Sample, Turn
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.bridge import Batches, Bridge
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError
from prunetune.models import Arm
from prunetune.tiny_world import render, sample_scene
from prunetune.train.launchers import free_port

pytest.importorskip("lmms_eval", reason="`make test` installs lmms-eval without its pins, see the Makefile")

CHOICES = ["red", "blue", "northwest", "4 7"]
TASKS = {
    "asked": """
output_type: generate_until
generation_kwargs: {max_new_tokens: 3, until: ["\\n\\n"]}
doc_to_target: answer
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "chosen": """
output_type: multiple_choice
doc_to_choice: !function own.choices
doc_to_target: !function own.right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "likely": """
output_type: loglikelihood
doc_to_target: !function own.answer
process_results: !function own.likelihood
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "film": """
output_type: generate_until
generation_kwargs: {max_new_tokens: 3}
doc_to_visual: !function own.film
doc_to_target: answer
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
OWN = f"""
def visuals(doc):
    return [doc["image"].convert("RGB")]

def film(doc):
    return ["film.mp4"]

def choices(doc):
    return {CHOICES!r}

def right(doc):
    return doc["right"]

def answer(doc):
    return doc["answer"]

def likelihood(doc, results):
    return {{"acc": float(results[0][1])}}
"""


@pytest.fixture(scope="module")
def plugin():
    return importlib.import_module("prunetune.evaluation.run.lmms_eval_plugin")


@pytest.fixture(scope="module")
def config(untrained_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms")
    overrides = ["--model.path", str(untrained_folder), "--model.dtype", "float32", "--tasks",
                 "[tiny_world_validation]", "--limit", "7", "--batch_size", "2", "--max_new_tokens", "3",
                 "--pruning.pruner", "divprune", "--pruning.keep", "16", "--output", str(folder / "arm")]  # fmt: skip
    file = folder / "arm.yaml"
    file.write_text(to_yaml(load_config(EvaluateConfig, None, overrides)))
    return file


@pytest.fixture(scope="module")
def rows(config):
    """What `prunetune evaluate` answers."""
    return read_results(evaluate(load_config(EvaluateConfig, config)))


def picture(row):
    return Image.fromarray(render(sample_scene(int(row.image.split(":")[1]))))


@pytest.fixture(scope="module")
def tasks(rows, config):
    """A folder with the tasks above, on the questions of those rows."""
    folder = config.parent / "tasks"
    folder.mkdir()
    records = []
    for number, row in enumerate(rows):
        records.append({"question": row.question, "answer": CHOICES[number % 4], "right": number % 4,
                        "image": picture(row)})  # fmt: skip
    Dataset.from_list(records).cast_column("image", ImageColumn()).to_parquet(folder / "docs.parquet")
    (folder / "own.py").write_text(OWN)
    for name, text in TASKS.items():
        visual = "" if "doc_to_visual" in text else "doc_to_visual: !function own.visuals"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: parquet\ntest_split: test\ndoc_to_text: question\n{visual}\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'docs.parquet'}}}}}\n{text}"
        )
    return folder


def command(config, tasks, names, output, processes=1, batch="2"):
    """Run lmms-eval's command line; returns the process and the samples it logged, by task and document."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port"]
        launcher += [str(free_port())]
    line = [*launcher, "-m", "lmms_eval", "--model", "prunetune", "--model_args", f"config={config}", "--device", "cpu",
            "--tasks", ",".join(names), "--include_path", str(tasks), "--batch_size", batch, "--log_samples",
            "--output_path", str(output), "--verbosity", "INFO"]  # fmt: skip
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), str(ROOT)) if part)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(output / "cache")}
    done = subprocess.run(line, env=environment, cwd=output.parent, capture_output=True, text=True, timeout=900)
    samples = {}
    for file in output.rglob("*_samples_*.jsonl"):
        name = file.stem.split("_samples_")[1]
        found = [json.loads(text) for text in file.read_text().splitlines()]
        samples[name] = {one["doc_id"]: one for one in found}
    return done, samples


def logged(sample):
    """The pairs of a logged sample, of which the log makes texts."""
    pairs = sample["filtered_resps"]
    pairs = [pairs] if isinstance(pairs[0], str) else pairs
    return [(float(total), {"True": True, "False": False}[greedy]) for total, greedy in pairs]


@pytest.fixture(scope="module")
def one_process(config, tasks, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "out"
    done, samples = command(config, tasks, ["asked", "chosen", "likely"], output)
    assert done.returncode == 0 and samples.keys() == TASKS.keys() - {"film"}, done.stdout[-3000:] + done.stderr[-3000:]
    return samples


def expected_likelihood(config, row, answer):
    """The sum over the answer's tokens, computed with the stock model on inputs that the plug shortened."""
    own = load_config(EvaluateConfig, config)
    arm = Arm.load(own.model, own.pruning, own.adapter, "cpu")

    class Pictures:
        def open(self, reference, sample_id):
            return picture(row)

        def exists(self, reference):
            return True

    prompt = arm.formatter(Pictures()).prompt_batch([Sample("s", "s", "x", (Turn(row.question, None),))])
    ids = arm.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
    inputs = dict(prompt, input_ids=torch.cat([prompt["input_ids"], ids], dim=1))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = arm.model(**arm.pruned.prepare(arm.place(inputs)).inputs).logits[0, -ids.shape[1] - 1 : -1]
    logs = torch.log(torch.softmax(logits.double(), dim=-1))
    total = sum(float(logs[place, token]) for place, token in enumerate(ids[0]))
    return total, bool((logits.argmax(dim=-1) == ids[0]).all())


def test_it_is_registered_under_its_name(plugin):
    found = [point for point in entry_points(group="lmms_eval.models") if point.name == "prunetune"]
    assert found and found[0].value == "prunetune.evaluation.run.lmms_eval_plugin:manifest"
    made = plugin.manifest()
    module, name = made.simple_class_path.rsplit(".", 1)
    assert made.model_id == "prunetune" and getattr(importlib.import_module(module), name).is_simple


def test_lmms_evals_command_line_gets_the_answers_of_prunetune_evaluate(one_process, rows):
    answers = {number: sample["filtered_resps"] for number, sample in one_process["asked"].items()}
    assert [answers[number] for number in range(len(rows))] == [row.prediction for row in rows]


def test_likelihoods_are_those_of_plain_torch(one_process, config, rows):
    for number, row in enumerate(rows[:3]):
        sample = one_process["likely"][number]
        ((total, greedy),) = logged(sample)
        expected = expected_likelihood(config, row, CHOICES[number % 4])
        assert total == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1] == bool(sample["acc"])


def test_of_several_choices_lmms_eval_takes_the_likeliest(one_process, config, rows):
    for number, row in enumerate(rows[:3]):
        expected = [expected_likelihood(config, row, choice)[0] for choice in CHOICES]
        sample = one_process["chosen"][number]
        assert [-total for total, _ in logged(sample)] == pytest.approx(expected, abs=1e-4)
        assert sample["acc"] == float(max(range(4), key=expected.__getitem__) == number % 4)


def test_a_group_that_lmms_eval_began_is_left_before_the_process_ends(tmp_path):
    script = f"""
import atexit, torch
from prunetune.models.ranks import leave_at_exit
atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))  # runs after what is registered later
leave_at_exit()
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
"""
    line = [sys.executable, "-c", script]
    assert subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout == "in a group: False\n"


def test_two_processes_give_what_one_gives(config, tasks, one_process, tmp_path):
    done, samples = command(config, tasks, ["asked", "chosen", "likely"], tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert samples.keys() == one_process.keys()
    for name, alone in one_process.items():
        assert samples[name].keys() == alone.keys() == set(range(7))
        for number, sample in alone.items():
            if name == "asked":
                assert samples[name][number]["filtered_resps"] == sample["filtered_resps"]
                continue
            # Batches are others, and float32 sums differ in their last digits.
            theirs, ours = logged(samples[name][number]), logged(sample)
            assert [total for total, _ in theirs] == pytest.approx([total for total, _ in ours], abs=1e-4)
            assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]


def test_an_error_makes_the_run_fail(config, tasks, tmp_path):
    done, _ = command(config, tasks, ["film"], tmp_path / "out")
    assert done.returncode == 1 and "prunetune: film/test/0 comes with str" in done.stderr


def request(context, doc, options=None, task="t"):
    def visual(document):
        return document["visuals"]

    options = options or {"max_new_tokens": 3, "until": ["\n\n"]}
    return types.SimpleNamespace(args=(context, options, visual, doc, task, "v"))


@pytest.fixture
def model(plugin, config, rows):
    made = plugin.PrunetuneModel(config=str(config), batch_size="2", device="cpu", max_batch_size=None)
    made.task_dict = {"t": {"v": [{"visuals": [picture(row)]} for row in rows]}}
    return made


def test_requests_and_stops(model, rows):
    answers = model.generate_until([request(row.question, number) for number, row in enumerate(rows)])
    assert answers == [row.prediction for row in rows]
    assert model.generate_until([request(f"<image>\n{rows[0].question}", 0)]) == answers[:1]
    first = answers[0].split()[0]
    stopped = model.generate_until([request(rows[0].question, 0, {"max_new_tokens": 3, "until": first})])
    assert stopped == [""]


def test_several_images_are_seen_where_the_context_has_them(model, rows, monkeypatch):
    first, second = picture(rows[0]), picture(rows[1])
    model.task_dict["t"]["v"] = [{"visuals": [first, [second]]}, {"visuals": [second, first]}]
    seen = []
    prompt = model.bridge._formatter.prompt_batch

    def recorded(samples):
        batch = prompt(samples)
        seen.append(batch)
        return batch

    monkeypatch.setattr(model.bridge._formatter, "prompt_batch", recorded)
    model.generate_until([request("what is red ?", 0), request("what is red ?", 1)])
    pixels = seen[0]["pixel_values"]
    assert pixels.shape[0] == 4 and torch.equal(pixels[0], pixels[3]) and torch.equal(pixels[1], pixels[2])
    model.generate_until([request("what is <image> and what is <image>\n?", 0)])
    text = model.bridge.arm.processor.tokenizer.decode(seen[1]["input_ids"][0]).replace("<image>", "").split("and")
    assert len(text) == 2 and model.bridge.arm.processor.image_token_id in seen[1]["input_ids"][0]


def test_a_single_continuation_gets_its_log_probability(model, config, rows):
    asked = [request(rows[0].question, 0, " red"), request(rows[1].question, 1, lambda doc: "blue")]
    (red, _), (blue, _) = model.loglikelihood(asked)
    assert red == pytest.approx(expected_likelihood(config, rows[0], "red")[0], abs=1e-4) and red < 0
    assert blue == pytest.approx(expected_likelihood(config, rows[1], "blue")[0], abs=1e-4)
    # Two of one document are choices, whose least number lmms-eval takes.
    both = model.loglikelihood([request(rows[0].question, 0, " red"), request(rows[0].question, 0, " blue")])
    assert both[0][0] == pytest.approx(-red, abs=1e-4) and both[1][0] > 0


def test_what_it_can_not_do_is_said(model):
    model.task_dict["t"]["v"] = [{"visuals": ["film.mp4"]}, {"visuals": []}]
    with pytest.raises(TaskError, match="comes with str"):
        model.generate_until([request("what ?", 0)])
    for options in ({"temperature": 0.7}, {"do_sample": True}, {"num_beams": 3}):
        with pytest.raises(TaskError, match="decodes greedily"):
            model.generate_until([request("what ?", 1, options)])
    assert isinstance(model.generate_until([request("what is red ?", 1)])[0], str)  # text alone
    with pytest.raises(TaskError, match="likelihood of an empty answer"):
        model.loglikelihood([request("what ?", 1, " ")])
    with pytest.raises(TaskError, match="without an image"):
        model.loglikelihood([types.SimpleNamespace(args=("", "red"))])
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])


def test_automatic_batches_are_halved_until_they_fit():
    tried = []

    def fits(most):
        def do(part):
            tried.append(len(part))
            if len(part) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [2 * one for one in part]

        return do

    batches = Batches("auto", torch.device("cuda"), 16)
    assert batches.run(range(11), fits(3)) == [2 * n for n in range(11)]
    assert tried == [11, 5, 2, 2, 2, 2, 2, 1] and batches.size == 2
    assert Batches("auto:4", torch.device("cpu")).size == 8 and Batches("3", torch.device("cpu")).size == 3
    with pytest.raises(TaskError, match="batch_size 1 does not fit"):
        batches.run([1], fits(0))
    with pytest.raises(TaskError, match="lower it, or set auto"):
        Batches(4, torch.device("cuda")).run(range(4), fits(3))
    for wrong in ("many", 0, "-1", None):
        with pytest.raises(TaskError, match="positive number or auto"):
            Batches(wrong, torch.device("cpu"))


def test_each_process_takes_its_own_gpu(monkeypatch):
    from prunetune.evaluation.run.bridge import _own_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _own_device("cuda:0") == "cuda:0" and _own_device(None) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _own_device("cuda:0") == _own_device("cuda") == _own_device(None) == "cuda:3"
    assert _own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows one alone
    assert _own_device(None) == "cuda:0"
    monkeypatch.delenv("WORLD_SIZE")  # as VLMEvalKit does while it makes a model
    assert _own_device(None) == "cuda:0" and _own_device("cuda:0") == "cuda:0"


def test_only_below_the_command_line_an_error_ends_the_process(plugin, tmp_path, capsys):
    def cli_evaluate(call):
        return call()

    def load():
        return plugin.PrunetuneModel(config=str(tmp_path / "none.yaml"))

    with pytest.raises(Exception, match=r"none\.yaml") as raised:
        load()
    assert not isinstance(raised.value, SystemExit)
    with pytest.raises(SystemExit, match=r"prunetune: .*none\.yaml"):
        cli_evaluate(load)


def test_bridge_runs_without_lmms_eval(config):
    assert Bridge(load_config(EvaluateConfig, config), "cpu").config.max_new_tokens == 3
