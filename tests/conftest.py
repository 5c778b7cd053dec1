"""Small models and data that every test can use; nothing here reaches for a hub or a network."""

import copy
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="prunetune-datasets-"))
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed imports a compiler that nothing here uses, in every rank

from pathlib import Path

import hypothesis
import pytest
import shapes  # noqa: F401 - checks shape types; before anything of ours is imported
import torch
from PIL import ImageFile

from prunetune import plugins
from prunetune.data_recipes import Formatter, Sample, Turn
from prunetune.pruning import PruningSpec
from prunetune.pruning.text import instruction_text
from prunetune.tiny_world.recipe import SceneImages
from prunetune.tiny_world.training.model import build_llava, build_processor, build_tokenizer

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
TINY_VLM = ROOT / "assets" / "tiny_vlm"
GOLDEN = ROOT.parent / "shared" / "golden"
GOLDEN_NEWER = ROOT.parent / "shared" / "golden2"


THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


# Each of them is one worker's alone; begun last, it would leave the others with nothing to do.
LONGEST = ("test_recalibrate_cluster", "test_layout", "test_recalibrate", "test_canaries", "test_recalibrate_mixed",
           "test_plugins", "test_screen", "test_launched_selections", "test_tiny_vlm", "test_invariance")  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _own_plugins(monkeypatch):
    """What a test loads from outside goes with it: every later manifest of the process would name it."""
    plugins.load_installed()  # once in a process, and so before
    monkeypatch.setattr(plugins, "_LOADED", dict(plugins._LOADED))


@pytest.fixture(autouse=True)
def _whole_pictures():
    """lmms-eval, once imported, makes Pillow take files that are cut short, in the whole process."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.fixture(scope="session")
def processor():
    return build_processor(build_tokenizer())


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory, processor):
    """A stock checkpoint of the tiny architecture with random float32 weights, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(1)
    model = build_llava(len(processor.tokenizer))
    with torch.no_grad():  # livelier than the initialisation, so that attention and answers differ between inputs
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _loaded(untrained_folder):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(untrained_folder).eval()


@pytest.fixture
def model(_loaded):
    """The stock model, every test's own; copies are made in a tenth of the time of loading it."""
    return copy.deepcopy(_loaded)


@pytest.fixture
def formatter(processor):
    return Formatter(processor, SceneImages())


@pytest.fixture
def reading(processor):
    """A formatter whose batches carry the instruction, for methods that read it."""
    return Formatter(processor, SceneImages(), instructions=instruction_text)


def spec_of(name: str, keep=16, **fields) -> PruningSpec:
    """Every method's specification for the tiny models: their own text tower, and a layer that they have."""
    special = {
        "hiprune": {"object_layer": 2, "alpha": 0.5},
        "prumerge": {"neighbours": 8},
        "vscan": {"shallow_layer": 2},
    }
    options = special.get(name, {})
    return PruningSpec(name, keep, options, text_tower=str(TINY_VLM / "clip"), **fields)


def scene_sample(seed: int, question="what number is shown ?", answer="4 7") -> Sample:
    return Sample(f"s{seed}", "vg", f"scene:{seed}", (Turn(question, answer),))


@pytest.fixture
def samples():
    return [
        scene_sample(10_000_001),
        scene_sample(10_000_002, "where is the circle ?", "northwest"),
        scene_sample(10_000_003, "describe the southeast .", "large blue square"),
    ]
