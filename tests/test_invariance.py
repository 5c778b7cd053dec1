"""What is kept of an image depends on nothing but the image and the question: not on its batch, its place in it, the
number of threads, or on whether the model trains or generates, in every dtype."""

import pytest
import torch
from conftest import scene_sample, spec_of
from qwen_world import Row, batch, tiny_qwen
from test_llava_next import batch as crops_batch  # noqa: F401  (fixtures)
from test_llava_next import next_model  # noqa: F401
from test_qwen2_5_vl import NAMES as QWEN_NAMES
from test_qwen2_5_vl import Words
from test_qwen2_5_vl import spec_of as qwen_spec_of

from prunetune.models import load_model
from prunetune.pruning import PrunedModel, registered_methods

NAMES = [name for name, method in registered_methods().items() if name != "identity" and not method.video]
DTYPES = ["float32", "bfloat16", "float16"]
NEEDS = frozenset().union(*(spec_of(name).build().needs for name in NAMES))
QWEN_NEEDS = frozenset().union(*(qwen_spec_of(name).build().needs for name in QWEN_NAMES))
QUESTIONS = ["where is the circle ?", "what number is shown ?", "describe the southeast .", "what color is it ?"]


@pytest.fixture(scope="module", params=DTYPES)
def llava(request, untrained_folder):
    return load_model(str(untrained_folder), dtype=request.param)


@pytest.fixture(scope="module")
def samples():
    return [scene_sample(10_000_001 + seed, QUESTIONS[seed % 4]) for seed in range(8)]


@pytest.fixture(scope="module")
def encoded():
    """What towers made of the same inputs, once for all methods: it takes most of the time."""
    return {}


def kept(pruned, inputs, encoded):
    """The kept tokens of every image, in reading order."""
    pruned.encode = lambda given, _=None: once(pruned, given, encoded)
    prepared = pruned.prepare(inputs)
    found = []
    for choice in prepared.chosen.values():
        chosen = choice.kept_tokens()
        found += [chosen[origin.clamp(min=0)] & (origin >= 0) for origin in choice.vision.origin]
    return found


def once(pruned, inputs, encoded):
    """The images of a batch with every signal that any method reads, computed once for equal circumstances."""
    key = [type(pruned.model), pruned.model.training, torch.get_num_threads()]
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            key += [name, value.dtype, value.shape, value.view(torch.uint8).numpy().tobytes()]
    if tuple(key) not in encoded:
        needs = QWEN_NEEDS if "image_grid_thw" in inputs else NEEDS
        encoded[tuple(key)] = PrunedModel.encode(pruned, inputs, needs)
    return dict(encoded[tuple(key)])


def placed(inputs, model):
    return {name: value.to(model.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_llava_keeps_the_same_alone_in_batches_in_training_and_with_other_threads(
    llava, reading, samples, encoded, name
):
    model, processor = llava
    pruned = PrunedModel(model, spec_of(name), processor.tokenizer)

    def chosen(batch):
        return kept(pruned, placed(batch, model), encoded)

    together = chosen(reading.training_batch(samples))
    for size, make in ((1, reading.prompt_batch), (2, reading.training_batch)):
        for first in range(0, 4 * size, size):
            part = samples[first : first + size]
            for one, other in zip(chosen(make(part)), together[first:], strict=False):
                assert torch.equal(one, other), (size, first, make.__name__)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        turned = chosen(reading.prompt_batch(samples[::-1]))
        assert all(torch.equal(one, other) for one, other in zip(turned[::-1], together, strict=True)), threads
    model.train()
    try:
        trained = chosen(reading.training_batch(samples))
    finally:
        model.eval()
    assert all(torch.equal(one, other) for one, other in zip(trained, together, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QWEN_NAMES)
def test_qwen_keeps_the_same_alone_and_among_images_of_other_sizes(encoded, name, dtype):
    model = tiny_qwen(getattr(torch, dtype))
    sizes = [(8, 12), (12, 8), (8, 8), (8, 12), (16, 8), (8, 8), (12, 12), (8, 12)]
    rows = [Row((("image", (1, *size), 20 + seed),), 6, seed) for seed, size in enumerate(sizes)]
    pruned = PrunedModel(model, qwen_spec_of(name), Words())

    def chosen(part, side="right"):
        own = {**batch(part, side, dtype=model.dtype), "instructions": [f"q {row.seed}" for row in part]}
        return kept(pruned, own, encoded)

    together = chosen(rows)
    for size, side in ((1, "left"), (2, "right"), (4, "left")):
        for first in range(0, 8, size):
            for one, other in zip(chosen(rows[first : first + size], side), together[first:], strict=False):
                assert torch.equal(one, other), (size, first, side)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(chosen(rows), together, strict=True)), threads


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["item", "image"])
@pytest.mark.parametrize("name", NAMES)
def test_crops_are_kept_the_same_alone_and_in_a_batch(next_model, crops_batch, encoded, name, scope, dtype):  # noqa: F811
    from test_llava_next import PER_METHOD, QUESTIONS, plug, rows

    if (name, scope) not in PER_METHOD:
        pytest.skip("this method can't pool crops")
    model = next_model.to(getattr(torch, dtype))
    try:
        inputs = placed(rows(model, placed(crops_batch, model)), model) | {"instructions": QUESTIONS}
        pruned = plug(model, name, scope=scope)
        together = kept(pruned, inputs, encoded)
        for row, crops in enumerate((3, 5)):
            own = {
                "input_ids": inputs["input_ids"][row : row + 1, : int(inputs["attention_mask"][row].sum())],
                "pixel_values": inputs["pixel_values"][row : row + 1, :crops],
                "image_sizes": inputs["image_sizes"][row : row + 1],
                "instructions": QUESTIONS[row : row + 1],
            }
            own["attention_mask"] = torch.ones_like(own["input_ids"])
            assert torch.equal(kept(pruned, own, encoded)[0], together[row])
    finally:
        next_model.float()
