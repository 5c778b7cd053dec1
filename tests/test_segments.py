"""LLaVA's v1 prompt by segments: the very ids and labels of the chat template, and of LLaVA's own code."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from llama_tokenizers import FORMS, golden, golden_file, llava, tokenizer, trained
from PIL import Image
from tokenizers import normalizers

from prunetune.data_recipes import DataError, Formatter, Sample, Turn
from prunetune.data_recipes.llava_json import parse_record
from prunetune.data_recipes.segments import Rule

GOLDEN_TOKENS = GOLDEN.parent / "golden_tokens"
SAMPLES = [
    Sample("one", "vg", "wide", (Turn("where is it?", "top left"),)),
    Sample("many", "gqa", "high", (Turn("is it red?", "yes"), Turn("  a  dog?", " two  words "), Turn("why", "\n"))),
    Sample("text", "text", None, (Turn("déjà vu ▁?", "42, of ▁ them\n"), Turn("", "x"))),
    Sample("empty", "vg", "wide", (Turn("", "Provide the region"),)),
    Sample("marked", "vg", "high", (Turn("what is <unk> here", "a tag"),)),  # only a template splits it
]


class Noise:
    """Pictures of two shapes."""

    def open(self, name, sample):
        size = (80, 50) if name == "wide" else (40, 90)
        return Image.fromarray(np.random.default_rng(size[0]).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def small():
    return trained()


def stock(formatter, samples, training):
    """What transformers makes of the samples by itself: its template, its processor, its search for the mask."""
    conversations = []
    for sample in samples:
        messages = []
        for number, turn in enumerate(sample.turns):
            content = [{"type": "text", "text": turn.question}]
            if number == 0 and sample.image is not None:
                opened = formatter.images.open(sample.image, sample.id)
                if formatter.square == "pad":
                    side = max(opened.size)
                    color = tuple(int(255 * part) for part in formatter.processor.image_processor.image_mean)
                    square = Image.new("RGB", (side, side), color)
                    square.paste(opened, ((side - opened.width) // 2, (side - opened.height) // 2))
                    opened = square
                content.insert(0, {"type": "image", "image": opened})
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        conversations.append(messages)
    side = "right" if training else "left"
    batch = formatter.processor.apply_chat_template(
        conversations, chat_template=formatter.template, tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=training, add_generation_prompt=not training,
        processor_kwargs={"padding": True, "padding_side": side},
    )  # fmt: skip
    batch = dict(batch)
    if training:
        mask = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)
    return batch


def assert_same(batch, expected):
    assert set(batch) - {"sample_ids"} == set(expected)
    for name, values in expected.items():
        assert batch[name].dtype == values.dtype and torch.equal(batch[name], values), name


@pytest.mark.parametrize("square", ["pad", "processor"])
@pytest.mark.parametrize("form", FORMS)
def test_batches_are_bit_for_bit_those_of_the_template_and_the_processor(small, form, square):
    formatter = Formatter(llava(tokenizer(small, form)), Noise(), "vicuna_v1", square)
    assert formatter.segments is not None and formatter.pictures.plain
    assert (formatter.pictures.fast is not None) == (square == "pad")
    rows = formatter.segments.rows(SAMPLES)
    assert [row is None for row in rows] == [False] * 4 + [True]
    assert_same(formatter.training_batch(SAMPLES), stock(formatter, SAMPLES, True))
    asked = [copy.copy(sample) for sample in SAMPLES]
    for number, sample in enumerate(SAMPLES):
        turns = (*sample.turns[:-1], Turn(sample.turns[-1].question, None))
        asked[number] = Sample(sample.id, sample.source, sample.image, turns)
    for prompts in (asked, asked[2:3], SAMPLES):  # questions, text alone, and conversations that are whole
        assert_same(formatter.prompt_batch(prompts), stock(formatter, prompts, False))


def test_tokenizers_of_another_kind_go_by_the_template(small, processor):
    assert Formatter(processor, Noise(), "vicuna_v1").segments is None  # words, split at spaces
    own = tokenizer(small)
    own.backend_tokenizer.normalizer = normalizers.NFC()
    assert Formatter(llava(own), Noise(), "vicuna_v1").segments is None
    assert Formatter(llava(tokenizer(small)), Noise(), "qwen3_vl").segments is None


def test_a_tokenizer_that_does_not_do_what_its_file_says_is_named(small):
    formatter = Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1")
    formatter.segments.rule = Rule("never", "never")
    with pytest.raises(DataError, match=r"'text', built by segments: token 1 is .* by the chat template it is '▁"):
        formatter.training_batch(SAMPLES[2:3])
    formatter = Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1")
    formatter.training_batch(SAMPLES[2:3] * 64)  # compared, and no more after that
    formatter.segments.rule = Rule("never", "never")
    formatter.training_batch(SAMPLES[2:3])


def test_truncation_is_that_of_the_template(small):
    whole = Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1", "pad").training_batch(SAMPLES[:2])
    for limit in (whole["input_ids"].shape[1] - 1, 110):
        cut = Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1", "pad", max_length=limit)
        assert torch.equal(cut.training_batch(SAMPLES[:2])["labels"], whole["labels"][:, :limit])
    with pytest.raises(DataError, match="would cut its picture apart"):
        Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1", "pad", max_length=20).training_batch(SAMPLES[:1])


# ---- LLaVA's own code ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llavas():
    """Formatters with the tokenizer that LLaVA's code was run with; its `legacy` mode is what published files do."""
    content = golden_file()
    if content is None or not GOLDEN_TOKENS.is_dir():
        pytest.skip("golden ids, or the tokenizer that they were made with, are not here (see llama_tokenizers.py)")
    model = golden(content)
    return {form: Formatter(llava(tokenizer(model, form)), Noise(), "vicuna_v1", "pad") for form in FORMS[:2]}


def lines(name):
    return [json.loads(line) for line in (GOLDEN_TOKENS / name).read_text().splitlines()]


@pytest.mark.parametrize(("form", "others"), [("published", set()), ("rebuilt, legacy", {"empty_question"})])
def test_ids_and_labels_are_those_of_llavas_own_preprocessing(llavas, form, others):
    segments = llavas[form].segments
    regular = [case for case in lines("cases.jsonl") if not case["quirk"]]
    assert len(regular) == 112
    different = set()
    for case in regular:
        image = {"image": "vg/1.jpg"} if case["image"] else {}
        sample = parse_record({"id": case["id"], "conversations": case["conversations"], **image}, case["id"], None)
        (row,) = segments.rows([sample])
        limit, expected = case["max_length"], case["expected"]["legacy"]
        ids = [-200 if token == segments.image else token for token in row.ids[:limit]]
        labels = row.labels(-100)[:limit]
        supervised = np.full(len(expected["ids"]), -100)
        for start, end in expected["supervised"]:
            supervised[start:end] = expected["ids"][start:end]
        if expected["ignored"]:  # LLaVA's own search failed there
            supervised[:] = -100
        if ids != expected["ids"] or labels != supervised.tolist():
            different.add(case["kind"])
    assert different == others


def test_prompts_are_those_of_llavas_evaluation(llavas):
    for form in llavas:
        segments = llavas[form].segments
        for case in lines("prompts.jsonl"):
            (row,) = segments.rows([Sample(case["id"], "x", "wide", (Turn(case["question"], None),))])
            expected = case["expected"]["legacy"]
            assert [-200 if token == segments.image else token for token in row.ids] == expected


def test_whole_conversations_pass_the_checks_of_a_run(llavas):
    """Read as a recipe reads them, through the formatter: no sample is refused, and none differs from its template."""
    formatter = llavas["published"]
    samples = []
    for case in lines("cases.jsonl"):
        if not case["quirk"]:
            image = {"image": "vg/1.jpg"} if case["image"] else {}
            samples.append(parse_record({"id": case["id"], "conversations": case["conversations"], **image}, "", None))
    for start in range(0, len(samples), 16):
        formatter.training_batch(samples[start : start + 16])
