"""The prefix of an image's questions computed once: the same answers, and logits but for rounding."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import test_gemma3
import test_idefics3
import test_internvl
import test_llava
import test_llava_next
import test_llava_onevision
import test_paligemma
import test_qwen2_5_vl
import test_qwen3_vl
import torch

from prunetune.assets import shipped
from prunetune.configs import EvaluateConfig, ModelConfig, TableConfig
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.run.features import feature_data
from prunetune.models import Arm
from prunetune.models.features import make_features
from prunetune.models.ranks import Ranks
from prunetune.outputs import FEATURES, OutputFolder
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Selection
from prunetune.pruning.prefix import Group, Prompt, grouped
from prunetune.scripts.tables.cells import lay_out

FAMILIES = {
    "llava": test_llava.TestLlava,
    "llava_next": test_llava_next.TestLlavaNext,
    "llava_onevision": test_llava_onevision.TestLlavaOnevision,
    "qwen2_5_vl": test_qwen2_5_vl.TestImages,
    "qwen2_5_vl videos": test_qwen2_5_vl.TestVideos,
    "qwen3_vl": test_qwen3_vl.TestImages,
    "qwen3_vl videos": test_qwen3_vl.TestVideos,
    "internvl": test_internvl.TestInternVL,
    "gemma3": test_gemma3.TestIdentity,
    "idefics3": test_idefics3.TestIdefics3,
}
ALIGNED = ("token_type_ids", "mm_token_type_ids")


def asked(family, rows, questions):
    """Rows of a family's batch with a question behind each, padded on the left."""
    inputs = family.batch(rows, "left", False)
    real = inputs["attention_mask"].bool()
    ids = [
        row[there].tolist() + list(more) for row, there, more in zip(inputs["input_ids"], real, questions, strict=True)
    ]
    length = max(map(len, ids))
    for name in ("input_ids", *ALIGNED):
        if name in inputs:
            found = []
            for number, own in enumerate(ids):
                values = inputs[name][number, real[number]].tolist()
                values = own if name == "input_ids" else values + [0] * (len(own) - len(values))
                found.append([0] * (length - len(own)) + values)
            inputs[name] = torch.tensor(found, dtype=inputs[name].dtype)
    inputs["attention_mask"] = torch.tensor([[0] * (length - len(own)) + [1] * len(own) for own in ids])
    inputs["instructions"] = [str(list(more)) for more in questions]
    return inputs


def with_and_without(family, count=1):
    """The numbers of rows with images, the first ``count`` of which are asked about, and of one of text alone."""
    rows = family.rows()
    texts = [number for number, row in enumerate(rows) if row in family.texts()]
    return [number for number in range(len(rows)) if number not in texts][:count], texts[0]


QUESTIONS = ([11], [12, 13, 14, 15], [12, 13, 16], [17, 18], [19, 20, 21], [19, 22])


def mixed(family):
    """Three questions about an image, two about another, text alone between them; and what the images are called."""
    (one, other), text = with_and_without(family, 2)
    rows = family.rows()
    names = [f"row {one}"] * 3 + [None] + [f"row {other}"] * 2
    return asked(family, [rows[number] for number in (one, one, one, text, other, other)], QUESTIONS), names


@contextmanager
def last_logits(model):
    """While open, every call's logits of the last position are gathered."""
    found = []
    handle = model.register_forward_hook(lambda *call: found.append(call[-1].logits[:, -1]))
    yield found
    handle.remove()


def both(family, model, pruned, inputs, names):
    """What is generated from whole prompts and from shared prefixes, and the logits of both."""
    family.forget(model)
    with last_logits(model) as whole:
        expected = pruned.generate(**inputs, **family.settings())
    family.forget(model)
    with last_logits(model) as found:
        shared = pruned.generate_shared(**inputs, images=names, **family.settings())
    family.forget(model)
    return expected, shared, whole, found[shared.prefixes is not None :]  # the first call was the prefixes'


def check_same(expected, shared, whole, found):
    assert torch.equal(shared.tokens, expected.tokens)
    assert (shared.kept, shared.rows, shared.notes) == (expected.kept, expected.rows, expected.notes)
    assert list(shared.kept_per_frame) == list(expected.kept_per_frame) and len(found) == len(whole)
    for ours, theirs in zip(found, whole, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    found = FAMILIES[request.param]()
    found.model = found.make_model()
    return found


def test_shared_prefixes_are_the_whole_prompts(family):
    """Different images, text alone and ragged questions in one batch, dense and pruned."""
    inputs, names = mixed(family)
    for name, keep in (("identity", "100%"), ("divprune", family.keep)):
        pruned = family.plug(family.model, name, keep)
        expected, shared, whole, found = both(family, family.model, pruned, inputs, names)
        assert shared.prefixes == 3 and expected.prefixes is None
        check_same(expected, shared, whole, found)
        # An oracle without padding or neighbours: each prompt alone.
        for number in (0, 2, 5):
            (one, other), _ = with_and_without(family, 2)
            row = family.rows()[one if number < 3 else other]
            alone = pruned.generate(**asked(family, [row], [QUESTIONS[number]]), **family.settings()).tokens
            assert torch.equal(alone[0], shared.tokens[number])
            family.forget(family.model)


def test_one_question_an_image_is_generated_as_ever(family):
    (one, other), _ = with_and_without(family, 2)
    inputs = asked(family, [family.rows()[one], family.rows()[other]], QUESTIONS[:2])
    pruned = family.plug(family.model, "divprune")
    expected, shared, whole, found = both(family, family.model, pruned, inputs, ["one", "other"])
    assert shared.prefixes is None and shared.why_whole is None
    check_same(expected, shared, whole, found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, whole, strict=True))


def family_of(name):
    found = FAMILIES[name]()
    found.model = found.make_model()
    return found


def one_image(family, names=("a",) * 6):
    """Six questions about one image, by default called the same."""
    (one,), _ = with_and_without(family)
    return asked(family, [family.rows()[one]] * 6, QUESTIONS), list(names)


@pytest.mark.parametrize("policy", ["compact", "original"])
def test_positions_of_either_policy_are_kept(policy):
    family = family_of("llava")
    inputs, names = one_image(family)
    pruned = family.plug(family.model, "divprune", position_policy=policy)
    expected, shared, whole, found = both(family, family.model, pruned, inputs, names)
    assert shared.prefixes == 1
    check_same(expected, shared, whole, found)


class ByLength:
    """Keeps first tokens by the length of the question, as a method does that reads it."""

    needs = frozenset()

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, tokens, keep):
        return Selection([torch.arange(length) for length in self.lengths])


def test_rows_that_keep_other_tokens_do_not_share():
    family = family_of("llava")
    inputs, names = one_image(family)
    pruned = family.under(family.model, ByLength([3, 4, 3, 4, 4, 0]))
    expected, shared, whole, found = both(family, family.model, pruned, inputs, names)
    assert shared.prefixes == 3 and shared.kept["image"] == [3, 4, 3, 4, 4, 0]
    check_same(expected, shared, whole, found)


def test_a_method_that_reads_the_question_and_merges_shares_equal_tokens_alone(monkeypatch):
    """The same slots with other features in them are another prefix."""
    family = family_of("llava")
    inputs, names = one_image(family)
    pruned = family.plug(family.model, "divprune")
    pruned.merges = pruned.reads_text = True
    pruned.pruner = type(pruned.pruner)()  # as divprune chooses, so that slots agree
    real = type(pruned).prepare

    def merged_by_question(self, *args, **kwargs):
        prepared = real(self, *args, **kwargs)
        features = prepared.inputs["mm_encoder_outputs"]["image"].pooler_output
        features[3:] = [own * 1.5 for own in features[3:]]
        return prepared

    monkeypatch.setattr(PrunedModel, "prepare", merged_by_question)
    expected, shared, whole, found = both(family, family.model, pruned, inputs, names)
    assert shared.prefixes == 2
    check_same(expected, shared, whole, found)


def test_other_names_and_other_words_before_the_image_do_not_share():
    family = family_of("llava")
    inputs, _ = one_image(family)
    pruned = family.plug(family.model, "divprune")
    settings = family.settings()
    assert pruned.generate_shared(**inputs, images=list("abcdef"), **settings).prefixes is None
    assert pruned.generate_shared(**inputs, images=list("aabbcc"), **settings).prefixes == 3
    first = inputs["attention_mask"].long().argmax(1)
    ids = inputs["input_ids"].clone()
    ids[torch.arange(3), first[:3]] = 8
    expected, shared, whole, found = both(family, family.model, pruned, {**inputs, "input_ids": ids}, ["a"] * 6)
    assert shared.prefixes == 2
    check_same(expected, shared, whole, found)


def test_logits_processors_see_the_prompts_they_saw():
    """A penalty for tokens of the prompt, which are in the cache and not in what the model is given."""
    family = family_of("llava")
    inputs, names = one_image(family)
    pruned = family.plug(family.model, "divprune")
    settings = {**family.settings(), "repetition_penalty": 3.0}
    expected = pruned.generate(**inputs, **settings).tokens
    assert not torch.equal(expected, pruned.generate(**inputs, **family.settings()).tokens)
    assert torch.equal(pruned.generate_shared(**inputs, images=names, **settings).tokens, expected)


def test_a_window_shorter_than_the_prompts_computes_them_whole():
    family = family_of("gemma3")
    inputs, names = one_image(family)
    for window, whole in ((24, True), (256, False)):
        pruned = family.plug(test_gemma3.tiny_gemma3(window=window), "identity", "100%")
        expected = pruned.generate(**inputs, **family.settings())
        shared = pruned.generate_shared(**inputs, images=names, **family.settings())
        assert torch.equal(shared.tokens, expected.tokens) and (shared.prefixes is None) == whole
        assert (shared.why_whole == "a sliding window is shorter than prompts and answers") == whole


def test_prompts_padded_on_the_right_are_computed_whole():
    family = family_of("llava")
    inputs, names = one_image(family)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1))
    shared = family.plug(family.model, "identity", "100%").generate_shared(**inputs, images=names, max_new_tokens=1)
    assert shared.prefixes is None and shared.why_whole == "prompts are padded on the right"


def test_what_cannot_share_is_refused_in_one_line(monkeypatch):
    family = test_paligemma.TestIdentity()
    pruned = family.plug(family.make_model(), "divprune")
    with pytest.raises(PruningError, match="'paligemma' can't share a prefix.*see the question.*share_prefix: false"):
        pruned.check_shares_prefixes()
    family = family_of("llava")
    inputs, names = one_image(family)
    pruned = family.plug(family.model, "divprune")
    with monkeypatch.context() as patched:
        patched.setattr(type(pruned.family), "unproven", True)  # as the family is of models that have none
        with pytest.raises(PruningError, match="has no family of its own.*share_prefix: false"):
            pruned.check_shares_prefixes()
    for option, value, words in (
        ("num_beams", 3, "num_beams: 3 repeats rows"),
        ("num_return_sequences", 2, "num_return_sequences: 2 repeats rows"),
        ("use_cache", False, "use_cache: False leaves no cache"),
        ("cache_implementation", "quantized", "cache_implementation is 'quantized'"),
        ("past_key_values", object(), "past_key_values hold another prefix"),
    ):
        with pytest.raises(PruningError, match=words) as error:
            pruned.generate_shared(**inputs, images=names, max_new_tokens=1, **{option: value})
        assert "\n" not in str(error.value)
    with pytest.raises(PruningError, match="there are 6 rows and the names of 2 images"):
        pruned.generate_shared(**inputs, images=names[:2], max_new_tokens=1)


# ---- which rows share how much ---------------------------------------------------------------------------------


def prompts(*texts, visual="i"):
    """Prompts of letters; visual tokens are an i, and a row's key is its image, the digit before the colon."""
    found = []
    for text in texts:
        key, words = text.split(":")
        found.append(Prompt([ord(letter) for letter in words], words.rfind(visual) + 1, key))
    return found


def test_rows_share_all_they_begin_with_and_keep_one_token_at_least():
    assert grouped(prompts("1:aiiiiibc", "1:aiiiiibd", "2:aiiiiibc", "2:aiiiiibc")) == [
        Group((0, 1), 7),
        Group((2, 3), 7),
    ]


def test_a_row_alone_leaves_no_more_than_others():
    """Its prefix holds its image, and as much of its text as keeps the rest short."""
    groups = grouped(prompts("1:aiiiiibc", "2:aiibcdef", "1:aiiiiibd"))
    assert groups == [Group((0, 2), 7), Group((1,), 7)]
    groups = grouped(prompts("1:aiiiiibc", "2:aiiiiiii" + "b", "1:aiiiiibd", "1:aiiiiibd"))
    assert groups == [Group((0, 2, 3), 7), Group((1,), 8)]


def test_text_alone_shares_long_beginnings():
    assert grouped(prompts("-:abcdefgh1", "-:abcdefgh2", "-:abcdefgh3")) == [Group((0, 1, 2), 8)]
    assert grouped(prompts("-:abcdefg1", "-:abcdefg2", "-:abcdefg3")) is None


def test_what_saves_nothing_is_not_shared():
    assert grouped(prompts("1:aiiiiibc", "2:aiiiiibc")) is None
    assert grouped(prompts("1:aib", "1:aic" + "d" * 30, "2:" + "a" * 30 + "ib")) is None
    assert grouped(prompts("1:aiiiiii", "1:aiiiiii")) is None  # nothing follows the image
    assert grouped(prompts("1:a")) is None


# ---- evaluation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return Arm.load(ModelConfig(path=shipped("assets/tiny_vlm"), dtype="float32"), device="cpu")


def evaluated(tiny, tmp_path, share, spec, limit=44, **fields):
    config = EvaluateConfig(
        model=tiny.base.config,
        pruning=spec,
        tasks=["tiny_world"],
        limit=limit,
        batch_size=20,  # cuts the eight questions of an image apart
        max_new_tokens=6,
        share_prefix=share,
        output=str(tmp_path / f"{share}_{spec.keep}_{len(fields)}"),
        **fields,
    )
    return evaluate(config, tiny.with_pruning(spec), bar=False)


@pytest.mark.parametrize("spec", [PruningSpec(), PruningSpec("divprune", 16)], ids=["dense", "16 tokens"])
def test_results_are_the_same_bytes_with_and_without(tiny, tmp_path, spec):
    """From pixels and from a feature cache; and the manifest says which it was."""
    data = feature_data(["tiny_world"], None, 44, 50_000_000, None)
    with OutputFolder(tmp_path / "features", FEATURES) as output:
        make_features(output, tiny, [spec], data, Ranks())
    for fields in ({}, {"features": str(tmp_path / "features")}):
        plain, shared = (evaluated(tiny, tmp_path, share, spec, **fields) for share in (False, True))
        assert (plain / "results.jsonl").read_bytes() == (shared / "results.jsonl").read_bytes()
        manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (plain, shared)]
        assert "share_prefix" not in manifests[0] and manifests[1]["share_prefix"] is True
        assert "share_prefix" not in (plain / "config.yaml").read_text()
        assert "share_prefix: true" in (shared / "config.yaml").read_text()


def test_a_method_that_reads_the_question_says_it_once(tiny, tmp_path, capsys):
    spec = PruningSpec("trimtokenator", 16)
    tiny.base.told.clear()
    plain, shared = (evaluated(tiny, tmp_path, share, spec, limit=16) for share in (False, True))
    assert (plain / "results.jsonl").read_bytes() == (shared / "results.jsonl").read_bytes()
    evaluated(tiny, tmp_path, True, spec.model_copy(update={"keep": 8}), limit=8)
    assert capsys.readouterr().out.count("trimtokenator reads the question, so that questions of one image share") == 1


def test_a_table_hands_it_to_its_evaluations():
    settings = {"models": [{"model": {"path": "assets/tiny_vlm"}}], "methods": ["divprune"], "budgets": [16],
                "tasks": ["tiny_world"], "output": "runs/table"}  # fmt: skip
    assert "share_prefix" not in TableConfig(**settings).model_dump()
    assert TableConfig(**settings, share_prefix=True).model_dump()["share_prefix"] is True
    assert lay_out(TableConfig(**settings, share_prefix=True)).cells[0].config.share_prefix
