"""Stages inside the LLM: what is kept runs as the stock model runs with the rest hidden, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from gemma_world import tiny_gemma3
from stage_world import (
    COUNT,
    LAYERS,
    ROWS,
    WORLDS,
    gemma_batch,
    left_at_the_end,
    llava_batch,
    masked_run,
    plan_for,
    staged,
    tiny_llava,
)

from prunetune.configs.schema import EngineConfig
from prunetune.pruning import ElasticModel, PrunedModel, PruningError, PruningSpec, StageSpec
from prunetune.train.engine.engine import Engine
from prunetune.train.engine.reading import Reads

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
def test_keep_all_is_bit_identical_to_stock(case):
    world, model, _, _ = of(case)
    pruned = staged(model, {**FASTV, "keep": "100%"}, {"name": "dart", "boundaries": [3], "keep": 500})
    batch = world.batch(world.rows, labels=True)
    forget(model)
    theirs, ours = model(**batch), pruned.forward(**batch)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    prompts = world.batch(world.rows, "left")
    tokens = pruned.generate(**prompts, **world.settings).tokens
    assert torch.equal(tokens, answers(model, prompts, **world.settings))


def check_counts(plan):
    """What is told of each layer is what its segment holds."""
    for number, point in enumerate(plan.schedule.points):
        visual = plan.visual_slots(plan.before(point.boundary)).sum(dim=1).tolist()
        assert visual == [counts.after[number] for counts in plan.counts]
        assert visual == [counts.layers[point.boundary] for counts in plan.counts]


@torch.no_grad()
@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_pruned_equals_the_full_run_with_dropped_tokens_hidden(case, side):
    world, model, stages, dense_from = of(case)
    batch = world.batch(world.rows, side, labels=True)
    plan, ours = plan_for(staged(model, *stages), batch)
    there = left_at_the_end(plan)
    assert there.sum() < batch["attention_mask"].sum()
    check_counts(plan)
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


EQUALLY_LONG = ((1, 24, 1), (2, 6, 2))
"""Rows of one length, of which the stock model has no mask, that are ragged behind a stage."""


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in [*CASES, *EVERY] if case[0] == "llava"], ids="-".join)
def test_rows_of_one_length_equal_each_alone(case):
    _, model, stages, _ = of(case)
    pruned, prompts = staged(model, *stages), llava_batch(EQUALLY_LONG, "left")
    assert prompts["attention_mask"].all()
    together = pruned.generate(**prompts, **SETTINGS).tokens
    plan, output = plan_for(pruned, prompts)
    check_counts(plan)
    assert any(segment is not None and segment.filler is not None for segment in plan.segments.values())
    for number, row in enumerate(EQUALLY_LONG):
        alone = llava_batch([row], "left")
        assert torch.equal(together[number], pruned.generate(**alone, **SETTINGS).tokens[0])
        logits = plan_for(pruned, alone)[1].logits[0, -1]
        torch.testing.assert_close(output.logits[number, -1], logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", [*CASES, *EVERY], ids="-".join)
def test_a_batch_equals_each_row_alone(case):
    world, model, stages, _ = of(case)
    pruned = staged(model, *stages)
    prompts = world.batch(world.rows, "left")
    beams = [{**world.settings, "num_beams": 3}] if case[2] in ("dart", *MERGED) else []
    for settings in (world.settings, *beams):
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
    several = pruned.generate(**llava_batch(ROWS, "left"), **SETTINGS, num_beams=2, num_return_sequences=2)
    assert several.layers == found.layers and several.notes == found.notes


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


def test_merged_tokens_are_means_behind_the_kept_ones_with_their_gradients(model):
    """One row written out: layers below the boundary, the sequence put together by hand, the layers above it."""
    stage = {"name": "sparsevlm", "boundaries": [3], "keep": [4]}
    pruned, batch = staged(model, stage), llava_batch([(2, 6, 2)], labels=True)
    projector = list(model.model.multi_modal_projector.parameters())
    with pruned._inside() as plans:
        ours = model(**pruned.prepare(batch).inputs).loss
    plan, llm = plans[0], model.model.language_model
    gradients = torch.autograd.grad(ours, projector)

    ids = batch["input_ids"][0]
    embeddings = model.get_input_embeddings()(ids)
    images = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    states = embeddings.masked_scatter(plan.visual[0, :, None], torch.cat(list(images)))[None]

    def run(states, layers):
        length = states.shape[1]
        mask = torch.ones(length, length).tril().bool()[None, None]
        if llm.config._attn_implementation == "eager":
            mask = torch.zeros(1, 1, length, length).masked_fill(~mask, float("-inf"))
        rotary = llm.rotary_emb(states, position_ids=torch.arange(length)[None])
        for layer in layers:
            states = layer(states, attention_mask=mask, position_embeddings=rotary)
        return states

    states = run(states, llm.layers[:3])[0]
    segment = plan.segments[3]
    kept = {
        int(c) for c, v, m in zip(segment.columns[0], segment.visual[0], segment.merged[0], strict=True) if v and not m
    }
    visual = plan.visual[0].nonzero()[:, 0].tolist()
    assert len(kept) == 4 and segment.mixing.shape[1] == 1 + int((int(28 * 0.3) + 1) / 10)
    clusters = [row.nonzero()[:, 0].tolist() for row in segment.mixing[0]]
    assert not any(kept & set(own) for own in clusters)
    merged = [states[own].sum(dim=0) / (len(own) + 1e-6) for own in clusters]
    sequence = []
    for column in range(len(ids)):
        if column not in visual or column in kept:
            sequence.append(states[column])
        if column == max(kept):
            sequence += merged
    logits = model.lm_head(llm.norm(run(torch.stack(sequence)[None], llm.layers[3:])))[0]
    full = torch.nn.functional.cross_entropy(logits[-4:-1], ids[-3:])
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-6)
    for own, other in zip(gradients, torch.autograd.grad(full, projector), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


def test_the_engine_trains_by_prompts_alone(model):
    """A trainer keeps labels back from the model: stages get them all the same, and no rows are packed."""
    batch = llava_batch(ROWS, labels=True)
    pruned = staged(model, FASTV, pruner="fastervlm", keep=8)
    expected = pruned.forward(**batch).loss
    number = (batch["labels"][:, 1:] != -100).sum()
    engine = Engine(pruned, EngineConfig())
    assert "pruning.stages" in engine.choice.reasons["packing"]
    with engine.attached():
        torch.testing.assert_close(engine.summed_loss(model, batch) / number, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(PruningError, match="can't be packed: pruning.stages"):
        Engine(pruned, EngineConfig(packing=True))
    with pytest.raises(PruningError, match="hidden_layer 2: pruning.stages cut"):
        Engine(pruned, EngineConfig(), reads=Reads(hidden=True, layer=2))


@torch.no_grad()
def test_elastic_rows_have_budgets_of_their_own_and_the_same_stages(model):
    """Before the LLM and inside it; a row may also have no stages. As in training: with cells, and attached."""
    fewer = {name: value for name, value in FASTV.items() if name != "keep"}
    stages = [[StageSpec(**fewer, keep=0.5)], [StageSpec(**fewer, average=9)], []]
    specs = [PruningSpec("divprune", keep, stages=own) for keep, own in zip((12, 8, 6), stages, strict=True)]
    elastic = ElasticModel(model, specs[0], specs)
    for cells, expected in (([0, 0, 2], [(12, 6), (24, 12), (0, 0)]), ([2, 1, 0], [(6, 6), (16, 5), (0, 0)])):
        batch = {**llava_batch(ROWS, labels=True), "cells": cells}
        with elastic.stages.noted() as plans:
            output = elastic.forward(**batch)
            with elastic.attach():
                attached = model(**batch)
        assert torch.equal(attached.logits, output.logits) and len(plans) == 2
        plan = plans[0]
        assert [counts.layers[1:3] for counts in plan.counts] == expected
        for number, cell in enumerate(cells):
            own = llava_batch(ROWS[number : number + 1], labels=True)
            alone_plan, alone = plan_for(PrunedModel(model, specs[cell]), own) if stages[cell] else (None, None)
            if alone is None:
                alone = PrunedModel(model, specs[cell]).forward(**own)
            else:
                assert alone_plan.counts == plan.counts[number : number + 1]
            there = left_at_the_end(plan)[number]
            real = plan.real[number]
            assert len(alone.logits[0]) == int(real.sum())
            torch.testing.assert_close(output.logits[number, there], alone.logits[0, there[real]], rtol=1e-4, atol=1e-5)
    other = [StageSpec(**{**FASTV, "boundaries": [3]})]
    with pytest.raises(PruningError, match="cut at the same layers by the same stages"):
        ElasticModel(model, specs[0], [PruningSpec("divprune", 6, stages=other)])
    with pytest.raises(PruningError, match="need them in the specification of the whole"):
        ElasticModel(model, specs[2], specs)
    with pytest.raises(PruningError, match="rows can't generate in settings"):
        elastic.generate(**llava_batch(ROWS), cells=[0, 0, 0], max_new_tokens=1)


@torch.no_grad()
def test_what_families_can_not_have_is_refused():
    gemma, qwen = of(("gemma3", "sdpa", "dart"))[1], of(("qwen3_vl", "sdpa", "dart"))[1]
    early, merging = {**FASTV, "boundaries": [1]}, MERGED["sparsevlm"][0]
    with pytest.raises(PruningError, match="boundary 1: masks of its full_attention layers.*layer 1; set boundaries"):
        staged(gemma, early)
    with pytest.raises(PruningError, match="boundary 1: its first 2 layers add deepstack features"):
        staged(qwen, early)
    with pytest.raises(PruningError, match="'sparsevlm' numbers tokens anew, and positions of family 'qwen3_vl'"):
        staged(qwen, merging)
    with pytest.raises(PruningError, match="other rotations for each kind of layer|merges tokens"):
        staged(gemma, merging)
    short = staged(tiny_gemma3(window=30, pairs=3), FASTV)
    with pytest.raises(PruningError, match="sliding window of 30"):
        short.forward(**gemma_batch(WORLDS["gemma3"].rows))


@torch.no_grad()
def test_masks_by_column_are_cut_too():
    """The kind of mask that flash attention takes, with an attention of that kind made of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def by_column(module, query, key, value, attention_mask, scaling=None, **_):
        new, length = query.shape[2], key.shape[2]
        seen = torch.ones(new, length).tril(diagonal=length - new).bool()
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), length)
            seen = (seen & attention_mask[:, None, None].bool()) | torch.eye(length)[-new:].bool()
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("flash_by_column", by_column)
    AttentionMaskInterface.register("flash_by_column", flash_attention_mask)
    plain, other = of(("llava", "sdpa", "dart"))[1], tiny_llava()
    other.model.language_model.config._attn_implementation = "flash_by_column"
    for rows in (ROWS, ROWS[:1]):
        prompts = llava_batch(rows, "left")
        for stages in (ORIGINAL["fastv_vtw"], DENSE["pyramiddrop_dense"], MERGED["sparsevlm"]):
            tokens = [staged(m, *stages).generate(**prompts, **SETTINGS).tokens for m in (plain, other)]
            assert torch.equal(*tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", [*ORIGINAL, *DENSE, *MERGED])
def test_answers_do_not_choose(model, name):
    """The same tokens are kept with an answer behind the prompt, with another one, and without."""
    pruned = staged(model, *(ORIGINAL | DENSE | MERGED)[name])
    batch = llava_batch(ROWS[:2], labels=True)

    def kept(inputs, row):
        plan = plan_for(pruned, inputs)[0]
        return [plan.kept_columns(layer)[row].nonzero()[:, 0].tolist() for layer in range(LAYERS)]

    other = {**batch, "input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 11)}
    for number, row in enumerate(ROWS[:2]):
        alone = llava_batch([row])
        prompt = {**alone, **{name: alone[name][:, :-3] for name in ("input_ids", "attention_mask")}}
        assert kept(batch, number) == kept(other, number) == kept(prompt, 0)


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
    config = model.config.get_text_config()
    static = StaticCache(config=config, max_cache_len=64)
    length = prompts["input_ids"].shape[1]
    four = torch.ones(length, length).tril().bool()[None, None]
    with pruned.attach():
        with pytest.raises(PruningError, match="made without stages"):
            model(**text, past_key_values=stock)
        with pytest.raises(PruningError, match="another length for each layer"):
            model(**prompts, past_key_values=static)
        with pytest.raises(PruningError, match="were not tried with a cache like this"):
            model(**prompts, past_key_values=DynamicCache(config=config, offloading=True))
    with pruned._inside():
        with pytest.raises(PruningError, match="2-D attention_mask"):
            model(**{**prompts, "attention_mask": four})
        with pytest.raises(PruningError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
        cache = DynamicCache(config=config)
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
