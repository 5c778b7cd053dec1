"""Assistant masks at once: bit for bit those of transformers' own search, which is the oracle here."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_tokenizers import llava, tokenizer, trained
from test_processors import MADE, SAMPLES, Pictures

from prunetune.data_recipes import Formatter, templated
from prunetune.data_recipes.chat_templates import registered_templates
from prunetune.data_recipes.templated import token_mask, with_fast_masks


def by_transformers(formatter, samples):
    """The batch of an untouched processor, with labels from its own mask."""
    conversations = []
    for sample in samples:
        messages = []
        for number, turn in enumerate(sample.turns):
            content = [{"type": "text", "text": turn.question}]
            if number == 0 and sample.image is not None:
                content.insert(0, {"type": "image", "image": formatter.images.open(sample.image, sample.id)})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        conversations.append(messages)
    batch = dict(formatter.processor.apply_chat_template(
        conversations, chat_template=formatter.template, tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=True, processor_kwargs={"padding": True, "padding_side": "right"},
    ))  # fmt: skip
    mask = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()
    return batch | {"labels": batch["input_ids"].masked_fill(~mask, -100)}


@pytest.mark.parametrize("family", [name for name in MADE if name != "paligemma"])
def test_every_familys_batch_is_that_of_its_untouched_processor(family):
    formatter = Formatter(MADE[family]()[0], Pictures())
    batch, expected = formatter.training_batch(SAMPLES), by_transformers(formatter, SAMPLES)
    assert set(batch) - {"sample_ids"} == set(expected) and (expected["labels"] != -100).any()
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_the_search_is_replaced_in_the_copy_alone(monkeypatch):
    """Without this a transformers that asks another method would be slow, and nothing else would show it."""
    calls = []
    made = templated._marked
    monkeypatch.setattr(templated, "_marked", lambda *given: calls.append(1) or made(*given))
    formatter = Formatter(MADE["qwen2_vl"]()[0], Pictures())
    formatter.training_batch(SAMPLES)
    assert calls and "_adjust_assistant_masks_indices" not in vars(formatter.processor)


def test_formatters_go_to_processes_that_load_data():
    formatter = Formatter(llava(tokenizer(trained())), Pictures(), "vicuna_v1", "pad", raw_pixels=True)
    before = formatter.training_batch(SAMPLES)
    batch = pickle.loads(pickle.dumps(formatter)).training_batch(SAMPLES)
    for name, values in before.items():
        assert name == "sample_ids" or torch.equal(batch[name], values), name


@pytest.mark.parametrize("name", [name for name in registered_templates() if name != "paligemma"])
def test_every_shipped_templates_mask_is_transformers_own(name):
    processor = llava(tokenizer(trained()))
    template = registered_templates()[name].read_text()
    messages = []
    for number in range(6):
        for role, text in (("user", f"where is  {number}?\n"), ("assistant", f" top {number} ▁ déjà\n")):
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    options = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    expected = processor.apply_chat_template([messages, messages[:2]], **options)
    found = with_fast_masks(processor).apply_chat_template([messages, messages[:2]], **options)
    assert found["input_ids"] == expected["input_ids"]
    assert found["assistant_masks"] == expected["assistant_masks"] and sum(found["assistant_masks"][0]) > 6
    assert "_adjust_assistant_masks_indices" not in vars(processor)


SPANS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)))


@given(SPANS, SPANS)
def test_a_token_is_marked_if_it_overlaps_a_span(offsets, spans):
    found = token_mask(np.array(offsets, dtype=int).reshape(-1, 2), np.array(spans, dtype=int).reshape(-1, 2))
    assert found.tolist() == [any(start < b and end > a for a, b in spans) for start, end in offsets]
