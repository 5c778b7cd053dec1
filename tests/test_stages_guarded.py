"""Stages where something is unusual: attention set anew, a second thread, a cache, a prompt that ends in its image."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from pydantic import ValidationError
from stage_world import (
    COUNT,
    IMAGE,
    LAYERS,
    ROWS,
    WORLDS,
    listening,
    llava_batch,
    masked_run,
    plan_for,
    staged,
    tiny_llava,
)

from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stages.registry import build_stage
from prunetune.pruning.stages.schedule import schedule_of

SETTINGS = WORLDS["llava"].settings
FASTV = {"name": "fastv", "boundaries": [2], "keep": 5}
PYRAMID = {"name": "pyramiddrop", "boundaries": [2, 3, 5], "keep": [8, 4, 2], "options": {"positions": "original"}}
DENSE = {**PYRAMID, "options": {}}


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@torch.no_grad()
@pytest.mark.parametrize("stage", [FASTV, DENSE], ids=["fastv", "pyramiddrop"])
def test_attention_may_be_set_anew(stage):
    """Masks are as the model's attention takes them now, whichever it was when it was wrapped."""
    model, prompts, labelled = tiny_llava(), llava_batch(ROWS, "left"), llava_batch(ROWS, labels=True)
    before = staged(model, stage)
    expected, tokens = before.forward(**labelled), before.generate(**prompts, **SETTINGS).tokens
    model.set_attn_implementation("eager")
    for pruned in (before, staged(model, stage)):
        assert torch.equal(pruned.generate(**prompts, **SETTINGS).tokens, tokens)
        torch.testing.assert_close(pruned.forward(**labelled).loss, expected.loss, rtol=1e-5, atol=1e-6)
    eager = staged(model, stage)
    model.set_attn_implementation("sdpa")
    assert torch.equal(eager.generate(**prompts, **SETTINGS).tokens, tokens)


def turn(prompts, tokens, words=(9, 33, 41)):
    """A conversation's ids after an answer and more words, without its image."""
    ids = torch.cat([prompts["input_ids"], tokens, torch.tensor([words])], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
@pytest.mark.parametrize("stages", [[], [FASTV]], ids=["before", "before-and-inside"])
def test_a_cache_that_holds_fewer_tokens_than_the_ids_is_refused(model, stages):
    from transformers import DynamicCache

    prompts = llava_batch(ROWS[:1], "left")
    pruned = staged(model, *stages, pruner="divprune", keep=8)
    cache = DynamicCache(config=model.config.get_text_config())
    tokens = pruned.generate(**prompts, **SETTINGS, past_key_values=cache).tokens
    assert torch.equal(tokens, pruned.generate(**prompts, **SETTINGS).tokens)  # an empty cache is as good as none
    more = turn(prompts, tokens)
    with pytest.raises(PruningError, match="what divprune left of the images.*without past_key_values") as caught:
        pruned.generate(**more, **SETTINGS, past_key_values=cache)
    assert "\n" not in str(caught.value)
    with pytest.raises(PruningError, match="images in a later turn"):
        pruned.generate(**more, **SETTINGS, past_key_values=cache, pixel_values=prompts["pixel_values"])
    with pytest.raises(PruningError, match="there are no pixels"):
        pruned.generate(**more, **SETTINGS)


@torch.no_grad()
def test_stages_alone_go_on_from_a_cache(model):
    """By ids, whose image the cache holds, in ``generate``; by the new ones alone in ``forward``."""
    from transformers import DynamicCache

    prompts = llava_batch(ROWS[:1], "left")
    pruned, plan = staged(model, FASTV), plan_for(staged(model, FASTV), prompts)[0]
    cache = DynamicCache(config=model.config.get_text_config())
    tokens = pruned.generate(**prompts, **SETTINGS, past_key_values=cache).tokens
    more = turn(prompts, tokens)
    full = masked_run(model, {**more, "pixel_values": prompts["pixel_values"]}, plan).logits[:, -1]
    new = {**more, "input_ids": more["input_ids"][:, cache.get_seq_length() :]}
    assert new["input_ids"].shape[1] == 4  # the last answer was never fed
    torch.testing.assert_close(pruned.forward(**new, past_key_values=cache).logits[:, -1], full, rtol=1e-4, atol=1e-5)
    again = DynamicCache(config=model.config.get_text_config())
    pruned.generate(**prompts, **SETTINGS, past_key_values=again)
    full[:, SETTINGS["suppress_tokens"]] = float("-inf")
    answer = pruned.generate(**more, **{**SETTINGS, "max_new_tokens": 1, "min_new_tokens": 1}, past_key_values=again)
    assert answer.tokens[:, 0].tolist() == full.argmax(dim=1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("more", [1, -1, -5])
def test_a_stage_that_miscounts_is_named(model, more):
    """Text would be cut off in the place of too many tokens, or dropped ones be shown in that of missing ones."""
    stage = {"name": "stage_world:Miscounts", "boundaries": [2], "keep": 5, "options": {"more": more}}
    pruned = staged(model, stage)
    words = f"stage 'stage_world:Miscounts' at boundary 2 left {5 + more} visual tokens in row 1, and 5 were asked for"
    for call in (pruned.forward, pruned.generate):
        with pytest.raises(PruningError, match=words) as caught:
            call(**llava_batch(ROWS[:2], "left"), **({} if call == pruned.forward else SETTINGS))
        assert "\n" not in str(caught.value)
    staged(model, {**stage, "options": {"more": 0}}).forward(**llava_batch(ROWS[:2]))
    with pytest.raises(PruningError, match=r"answered torch.bool \(1, 4\); .*returns a Choice of bool \(1, "):
        staged(model, {"name": "stage_world:Misshapen", "boundaries": [2], "keep": 5}).forward(**llava_batch(ROWS[:1]))


def test_threads_take_turns(model):
    """A dense call neither runs with the stages of another thread's nor ends them; both have their own answers."""
    prompts = llava_batch(ROWS, "left")
    inside, dense = staged(model, FASTV, DENSE | {"boundaries": [3, 4, 5]}), PrunedModel(model, PruningSpec())
    settings = {**SETTINGS, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = [pruned.generate(**prompts, **settings).tokens for pruned in (inside, dense)]
    found = []
    other = threading.Thread(target=lambda: found.append(dense.generate(**prompts, **settings).tokens))

    def meanwhile(_):
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive()  # it waits
        assert torch.equal(dense.generate(**prompts, **settings).tokens, expected[1])  # and this thread need not

    assert torch.equal(inside.generate(**prompts, **settings, seen=meanwhile).tokens, expected[0])
    other.join(timeout=60)
    assert torch.equal(found[0], expected[1])
    answers = {0: [], 1: []}

    def ask(number):
        for _ in range(3):
            answers[number].append((inside, dense)[number].generate(**prompts, **settings).tokens)

    threads = [threading.Thread(target=ask, args=(number,)) for number in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for number, own in answers.items():
        assert len(own) == 3 and all(torch.equal(tokens, expected[number]) for tokens in own)


@torch.no_grad()
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "prompt"])
def test_a_prompt_that_ends_with_its_image_asks_with_the_last_token_that_is_left(labelled):
    """Against the attention of the stock model over what is left; with a caption behind it, and without."""
    model = tiny_llava("eager")
    ids = torch.tensor([[1] + [IMAGE] * COUNT + ([11, 12, 13] if labelled else [])])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": llava_batch(ROWS[:1])["pixel_values"],
    }
    if labelled:
        inputs["labels"] = torch.where(ids > 9, ids, -100)
    plan, _ = plan_for(staged(model, PYRAMID), inputs)
    entering = list(range(1, 1 + COUNT))
    for boundary, keep in ((2, 8), (3, 4), (5, 2)):
        attention = masked_run(model, inputs, plan, until=boundary - 1, output_attentions=True).attentions[boundary]
        score = attention[0, :, max(entering)].mean(dim=0)
        assert score[entering].min() > 0
        left = sorted(sorted(entering, key=lambda column: -float(score[column]))[:keep])
        assert plan.kept_columns(boundary)[0].nonzero()[:, 0].tolist() == left
        entering = left
    assert COUNT not in entering  # the token that asked first


@pytest.mark.parametrize("average", [math.nan, math.inf, 0, -3])
def test_averages_are_numbers(average):
    with pytest.raises((ValidationError, PruningError), match="finite number|is above 0"):
        schedule_of([StageSpec(name="fastv", average=average)], 32)
    with pytest.raises(PruningError, match="is above 0"):
        schedule_of(
            [StageSpec.model_construct(name="fastv", boundaries=None, keep=None, average=average, options={})], 32
        )


def test_no_share_withdraws_an_image():
    """Only ``keep: 0`` does; what is named as the least is enough."""
    for name in ("fastv", "pyramiddrop"):
        stage = build_stage(name)
        for entering in (7, 36, 576):
            with pytest.raises(PruningError, match=rf"keep=0.0001 of {entering} visual tokens rounds to 0") as caught:
                stage.count(0.0001, entering)
            least = str(caught.value).split("smallest budget is ")[1].split(",")[0]
            assert stage.count(float(least), entering) == 1
        assert stage.count(0.0001, 0) == stage.count(0, 36) == 0  # a row of text alone; as it was written
    with pytest.raises(PruningError, match="of 36 visual tokens rounds to 0"):
        schedule_of([StageSpec(name="fastv", keep=0.01)], 32).counts(36)
    assert schedule_of([StageSpec(name="fastv", keep=0.01)], 32).counts(0).final == 0


@pytest.mark.parametrize("boundaries", [[2], [2, 6, 15]])
@pytest.mark.parametrize("entering", [2, 36, 576])
def test_the_least_average_leaves_a_token(boundaries, entering):
    def counts(average):
        return schedule_of([StageSpec(name="fastv", boundaries=boundaries, average=average)], 32).counts(entering)

    below = boundaries[0] * entering / 32
    with pytest.raises(PruningError, match="one token left at the end the least is") as caught:
        counts(below)
    least = float(str(caught.value).split("the least is ")[1].split(";")[0])
    assert counts(least).final == 1 and min(counts(least).keep) >= 1
    with pytest.raises(PruningError, match="the least is"):
        counts(least - 0.02)


def test_labels_of_everything_leave_no_prompt(model):
    batch = llava_batch(ROWS, "left")
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    pruned = staged(model, FASTV)
    with pytest.raises(PruningError, match="labels supervise row 0 from its first token on.*-100") as caught:
        pruned.forward(**batch)
    assert "\n" not in str(caught.value)
    text = {name: value[2:] for name, value in batch.items() if name != "pixel_values"}
    assert torch.isfinite(pruned.forward(**text).loss)  # text alone has nothing to choose from


def test_merging_is_refused_where_images_see_themselves():
    folding = {"name": "stage_world:Folding", "boundaries": [2], "keep": 4}
    with pytest.raises(PruningError, match="merges tokens, and in family 'gemma3' images see themselves both ways"):
        staged(WORLDS["gemma3"].build("sdpa"), folding)
    pruned, prompts = staged(tiny_llava(), folding), llava_batch(ROWS, "left")
    assert pruned.generate(**prompts, **SETTINGS).layers == [(16, 16, 5, 5, 5, 5), (32, 32, 5, 5, 5, 5), (0,) * LAYERS]


@torch.no_grad()
@pytest.mark.parametrize("stage", [FASTV, DENSE], ids=["fastv", "pyramiddrop"])
def test_a_step_copies_nothing_and_layers_share_masks_and_rotations(model, stage, monkeypatch):
    """In each step behind the prefill; a copy to the device would wait for it."""
    import prunetune.pruning.stages.run as run

    masks, rotations = [], []
    made, rotary = run.as_mask, model.model.language_model.rotary_emb.forward
    monkeypatch.setattr(run, "as_mask", lambda *call: masks.append(1) or made(*call))
    monkeypatch.setattr(
        model.model.language_model.rotary_emb,
        "forward",
        lambda *call, **named: rotations.append(1) or rotary(*call, **named),
    )
    prompts = llava_batch(ROWS, "left")
    grown = torch.cat([prompts["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    with staged(model, stage).attach():
        cache = model(**prompts, use_cache=True).past_key_values
        masks.clear()
        rotations.clear()
        monkeypatch.setattr(run.torch, "tensor", None)
        model(input_ids=prompts["input_ids"][:, -1:], attention_mask=grown, past_key_values=cache)
    segments = len(stage["boundaries"])
    assert len(masks) == segments and len(rotations) == 1 + segments * (stage is DENSE)


@torch.no_grad()
def test_raters_are_found_once(model, monkeypatch):
    from prunetune.pruning.stages.methods.sparsevlm import SparseVLM

    found, raters = [], SparseVLM.raters
    monkeypatch.setattr(SparseVLM, "raters", lambda *call: found.append(raters(*call)) or found[-1])
    plan, _ = plan_for(
        staged(model, {"name": "sparsevlm", "boundaries": [2, 3, 5], "keep": [7, 5, 3]}), llava_batch(ROWS)
    )
    assert len(found) == 1 and list(plan.raters) == [2, 3, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale can't run with pruning.stages: the prompt without its condition"),
        ({"use_mtp": True}, "use_mtp can't run with pruning.stages: candidates"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states can't be asked"),
    ],
    ids=["guidance", "mtp", "states"],
)
def test_options_are_refused_by_their_names(model, options, words):
    pruned, prompts = staged(model, FASTV), llava_batch(ROWS[:1], "left")
    with pytest.raises(PruningError, match=words) as caught:
        pruned.generate(**prompts, **SETTINGS, **options)
    assert "\n" not in str(caught.value)
    tokens = pruned.generate(**prompts, **SETTINGS, guidance_scale=1.0, use_mtp=False).tokens
    assert torch.equal(tokens, pruned.generate(**prompts, **SETTINGS).tokens)


def test_states_of_layers_are_refused(model):
    """Asked in the call, or by the model's configuration."""
    pruned, batch = staged(model, FASTV), llava_batch(ROWS[:1])
    with pytest.raises(PruningError, match="output_hidden_states can't be asked"):
        pruned.forward(**batch, output_hidden_states=True)
    model.config.output_hidden_states = True
    try:
        with pruned.attach(), pytest.raises(PruningError, match="output_hidden_states can't be asked"):
            model(**batch)
    finally:
        model.config.output_hidden_states = False


def test_the_language_model_is_not_called_by_itself(model):
    inner = model.model.language_model
    with staged(model, FASTV).attach(), pytest.raises(PruningError, match="call the outer model, with input_ids"):
        inner(inputs_embeds=torch.zeros(1, 3, 32))
    assert torch.isfinite(inner(inputs_embeds=torch.zeros(1, 3, 32)).last_hidden_state).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_decides_once(model, reentrant):
    """What is computed again in the backward pass asks no stage again."""
    pruned, llm = staged(model, FASTV), model.model.language_model
    llm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    try:
        with listening(pruned) as heard, pruned.attach():
            model(**llava_batch(ROWS, labels=True)).loss.backward()
        assert len(heard) == 1
    finally:
        model.eval()
        model.zero_grad()
        llm.gradient_checkpointing_disable()
