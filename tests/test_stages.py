"""Stages inside the LLM: what is kept runs as the stock model runs with the rest hidden, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from stage_world import COUNT, LAYERS, ROWS, WORLDS, left_at_the_end, llava_batch, masked_run, plan_for, staged

from prunetune.pruning import PrunedModel, PruningError, PruningSpec

SETTINGS = WORLDS["llava"].settings
FASTV = {"name": "fastv", "boundaries": [2], "keep": 5}
LATER = {"name": "fastv", "boundaries": [4], "keep": 2}
ORIGINAL = {
    "fastv": [FASTV],
    "fastv_vtw": [{"name": "fastv", "boundaries": [2], "keep": 0.3}, {"name": "vtw", "boundaries": [5]}],
    "dart": [{"name": "dart", "boundaries": [2], "keep": 8}, LATER],
    "pyramiddrop": [{"name": "pyramiddrop", "boundaries": [2, 3, 5], "options": {"positions": "original"}}],
    "sparsevlm_2": [{"name": "sparsevlm", "boundaries": [2, 4], "keep": [7, 3], "options": {"version": 2}}],
}
DENSE = {
    "vtw": [{"name": "vtw", "boundaries": [3], "options": {"positions": "dense"}}],
    "pyramiddrop_dense": [FASTV, {"name": "pyramiddrop", "boundaries": [3, 5], "keep": [4, 2]}],
    "sparsevlm_unmerged": [{"name": "sparsevlm", "boundaries": [3, 4], "keep": [7, 3], "options": {"recycle": False}}],
}
MERGED = {"sparsevlm": [{"name": "sparsevlm", "boundaries": [2, 4], "keep": [7, 3]}]}
CASES = [("llava", "sdpa", name) for name in (ORIGINAL | DENSE)]
CASES += [("llava", "eager", name) for name in ("fastv", "pyramiddrop_dense")]
for kind in ("llava_next", "internvl"):
    CASES += [(kind, "sdpa", name) for name in ("fastv_vtw", "dart", "pyramiddrop_dense")]
for kind in ("qwen2_5_vl", "qwen3_vl", "gemma3"):
    CASES += [(kind, "sdpa", name) for name in ("fastv_vtw", "dart", "pyramiddrop", "sparsevlm_2")]
EVERY = [(kind, "sdpa", name) for kind, world in WORLDS.items() for name in (MERGED if world.plain else ())]
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)
every_model = pytest.mark.parametrize("case", [(kind, "sdpa", "fastv") for kind in WORLDS], ids="-".join)
_MODELS = {}


def of(case):
    """The world of a case, its model and stages, and the layer from which tokens are numbered anew."""
    kind, attention, name = case
    world = WORLDS[kind]
    if (kind, attention) not in _MODELS:
        _MODELS[kind, attention] = world.build(attention)
    return world, _MODELS[kind, attention], (ORIGINAL | DENSE | MERGED)[name], 3 if name in DENSE else LAYERS


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return of(("llava", request.param, "fastv"))[1]


def forget(model):
    """Clear the rotary offsets that Qwen models remember of their last batch."""
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None


def answers(model, inputs, **settings):
    """What the stock model generates."""
    forget(model)
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
@every_model
@pytest.mark.parametrize("keep", ["100%", 500])
def test_keep_all_is_bit_identical_to_stock(case, keep):
    world, model, _, _ = of(case)
    pruned = staged(model, {**FASTV, "keep": keep}, {"name": "dart", "boundaries": [3], "keep": keep})
    batch = world.batch(world.rows, labels=True)
    forget(model)
    theirs, ours = model(**batch), pruned.forward(**batch)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    prompts = world.batch(world.rows, "left")
    tokens = pruned.generate(**prompts, **world.settings).tokens
    assert torch.equal(tokens, answers(model, prompts, **world.settings))


@torch.no_grad()
@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_pruned_equals_the_full_run_with_dropped_tokens_hidden(case, side):
    world, model, stages, dense_from = of(case)
    batch = world.batch(world.rows, side, labels=True)
    plan, ours = plan_for(staged(model, *stages), batch)
    there = left_at_the_end(plan)
    assert there.sum() < batch["attention_mask"].sum()
    forget(model)
    full = masked_run(model, batch, plan, dense_from)
    torch.testing.assert_close(ours.logits[there], full.logits[there], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, full.loss, rtol=1e-5, atol=1e-6)
    forget(model)
    assert (model(**batch).logits - full.logits)[there].abs().max() > 1e-3  # the stages do something


@torch.no_grad()
@every_case
def test_generate_equals_every_step_recomputed(case):
    world, model, stages, dense_from = of(case)
    pruned = staged(model, *stages)
    prompts = world.batch(world.rows, "left")
    tokens = pruned.generate(**prompts, **world.settings).tokens
    plan, _ = plan_for(pruned, prompts)
    for step in range(4):
        grown = {**prompts, "input_ids": torch.cat([prompts["input_ids"], tokens[:, :step]], dim=1)}
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in prompts:
                more = prompts[name].new_full((len(tokens), step), fill)
                grown[name] = torch.cat([prompts[name], more], dim=1)
        forget(model)
        logits = masked_run(model, grown, plan, dense_from).logits[:, -1]
        logits[:, world.settings["suppress_tokens"]] = float("-inf")
        assert torch.equal(logits.argmax(dim=1), tokens[:, step])


@torch.no_grad()
@pytest.mark.parametrize("case", [*CASES, *EVERY], ids="-".join)
def test_a_batch_equals_each_row_alone(case):
    world, model, stages, _ = of(case)
    pruned = staged(model, *stages)
    prompts = world.batch(world.rows, "left")
    for settings in (world.settings, {**world.settings, "num_beams": 3}):
        together = pruned.generate(**prompts, **settings)
        for number, row in enumerate(world.rows):
            alone = pruned.generate(**world.batch([row], "left"), **settings)
            assert torch.equal(alone.tokens[0], together.tokens[number])
            assert alone.layers[0] == together.layers[number]
    batch = world.batch(world.rows, labels=True)
    plan, output = plan_for(pruned, batch)
    for number, row in enumerate(world.rows):
        own, alone = plan_for(pruned, world.batch([row], labels=True))
        there, theirs = left_at_the_end(own)[0], left_at_the_end(plan)[number]
        assert torch.equal(there.nonzero(), theirs.nonzero())
        # A merged token stands in no column of its own.
        there, theirs = there & ~own.visual[0], theirs & ~plan.visual[number]
        torch.testing.assert_close(output.logits[number, theirs], alone.logits[0, there], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_caches_have_the_lengths_that_were_planned(model):
    pruned = staged(model, FASTV, LATER)
    prompts = llava_batch(ROWS[:1])
    text = int(prompts["attention_mask"].sum()) - COUNT
    with pruned.attach():
        cache = model(**prompts, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [text + n for n in (16, 16, 5, 5, 2, 2)]
        # A second turn of text on the same cache: its tokens stand behind those of the first.
        more = {"input_ids": torch.tensor([[8, 9, 10]])}
        turn = model(**more, past_key_values=cache).logits
    plan, _ = plan_for(pruned, prompts)
    grown = {**prompts, "input_ids": torch.cat([prompts["input_ids"], more["input_ids"]], dim=1)}
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    torch.testing.assert_close(turn, masked_run(model, grown, plan).logits[:, -3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_counts_of_rows_and_images_are_reported(model):
    pruned = staged(model, FASTV, LATER)
    found = pruned.generate(**llava_batch(ROWS, "left"), **SETTINGS)
    assert found.layers == [(16, 16, 5, 5, 2, 2), (32, 32, 5, 5, 2, 2), (0,) * LAYERS]
    one, *two = found.notes["image"]
    assert one == {"llm_final_tokens": 2, "llm_average_tokens": pytest.approx(46 / 6)}
    assert sum(image["llm_final_tokens"] for image in two) == 2
    assert sum(image["llm_average_tokens"] for image in two) == pytest.approx(78 / 6)
    assert found.kept == {"image": [16, 16, 16]}  # what entered the LLM


def train(world, model, pruned, checkpointing):
    """The loss of a batch and the projector's gradient."""
    model.requires_grad_(False)
    projector = [model.base_model.get_submodule(path).requires_grad_(True) for path in pruned.family.projectors]
    parameters = [parameter for part in projector for parameter in part.parameters()]
    llm = model.base_model.language_model
    if checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        with pruned.attach():
            loss = model(**world.batch(world.rows, labels=True)).loss
            other = model(**world.batch(world.rows[:1], labels=True)).loss  # two forwards before a backward
        (loss + 0 * other).backward()
        return loss.detach(), [p.grad.clone() for p in parameters], parameters
    finally:
        model.eval().requires_grad_(True)
        model.zero_grad()
        llm.gradient_checkpointing_disable()


@pytest.mark.parametrize("case", [*[(kind, "sdpa", "dart") for kind in WORLDS], *EVERY], ids="-".join)
def test_training_equals_the_hidden_run_with_and_without_checkpointing(case):
    world, model, stages, _ = of(case)
    pruned = staged(model, *stages)
    loss, gradients, parameters = train(world, model, pruned, False)
    again, same, _ = train(world, model, pruned, True)
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    if case[2] in MERGED:
        return
    batch = world.batch(world.rows, labels=True)
    plan, _ = plan_for(pruned, batch)
    forget(model)
    full = masked_run(model, batch, plan).loss
    torch.testing.assert_close(loss, full.detach(), rtol=1e-5, atol=1e-6)
    for own, other in zip(gradients, torch.autograd.grad(full, parameters), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_answers_do_not_choose(model):
    """The same tokens are kept with an answer behind the prompt, with another one, and without."""
    pruned = staged(model, FASTV)
    batch = llava_batch(ROWS[:2], labels=True)
    kept = plan_for(pruned, batch)[0].kept_columns()
    other = {**batch, "input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 11)}
    assert torch.equal(plan_for(pruned, other)[0].kept_columns(), kept)
    for number, row in enumerate(ROWS[:2]):
        alone = llava_batch([row])
        prompt = {**alone, **{name: alone[name][:, :-3] for name in ("input_ids", "attention_mask")}}
        columns = plan_for(pruned, prompt)[0].kept_columns()[0].nonzero()
        assert torch.equal(columns, kept[number].nonzero())


@torch.no_grad()
@pytest.mark.parametrize("name", ["divprune", "fastervlm"])
def test_stages_go_on_from_what_a_pruner_left(model, name):
    """The pruner's tokens enter, shares are of these, and the order of attaching is the pruner's first."""
    both = staged(model, {**FASTV, "keep": 0.5}, pruner=name, keep=8)
    only = PrunedModel(model, PruningSpec(name, 8))
    prompts = llava_batch(ROWS, "left")
    found = both.generate(**prompts, **SETTINGS)
    assert found.layers == [(8, 8, 4, 4, 4, 4), (16, 16, 8, 8, 8, 8), (0,) * LAYERS]
    assert found.kept == {"image": [8, 8, 8]}
    everything = staged(model, {**FASTV, "keep": 1.0}, pruner=name, keep=8)
    for own, other in ((everything, only), (both, both)):
        tokens = own.generate(**prompts, **SETTINGS).tokens
        for number, row in enumerate(ROWS):
            alone = other.generate(**llava_batch([row], "left"), **SETTINGS).tokens[0]
            assert torch.equal(tokens[number], alone)
    batch = llava_batch(ROWS, labels=True)
    with both.attach():
        assert torch.equal(model(**batch).loss, both.forward(**batch).loss)
        dense = PrunedModel(model, PruningSpec())
        during = dense.forward(**batch).loss  # the stages of the other do not touch it
    assert torch.equal(during, model(**batch).loss)


def test_order_of_attaching(model):
    outer = staged(model, FASTV)
    later = PrunedModel(model, PruningSpec("divprune", 4)).attach()
    with outer.attach(), pytest.raises(PruningError, match="give one PrunedModel both"), later:
        pass
    assert not model._forward_pre_hooks and not model.model.language_model._forward_hooks
    assert all(not layer._forward_pre_hooks for layer in model.model.language_model.layers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_implementation": "static"}, "cache_implementation: 'static'"),
        ({"use_cache": False}, "use_cache: False"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_model": "any"}, "assistant_model"),
    ],
)
def test_generation_that_hooks_can_not_follow_is_refused(model, options, words):
    pruned = staged(model, FASTV)
    prompts = llava_batch(ROWS[:1], "left")
    with pytest.raises(PruningError, match=words) as caught:
        pruned.generate(**prompts, **SETTINGS, **options)
    assert "\n" not in str(caught.value)
    if options.get("assistant_model") is None:
        from transformers import GenerationConfig

        with pytest.raises(PruningError, match=words):
            pruned.generate(**prompts, generation_config=GenerationConfig(**SETTINGS, **options))


@torch.no_grad()
def test_calls_that_would_be_cut_wrongly_are_refused(model):
    from transformers import DynamicCache, StaticCache

    pruned = staged(model, FASTV)
    prompts = pruned.prepare(llava_batch(ROWS[:1])).inputs
    text = {"input_ids": torch.tensor([[8, 9]])}
    stock = model(**text, use_cache=True).past_key_values
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    length = prompts["input_ids"].shape[1]
    four = torch.ones(length, length).tril().bool()[None, None]
    with pruned.attach():
        with pytest.raises(PruningError, match="made without stages"):
            model(**text, past_key_values=stock)
        with pytest.raises(PruningError, match="another length for each layer"):
            model(**prompts, past_key_values=static)
    with pruned._inside():
        with pytest.raises(PruningError, match="2-D attention_mask"):
            model(**{**prompts, "attention_mask": four})
        with pytest.raises(PruningError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
        cache = DynamicCache(config=model.config.get_text_config())
        model(**text, past_key_values=cache)
        with pytest.raises(PruningError, match="prefill in one piece"):
            model(**{**prompts, "attention_mask": torch.ones(1, length + 2)}, past_key_values=cache)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"boundaries": [0]}, "boundary 0: the cache's length.*between 1 and 5"),
        ({"boundaries": [6]}, "boundary 6: the model has 6 layers"),
        ({"boundaries": [4, 2], "keep": [4, 2]}, "ascending"),
        ({"boundaries": [2, 4], "keep": [4]}, "2 boundaries and 1 budgets"),
        ({"keep": 1.5}, "is no budget"),
        ({"average": 8}, "both keep and average"),
        ({"name": "fastvv"}, "unknown stage 'fastvv', did you mean 'fastv'"),
        ({"options": {"k": 2}}, "no option 'k'"),
    ],
)
def test_wrong_schedules_are_refused_in_one_line(stage, words):
    model = of(("llava", "sdpa", "fastv"))[1]
    with pytest.raises(PruningError, match=words) as caught:
        staged(model, {**FASTV, **stage})
    assert "\n" not in str(caught.value)


def test_prefixes_are_not_shared(model):
    with pytest.raises(PruningError, match="share_prefix: false"):
        staged(model, FASTV).check_shares_prefixes()


def test_records_without_stages_stay_as_they_were():
    assert "stages" not in PruningSpec("divprune", 16).model_dump()
    spec = PruningSpec("divprune", 16, stages=[FASTV])
    assert PruningSpec.model_validate_json(spec.model_dump_json()) == spec
