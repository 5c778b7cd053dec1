"""Lengths for planning: what the batches of a run hold, before a picture is opened."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from llama_tokenizers import FORMS, llava, tokenizer, trained
from test_processors import MADE, SAMPLES, Pictures
from test_segments import SAMPLES as CONVERSATIONS
from test_segments import Noise

from prunetune.data_recipes import Formatter, RecipeData, Sample, Turn, lengths, store
from prunetune.data_recipes.content import content_hash
from prunetune.data_recipes.lengths import text_lengths
from prunetune.data_recipes.segments import segments_of

WORDS = tokenizer(trained())


def recipe(samples, images):
    rows = Dataset.from_list([sample.to_row() for sample in samples])
    return RecipeData("own", rows, images, content_hash(rows), {}, [])


def seen(formatter, samples, places):
    """The tokens of each sample's training batch that are no picture's, one sample at a time."""
    found = []
    for sample in samples:
        batch = formatter.training_batch([sample])
        ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
        found.append(sum(token not in places for token in ids))
    return found


class Closed:
    """Opens no picture at all."""

    def open(self, name, sample):
        raise AssertionError("a picture was opened")


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_onevision"])
@pytest.mark.parametrize("form", FORMS)
def test_they_are_those_of_training_batches(form, template):
    words = tokenizer(trained(), form)
    if template == "llava_onevision":
        words.add_special_tokens({"eos_token": "<|im_end|>"})
    formatter = Formatter(llava(words), Noise(), template, "pad")
    places = {words.convert_tokens_to_ids("<image>")}
    expected = seen(formatter, CONVERSATIONS, places)
    formatter.images = Closed()
    found = text_lengths(recipe(CONVERSATIONS, Closed()), formatter)
    assert found.dtype == np.int64 and found.tolist() == expected


@pytest.mark.parametrize("family", MADE)
def test_they_are_those_of_every_familys_batches(family):
    """With what the processor writes around one picture; pictures that it cuts into tiles have more between them."""
    processor, model = MADE[family]()
    template = "paligemma" if family == "paligemma" else "model"
    samples = SAMPLES if family != "paligemma" else [SAMPLES[0], Sample("b", "x", "high", (Turn("is ?", "red blue"),))]
    if family == "idefics3":
        samples = [sample for sample in samples if sample.image is None]
    places = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")}
    formatter = Formatter(processor, Pictures(), template)
    expected = seen(formatter, samples, places)
    assert text_lengths(recipe(samples, Closed()), formatter).tolist() == expected


def test_they_are_kept_by_content_template_and_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "stored_file", lambda name: tmp_path / "cache" / name)
    formatter = Formatter(llava(tokenizer(trained())), Closed(), "vicuna_v1", "pad")
    data = recipe(CONVERSATIONS, Closed())
    first = text_lengths(data, formatter)
    (file,) = (tmp_path / "cache").iterdir()
    calls = []
    made = lengths._text_tokens
    monkeypatch.setattr(lengths, "_text_tokens", lambda *given: calls.append(1) or made(*given))
    formatter.processor.tokenizer(["a", "b c d"], padding=True)  # what it was last used for is no part of it
    assert np.array_equal(text_lengths(data, formatter), first) and not calls
    text_lengths(recipe(CONVERSATIONS[:3], Closed()), formatter)
    text_lengths(data, Formatter(llava(tokenizer(trained(), "rebuilt")), Closed(), "vicuna_v1", "pad"))
    assert len(list((tmp_path / "cache").iterdir())) == 3 and calls
    file.write_bytes(file.read_bytes()[:-9])  # a disk that was full
    assert np.array_equal(text_lengths(data, formatter), first)


@given(st.lists(st.text("  ▁ab é\n\tthe USER:12😀語", max_size=40), max_size=4))
def test_words_have_as_many_tokens_one_by_one_as_together(texts):
    segments = segments_of(WORDS, "<image>")
    assert segments._words is not None
    samples = [Sample("a", "x", None, tuple(Turn(text, text[::-1]) for text in texts or ["a"]))]
    (row,), (length,) = segments.rows(samples), segments.lengths(samples)
    assert length == len(row.ids)
    segments._words = None  # as with a vocabulary whose entries hold spaces
    assert segments.lengths(samples) == [length]
