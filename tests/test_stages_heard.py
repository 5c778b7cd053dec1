"""What stages hear is what the stock model computes: its own attention, keys and states, over what is left."""

from __future__ import annotations

import pytest
import torch
from stage_world import WORLDS, listening, masked_run, plan_for, staged

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
