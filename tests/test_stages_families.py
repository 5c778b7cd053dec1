"""Stages in the families that ``stage_world`` has no model of: all kept is stock, and what is dropped is hidden."""

from __future__ import annotations

import pytest
import test_idefics3
import test_llava_next_video
import test_llava_onevision
import test_paligemma
import test_qwen2_vl
import test_smolvlm
import test_video_llava
import torch
from stage_world import left_at_the_end, masked_run, plan_for, staged

FAMILIES = {
    "paligemma": test_paligemma.TestIdentity,
    "llava_onevision": test_llava_onevision.TestLlavaOnevision,
    "qwen2_vl": test_qwen2_vl.TestVideos,
    "video_llava": test_video_llava.TestVideoLlava,
    "idefics3": test_idefics3.TestIdefics3,
    "smolvlm": test_smolvlm.TestImages,
    "llava_next_video": test_llava_next_video.TestLlavaNextVideo,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_stages_run_in_every_family(kind):
    suite = FAMILIES[kind]()
    model, rows = suite.make_model(), suite.rows()[:3]
    fastv = {"name": "fastv", "boundaries": [1], "keep": 5}
    labelled, prompts = suite.batch(rows, "left", True), suite.batch(rows, "left", False)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": list(suite.suppressed)}

    def forget():
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = None

    forget()
    whole = staged(model, {**fastv, "keep": 1.0})
    assert torch.equal(whole.forward(**labelled).logits, model(**labelled).logits)
    forget()
    stock = model.generate(**prompts, **settings)[:, prompts["input_ids"].shape[1] :]
    assert torch.equal(whole.generate(**prompts, **settings).tokens, stock)

    pruned = staged(model, fastv)
    plan, ours = plan_for(pruned, labelled)
    assert [counts.layers for counts in plan.counts] == [
        (counts.entering, min(counts.entering, 5)) for counts in plan.counts
    ]
    forget()
    full = masked_run(model, labelled, plan)
    there = left_at_the_end(plan)
    torch.testing.assert_close(ours.logits[there], full.logits[there], rtol=1e-4, atol=1e-5)
    tokens = pruned.generate(**prompts, **settings).tokens
    for number, row in enumerate(rows):
        alone = pruned.generate(**suite.batch([row], "left", False), **settings).tokens[0]
        assert torch.equal(tokens[number], alone)
