"""What stages hear is what the stock model computes: its own attention, keys and states, over what is left."""

from __future__ import annotations

import pytest
import torch
from stage_world import WORLDS, listening, llava_batch, masked_run, plan_for, staged, tiny_llava

from prunetune.pruning.hooks import record_input

STAGES = [
    {"name": "dart", "boundaries": [2], "keep": 8},
    {"name": "pyramiddrop", "boundaries": [3, 5], "keep": [6, 3], "options": {"positions": "original"}},
    {"name": "fastv", "boundaries": [4], "keep": 4},
]


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", WORLDS)
def test_scores_are_the_models_own(kind, side):
    """Against the attention, keys and states of the stock run in which what was dropped before is hidden."""
    world = WORLDS[kind]
    model, batch = world.build("eager"), world.batch(world.rows, side, labels=True)
    pruned = staged(model, *STAGES)
    with listening(pruned) as heard:
        plan, _ = plan_for(pruned, batch)
    points = pruned.stages.schedule.points
    assert [point.boundary for point in points] == [2, 3, 4, 5] and len(heard) == 4
    for point, at in zip(points, heard, strict=True):
        layer, segment = point.boundary + point.stage.listens, plan.before(point.boundary - 1)
        asked = {"output_attentions": True, "use_cache": True}
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = None
        llm = model.base_model.language_model
        # As they enter the layer: some models add to states between layers.
        with record_input(llm.layers[point.boundary]) as entered:
            full = masked_run(model, batch, plan, until=point.boundary - 1, **asked)
        columns = plan.own_columns(segment)
        for row, own in enumerate(columns):
            there = (own >= 0) & plan.shown(segment)[row]
            if at.attention is not None:
                for query in at.rows[row].nonzero()[:, 0]:
                    whole = full.attentions[layer][row, :, plan.queries[row, query]]
                    assert whole[:, own[there]].sum() > 0.99 * len(whole)
                    found = at.attention[row, :, query]
                    torch.testing.assert_close(found[:, there], whole[:, own[there]], rtol=1e-4, atol=1e-6)
                    assert not found[:, ~there].any()
            if at.keys is not None and side == "right":  # padding on the left is numbered in a plain call
                keys = full.past_key_values.layers[layer].keys[row].transpose(0, 1).flatten(1)
                torch.testing.assert_close(at.keys[row, there], keys[own[there]], rtol=1e-4, atol=1e-5)
            if at.normed is not None:
                states = llm.norm(entered[0][row])
                torch.testing.assert_close(at.normed[row, there], states[own[there]], rtol=1e-4, atol=1e-5)


MANY = [(1 + number % 2, 4 + number % 9, number) for number in range(72)]


@torch.no_grad()
def test_half_precision_keeps_what_float32_keeps_but_near_ties():
    """Of 72 rows as many as ``docs/pruners/stages.md`` says, and a few less for other processors."""
    stages = {name: {"name": name, "boundaries": [2], "keep": keep} for name, keep in (("fastv", 5), ("dart", 8))}
    batches = [llava_batch(MANY[first : first + 36]) for first in (0, 36)]

    def kept(model, name, inputs):
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
        return [row.nonzero()[:, 0].tolist() for row in plan_for(staged(model, stages[name]), inputs)[0].kept_columns()]

    def of_all(model, name):
        return [row for batch in batches for row in kept(model, name, batch)]

    model = tiny_llava()
    exact = {name: of_all(model, name) for name in stages}
    for dtype, least in ((torch.bfloat16, {"fastv": 66, "dart": 54}), (torch.float16, {"fastv": 71, "dart": 68})):
        model = tiny_llava().to(dtype)
        for name in stages:
            found = of_all(model, name)
            assert sum(one == other for one, other in zip(found, exact[name], strict=True)) >= least[name]
            alone = [kept(model, name, llava_batch([row]))[0] for row in MANY[:6]]
            assert sum(one != other for one, other in zip(alone, found[:6], strict=True)) <= 1
