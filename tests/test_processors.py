"""Batches of the stock processors, through the formatter, on tiny models of their families: nothing is lost between.

Processors are composed of a tokenizer of a few words and the PIL image processors; none comes from a hub.
"""

import numpy as np
import pytest
import torch
import transformers
from gemma_world import tiny_gemma3, tiny_paligemma
from idefics_world import tiny_idefics
from PIL import Image
from qwen_world import tiny_qwen
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunetune.data_recipes import DataError, Formatter, Sample, Turn
from prunetune.pruning import PrunedModel, PruningSpec

WORDS = ["what", "is", "red", "blue", "a", "square", "?", "USER", "ASSISTANT"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}ASSISTANT {% else %}{% generation %}{{ message['content'][0]['text'] }} {{ eos_token }} "
    "{% endgeneration %}{% endif %}{% endfor %}"
)
SAMPLES = [
    Sample("wide", "x", "wide", (Turn("what is red ?", "a square"),)),
    Sample("text", "x", None, (Turn("what is blue ?", "a red square"),)),
    Sample("high", "x", "high", (Turn("is a square blue ?", "red"), Turn("what ?", "blue"))),
]


class Pictures:
    """Pictures of two shapes."""

    def open(self, name, sample):
        size = (64, 40) if name == "wide" else (32, 72)
        pixels = np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def tokenizer(first, **named):
    """Return a tokenizer with the given special tokens at the first ids, and its words behind them."""
    words = [*first, *WORDS, "<unk>"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": first[0], "bos_token": first[1], "eos_token": first[2], "unk_token": "<unk>"}
    own = PreTrainedTokenizerFast(tokenizer_object=inner, extra_special_tokens=named, **special)
    own.add_special_tokens({"additional_special_tokens": [token for token in first if token.startswith("<")]})
    return own


def gemma3():
    words = tokenizer(
        ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<image>"],
        image_token="<image>",
        boi_token="<boi>",
        eoi_token="<eoi>",
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    template = TEMPLATE.replace("IMAGE", "<boi>")
    return transformers.Gemma3Processor(images, words, chat_template=template, image_seq_length=16), tiny_gemma3()


def paligemma():
    words = tokenizer(["<pad>", "<bos>", "<eos>", "<a>", "<b>", "<image>"], image_token="<image>")
    images = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    model = tiny_paligemma()
    processor = transformers.PaliGemmaProcessor(images, words)
    model.resize_token_embeddings(len(words))  # the processor adds a thousand places to its tokenizer
    return processor, model


def idefics3():
    places = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    first = ["<pad>", "<s>", "</s>", "<fake_token_around_image>", "<global-img>", "<image>", *places]
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = TEMPLATE.replace("IMAGE", "<image>")
    words = tokenizer([*first, "<end_of_utterance>"])
    processor = transformers.Idefics3Processor(images, words, image_seq_len=16, chat_template=template)
    return processor, tiny_idefics("idefics3")


def qwen(kind):
    """A Qwen processor asks for a video processor, and that for torchvision; a subclass without one does images."""
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]

    class ImagesAlone(getattr(transformers, f"{name}Processor")):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 16, "longest_edge": 2048}
    )
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return ImagesAlone(images, tokenizer(["<pad>", "<s>", "</s>", *marks]), template), tiny_qwen(kind=kind)


MADE = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
}


@torch.no_grad()
@pytest.mark.parametrize("family", MADE)
def test_what_processors_return_is_pruned_and_kept_whole_bit_for_bit(family):
    processor, model = MADE[family]()
    template = "paligemma" if family == "paligemma" else "model"
    formatter = Formatter(processor, Pictures(), template)
    samples = SAMPLES if family != "paligemma" else [SAMPLES[0], Sample("b", "x", "high", (Turn("is ?", "red blue"),))]
    for batch in (formatter.training_batch(samples), formatter.prompt_batch(samples)):
        names = {name: value for name, value in batch.items() if name != "sample_ids"}
        stock = model(**names)
        whole = PrunedModel(model, PruningSpec("identity", "100%")).forward(**batch)
        assert torch.equal(whole.logits, stock.logits)
        if "labels" in batch:
            assert torch.equal(whole.loss, stock.loss)
        pruned = PrunedModel(model, PruningSpec("divprune", 3))
        prepared = pruned.prepare(batch)
        assert set(prepared.kept["image"]) == {3}
        assert torch.isfinite(model(**prepared.inputs).logits).all()
        tokens = {name for name, value in prepared.inputs.items() if getattr(value, "ndim", 0) == 2}
        assert {prepared.inputs[name].shape for name in tokens} == {prepared.inputs["input_ids"].shape}


def test_token_types_of_gemma3_mark_images_and_follow_truncation():
    processor, model = gemma3()
    formatter = Formatter(processor, Pictures(), max_length=26)
    batch = formatter.training_batch(SAMPLES)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (3, 26)
    assert torch.equal(batch["token_type_ids"] == 1, batch["input_ids"] == model.config.image_token_id)


def test_token_types_of_paligemma_mark_the_answer():
    """And by the same types its own labels: the formatter's are these."""
    processor, _ = paligemma()
    formatter = Formatter(processor, Pictures(), "paligemma")
    samples = [SAMPLES[0], Sample("b", "x", "high", (Turn("is ?", "red blue"),))]
    batch = formatter.training_batch(samples)
    assert torch.equal(batch["token_type_ids"] == 1, batch["labels"] != -100)
    answers = [processor.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
    assert [answer.split() for answer in answers] == [["a", "square", "<eos>"], ["red", "blue", "<eos>"]]
    prompts = formatter.prompt_batch(samples)
    assert "labels" not in prompts and not prompts["token_type_ids"].any()
    for row in range(2):
        prefix = (batch["token_type_ids"][row] == 0) & batch["attention_mask"][row].bool()
        prompt = prompts["attention_mask"][row].bool()
        assert torch.equal(prompts["input_ids"][row][prompt], batch["input_ids"][row][prefix])


def test_samples_that_paligemma_can_not_take_are_named():
    formatter = Formatter(paligemma()[0], Pictures(), "paligemma")
    with pytest.raises(DataError, match="'text'.* takes one picture with one question, got no picture and 1 turns"):
        formatter.training_batch(SAMPLES[:2])
    with pytest.raises(DataError, match="'high'.* got a picture and 2 turns"):
        formatter.training_batch(SAMPLES[2:])
