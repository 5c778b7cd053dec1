"""LLaVA's own tokens in its three modes, by a second implementation and by its own; what a tokenizer can't give."""

import json
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import TINY_VLM
from llama_tokenizers import FORMS, golden, golden_file, llava, sentence_pieces, spaced, tokenizer
from test_segments import GOLDEN_TOKENS, Noise, lines
from transformers.utils import sentencepiece_model_pb2_new as protobuf

from prunetune.configs import ModelConfig
from prunetune.data_recipes import DataError, Formatter, Sample, Turn
from prunetune.data_recipes.llava_json import parse_record
from prunetune.data_recipes.oddities import oddities
from prunetune.data_recipes.pieces import scores_of, spaces_last
from prunetune.data_recipes.segments import SYSTEM, Tokens, segments_of
from prunetune.data_recipes.tokens import check_tokens
from prunetune.models import Arm
from prunetune.models.loading import load_processor

MODES = ("legacy", "nonlegacy_431", "nonlegacy_437")


def record(*said, image=True, **more):
    """A record as LLaVA's files have it, of questions and answers in turn."""
    messages = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    return {"id": "r", "conversations": messages, **({"image": "vg/1.jpg"} if image else {}), **more}


RECORDS = [
    record("<image>\nwhere is it?", "top left"),
    record("<image>\nis it red?", "yes", "  a  dog?", " two  words ", "why\n", "\n"),
    record("where is the red circle?\n<image>", "top  left"),
    record("where is <image> it?", "42"),
    record("déjà vu ▁?", "42, of ▁ them\n", "and▁?", "▁▁yes", image=False),
    record("<image>", "Provide the region", "", "yes"),
    record("   <image>  \n", "Yes", "\t\ta\r\n", "漢 😀 é"),
    record("USER: what ASSISTANT?", "no USER: either", image=False),
    record("<image>\n" + "where " * 90, "is it " * 60, "and  " * 70, "yes"),
]
GPT_FIRST = {
    "id": "g", "image": "vg/1.jpg",
    "conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "<image>\nis it red?"},
                      {"from": "gpt", "value": "yes"}],
}  # fmt: skip


class Naive:
    """BPE as it is written in papers: characters, and of all neighbours the best ranked pair again and again."""

    def __init__(self, model):
        from tokenizers import Tokenizer

        file = json.loads(Tokenizer(model).to_str())["model"]
        self.ids = file["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(file["merges"])}

    def pieces(self, text):
        parts = list(text.replace(" ", "▁"))
        while True:
            pairs = [(self.ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in self.ranks]
            if not pairs:
                return parts
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def numbers(self, pieces):
        found = []
        for piece in pieces:
            own = [piece] if piece in self.ids else [f"<0x{byte:02X}>" for byte in piece.encode()]
            found += [self.ids[part] for part in own]
        return found

    def after_end(self, text, mode):
        """A piece behind an end token, as each version of the tokenizer wrote it."""
        if mode == "legacy":
            return self.numbers(self.pieces("▁" + text))
        if mode == "nonlegacy_437":
            return self.numbers(self.pieces(text))
        first, *rest = self.pieces("▁" + text)
        bare = first.removeprefix("▁")
        return ([self.ids.get(bare, self.ids["<unk>"])] if bare else []) + self.numbers(rest)

    def conversation(self, said, image, mode):
        """Ids with -200 for the picture, and labels, from what LLaVA's prompt is: one text, cut at its marks."""
        said = list(said)
        if image:
            said[0] = ("<image>\n" + said[0].replace("<image>", "").strip()).strip()
        rounds = [f"USER: {asked} ASSISTANT: {answer}" for asked, answer in zip(said[::2], said[1::2], strict=True)]
        rounds[0] = f"{SYSTEM} {rounds[0]}"
        ids, labels = [self.ids["<s>"]], [-100]
        for number, text in enumerate(rounds):
            *before, own = text.split("<image>")
            for part in before:
                ids += [*self.numbers(self.pieces("▁" + part)), -200]
            labels += [-100] * (len(ids) - len(labels))
            asked = own[: own.index(" ASSISTANT: ") + len(" ASSISTANT: ")]
            made = [
                self.after_end(part, mode) if number else self.numbers(self.pieces("▁" + part)) for part in (own, asked)
            ]
            ids += [*made[0], self.ids["</s>"]]
            labels += [-100] * (len(made[1]) - 1) + [*made[0][len(made[1]) - 1 :], self.ids["</s>"]]
        return ids, labels


@pytest.fixture(scope="module")
def small():
    return spaced()


def row_of(segments, sample):
    (row,) = segments.rows([sample])
    return [-200 if token == segments.image else token for token in row.ids], row.labels(-100)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_a_second_implementation_whatever_form_is_loaded(small, form, mode):
    segments = segments_of(tokenizer(small, form), "<image>", mode)
    naive = Naive(small)
    for given in RECORDS:
        sample = parse_record(given, "here", None)
        said = [message["value"] for message in given["conversations"]]
        ids, labels = naive.conversation(said, "image" in given, mode)
        assert row_of(segments, sample) == (ids, labels)
        assert segments.lengths([sample]) == [len(ids) - ("image" in given)]


@pytest.mark.parametrize("mode", MODES)
def test_batches_hold_them_and_prompts_end_where_the_answer_begins(small, mode):
    formatter = Formatter(llava(tokenizer(small, "rebuilt")), Noise(), "vicuna_v1", "pad", tokens=mode)
    naive, places = Naive(small), formatter.processor.image_token_id
    samples = [parse_record(given, "here", None) for given in RECORDS[:5]]
    batch = formatter.training_batch(samples)
    for row, given in enumerate(RECORDS[:5]):
        said = [message["value"] for message in given["conversations"]]
        ids, labels = naive.conversation(said, "image" in given, mode)
        seen = batch["attention_mask"][row].bool()
        found = zip(batch["input_ids"][row][seen].tolist(), batch["labels"][row][seen].tolist(), strict=True)
        assert [pair for pair in found if pair[0] != places] == [
            p for p in zip(ids, labels, strict=True) if p[0] != -200
        ]
    turns = samples[1].turns
    asked = Sample("a", "vg", "wide", (*turns[:-1], Turn(turns[-1].question, None)))
    prompt = formatter.prompt_batch([asked])["input_ids"][0]
    assert torch.equal(prompt, batch["input_ids"][1][: len(prompt)])


def test_the_modes_differ_behind_an_end_token_alone(small):
    one = Sample("one", "vg", "wide", (Turn("is it red?", "yes"),))
    two = Sample("two", "vg", "wide", (Turn("is it red?", "yes"), Turn("where?", "left")))
    rows = {mode: segments_of(tokenizer(small), "<image>", mode).rows([one, two]) for mode in MODES}
    assert rows["legacy"][0] == rows["nonlegacy_431"][0] == rows["nonlegacy_437"][0]
    own = tokenizer(small)
    behind = {}
    for mode, (_, row) in rows.items():
        end = row.ids.index(own.eos_token_id)
        assert row.ids[:end] == rows["legacy"][1].ids[:end]
        answers = [token for token in row.labels(-100) if token != -100]
        assert answers == [token for token in rows["legacy"][1].labels(-100) if token != -100]
        behind[mode] = own.convert_ids_to_tokens(row.ids[end + 1 :])
    assert behind["legacy"][0].startswith("▁US") and behind["nonlegacy_437"][0].startswith("U")
    assert len({tuple(pieces) for pieces in behind.values()}) == 3


def test_a_first_message_of_gpt_is_dropped_as_llava_drops_it(small):
    segments = segments_of(tokenizer(small), "<image>", "legacy")
    (row,) = segments.rows([parse_record(GPT_FIRST, "here", None)])
    (plain,) = segments.rows([parse_record(record("<image>\nis it red?", "yes"), "here", None)])
    assert row == plain


def test_the_default_is_what_the_loaded_tokenizer_gives(small):
    """Of a file as it is published that is LLaVA's mode legacy, so that nothing changes where nothing is named."""
    sample = parse_record(RECORDS[1], "here", None)
    by_form = {form: segments_of(tokenizer(small, form), "<image>").rows([sample])[0] for form in FORMS}
    exact = segments_of(tokenizer(small), "<image>", "legacy").rows([sample])[0]
    assert by_form["published"] == by_form["rebuilt, legacy"] == exact != by_form["rebuilt"]


# ---- what can't be given -------------------------------------------------------------------------------------------


def test_a_tokenizer_that_was_built_anew_is_told_with_its_first_token(small):
    assert check_tokens(llava(tokenizer(small)), "vicuna_v1") is None
    told = check_tokens(llava(tokenizer(small, "rebuilt")), "vicuna_v1")
    assert "token 1, behind '<s>', is 'A' (" in told and "LLaVA's is '▁' (" in told
    assert "normaliser none and the pre-tokenizer Metaspace (prepend_scheme first)" in told
    assert "config.json" in told and "set model.tokens to legacy" in told and "\n" not in told
    told = check_tokens(llava(tokenizer(small, "rebuilt, legacy")), "vicuna_v1")
    assert "behind '▁<image>'" in told  # where nothing is asked about a picture
    for form in FORMS:
        for mode in MODES:
            assert check_tokens(llava(tokenizer(small, form)), "vicuna_v1", mode) is None


def test_merges_in_the_order_of_ids_are_told_and_stop_where_the_scores_are_known(small, tmp_path):
    wrong = spaced(first=True)
    told = check_tokens(llava(tokenizer(wrong)), "vicuna_v1")
    assert "is '▁▁' (" in told and "LLaVA's is '▁' (" in told and "normaliser Prepend + Replace" in told
    assert "put the published tokenizer.json beside it" in told and "model.tokens" not in told
    assert check_tokens(llava(tokenizer(wrong)), "vicuna_v1", "legacy") == told  # nothing proves it
    (tmp_path / "tokenizer.model").write_bytes(sentence_pieces(small))
    with pytest.raises(DataError, match="model.tokens nonlegacy_431: .* is '▁▁' .* LLaVA's is '▁' "):
        check_tokens(llava(tokenizer(wrong)), "vicuna_v1", "nonlegacy_431", tmp_path)
    assert check_tokens(llava(tokenizer(small)), "vicuna_v1", "legacy", tmp_path) is None
    assert check_tokens(llava(tokenizer(small)), "vicuna_v1", "model", tmp_path) is None
    both = check_tokens(llava(tokenizer(wrong, "rebuilt")), "vicuna_v1", "model", tmp_path)
    assert "token 1," in both and "config.json" in both and "ordered by ids" in both


def test_scores_that_say_otherwise_win_over_the_rule_of_spaces(tmp_path):
    """A tokenizer whose spaces were merged first in its own model is as it was made."""
    wrong = spaced(first=True)
    (tmp_path / "tokenizer.model").write_bytes(sentence_pieces(wrong))
    scores = scores_of(tmp_path / "tokenizer.model")
    written = protobuf.ModelProto()
    written.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    for piece in written.pieces:
        if not piece.piece.strip("▁"):
            piece.score = 1.0
    (tmp_path / "tokenizer.model").write_bytes(written.SerializeToString())
    assert scores["▁▁"] == -1e9 and scores_of(tmp_path / "tokenizer.model")["▁▁"] == 1.0
    assert check_tokens(llava(tokenizer(wrong)), "vicuna_v1", "legacy", tmp_path) is None


def test_broken_model_files_are_read_as_none(tmp_path):
    whole = sentence_pieces(spaced())
    for content in (b"", b"no model at all", whole[:100], b"\xff" * 40):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert scores_of(tmp_path / "tokenizer.model") is None
        assert check_tokens(llava(tokenizer(spaced())), "vicuna_v1", "legacy", tmp_path) is None
    assert scores_of(tmp_path / "nothing") is None


def test_spaces_go_behind_all_others():
    assert spaces_last([("▁", "▁"), ("▁", "t"), ("▁▁", "▁"), ("a", "b")]) == [
        ("▁", "t"), ("a", "b"), ("▁", "▁"), ("▁▁", "▁"),
    ]  # fmt: skip


def test_tokens_of_llava_need_its_template_and_tokenizer(small, processor):
    with pytest.raises(DataError, match="of template vicuna_v1 alone, and model.template is model"):
        check_tokens(processor, "model", "legacy")
    with pytest.raises(DataError, match="needs a tokenizer of Llama's kind, .* this one has the model WordLevel"):
        check_tokens(processor, "vicuna_v1", "legacy")
    assert check_tokens(processor, "vicuna_v1") is None and check_tokens(processor, "model") is None
    for own, template in ((processor, "vicuna_v1"), (llava(tokenizer(small)), "qwen3_vl")):
        with pytest.raises(DataError, match="model.tokens legacy builds LLaVA's own prompts"):
            Formatter(own, Noise(), template, tokens="legacy")
    formatter = Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1", tokens="legacy")
    with pytest.raises(DataError, match="sample 'q': a turn before the last has no answer"):
        formatter.prompt_batch([Sample("q", "vg", None, (Turn("is it?", None), Turn("where?", None)))])


def test_special_tokens_in_a_text_are_read_without_the_template(small):
    formatter = Formatter(llava(tokenizer(small)), Noise(), "vicuna_v1", tokens="legacy")
    batch = formatter.training_batch([Sample("s", "text", None, (Turn("what is <unk>?", "a </s> tag"),))])
    ends = (batch["input_ids"][0] == formatter.processor.tokenizer.eos_token_id).sum()
    assert ends == 2 and int((batch["labels"][0] != -100).sum()) > 2


# ---- where the name stands -----------------------------------------------------------------------------------------


def test_the_option_has_the_names_of_the_segments():
    assert get_args(ModelConfig.model_fields["tokens"].annotation) == get_args(Tokens) == ("model", *MODES)


def test_records_name_the_mode_and_those_without_it_stay():
    assert "tokens" not in ModelConfig(path="x").model_dump()
    assert ModelConfig(path="x", tokens="nonlegacy_431").model_dump()["tokens"] == "nonlegacy_431"


@pytest.fixture(scope="module")
def checkpoints(small, tmp_path_factory):
    """Stock checkpoints with a tokenizer of Llama's kind: as published, and saved after it was built anew."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folders = {}
    for form in ("published", "rebuilt"):
        folder = tmp_path_factory.mktemp("checkpoint")
        processor = llava(tokenizer(small, form))
        processor.chat_template = "{{ bos_token }}"
        small_sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=56, patch_size=14, **small_sizes),
            text_config=LlamaConfig(vocab_size=len(processor.tokenizer), num_key_value_heads=2, **small_sizes),
            image_token_id=processor.image_token_id,
        )
        LlavaForConditionalGeneration(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[form] = str(folder)
    return folders


def test_a_model_is_told_of_when_it_is_loaded(checkpoints, capsys):
    def load(form, tokens="model", template="vicuna_v1"):
        arm = Arm.load(ModelConfig(path=checkpoints[form], template=template, tokens=tokens, dtype="float32"))
        return arm, capsys.readouterr().out

    assert load("published")[1] == ""
    arm, told = load("rebuilt")
    assert told.count("\n") == 1 and f"{checkpoints['rebuilt']}: the tokenizer does not give the tokens" in told
    exact, told = load("rebuilt", "legacy")
    assert told == "" and exact.formatter(Noise()).tokens == "legacy"
    assert arm.template == exact.template and arm.template_hash != exact.template_hash
    assert exact.template_hash != load("rebuilt", "nonlegacy_437")[0].template_hash
    with pytest.raises(DataError, match="of template vicuna_v1 alone"):
        load("published", "legacy", "model")


def test_arms_without_a_name_keep_their_hash(checkpoints):
    from hashlib import sha256

    arm = Arm.load(ModelConfig(path=checkpoints["published"], template="vicuna_v1", dtype="float32"))
    assert arm.template_hash == sha256(arm.template.encode()).hexdigest()


# ---- data check ----------------------------------------------------------------------------------------------------


def test_oddities_have_a_line_each():
    turns = (Turn("", "yes"), Turn("", ""), Turn("a <s>?", "x</s>y"), Turn("ASSISTANT:", "ASSISTANT: no"))
    found = oddities(Sample("s", "vg", "1.jpg", turns))
    assert [line.partition(" has ")[0].partition(" holds ")[0] for line in found] == [
        "s: turn 2", "s: turn 2", "s: turn 3", "s: turn 3", "s: turn 4",
    ]  # fmt: skip
    assert "empty answer" in found[0] and "empty question" in found[1] and "'<s>'" in found[2] and "'</s>'" in found[3]
    assert oddities(Sample("t", "text", None, turns[:1]))[0].startswith("t: turn 1 has an empty question")
    assert not oddities(Sample("u", "text", None, (Turn("USER: ASSISTANT?", " \n"),)))


def test_check_reports_them_and_does_not_fail(tmp_path, capsys):
    from prunetune.cli import main

    (tmp_path / "mix.json").write_text(json.dumps([record("what?", "", image=False), record("a", "b", image=False)]))
    (tmp_path / "own.yaml").write_text("name: own\nformat: llava_json\nfile: mix.json\n")
    line = ["data", "check", "--recipe", str(tmp_path / "own.yaml"), "--image-root", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(line)
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "odd in LLaVA's prompt         1\n    r: turn 1 has an empty answer" in printed
    with pytest.raises(SystemExit) as stop:
        main([*line, "--tokens", "legacy"])
    assert "give --model" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        main([*line, "--tokens", "legacy", "--template", "vicuna_v1", "--model", str(TINY_VLM)])
    assert "this one has the model WordLevel" in stop.value.code


def test_check_measures_in_the_mode_and_tells_of_the_tokenizer(small, checkpoints, tmp_path):
    from prunetune.data_recipes.check import check_data

    (tmp_path / "mix.json").write_text(json.dumps([record("is it?", "yes", "where?", "left", image=False)]))
    processor = load_processor(checkpoints["rebuilt"])
    for mode in MODES:
        report = check_data("custom", str(tmp_path / "mix.json"), None, processor, "vicuna_v1", tokens=mode)
        ids, _ = Naive(small).conversation(["is it?", "yes", "where?", "left"], False, mode)
        assert report.tokens is None and report.lengths[100] == len(ids)
    report = check_data("custom", str(tmp_path / "mix.json"), None, processor, "vicuna_v1")
    assert (
        "\ntokenizer             the tokenizer does not give the tokens of LLaVA's own code: token 1,"
        in report.to_text()
    )


# ---- LLaVA's own code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llavas_model():
    content = golden_file()
    if content is None or not GOLDEN_TOKENS.is_dir():
        pytest.skip("golden ids, or the tokenizer that they were made with, are not here (see llama_tokenizers.py)")
    return golden(content), content


def expected_of(case, mode):
    expected = case["expected"][mode]
    return case["expected"]["legacy"] if expected == "legacy" else expected


def sample_of(case):
    image = {"image": "vg/1.jpg"} if case["image"] else {}
    return parse_record({"id": case["id"], "conversations": case["conversations"], **image}, case["id"], None)


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_labels_are_llavas_own_in_every_mode(llavas_model, form):
    own = tokenizer(llavas_model[0], form)
    regular = [case for case in lines("cases.jsonl") if not case["quirk"]]
    assert len(regular) == 112
    for mode in MODES:
        segments = segments_of(own, "<image>", mode)
        for case in regular:
            expected, limit = expected_of(case, mode), case["max_length"]
            labels = np.full(len(expected["ids"]), -100)
            for start, end in expected["supervised"]:
                labels[start:end] = expected["ids"][start:end]
            ids, found = row_of(segments, sample_of(case))
            assert not expected["ignored"]
            assert (ids[:limit], found[:limit]) == (expected["ids"], labels.tolist()), (case["id"], mode)
        for case in lines("prompts.jsonl"):
            asked = Sample(case["id"], "x", "wide", (Turn(case["question"], None),))
            assert row_of(segments, asked)[0] == expected_of(case, mode), (case["id"], mode)


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_a_run_hold_llavas_tokens(llavas_model, mode):
    formatter = Formatter(llava(tokenizer(llavas_model[0], "rebuilt")), Noise(), "vicuna_v1", "pad", tokens=mode)
    places = formatter.processor.image_token_id
    for case in lines("cases.jsonl"):
        if case["quirk"] or "truncated" in case["kind"]:
            continue
        batch = formatter.training_batch([sample_of(case)])
        expected = [token for token in expected_of(case, mode)["ids"] if token != -200]
        assert [token for token in batch["input_ids"][0].tolist() if token != places] == expected


def test_every_accident_is_reported_and_nothing_else(llavas_model):
    for case in lines("cases.jsonl"):
        assert bool(oddities(sample_of(case))) == case["quirk"], case["id"]


def test_the_gate_knows_llavas_tokenizer(llavas_model, tmp_path):
    model, content = llavas_model
    (tmp_path / "tokenizer.model").write_bytes(content)
    for mode in ("model", "legacy"):
        assert check_tokens(llava(tokenizer(model)), "vicuna_v1", mode, tmp_path) is None
    told = check_tokens(llava(tokenizer(model, "rebuilt")), "vicuna_v1", "model", tmp_path)
    assert "token 1, behind '<s>', is 'A' (28741), LLaVA's is '▁A' (330)" in told
