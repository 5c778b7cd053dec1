"""Golden cases of the methods for videos: each reader builds one clip of a stored case and compares our answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from prunetune.pruning import VisualTokens, build_pruner
from prunetune.pruning.methods.fastvid import FastVID
from prunetune.pruning.methods.vidcom2 import frame_scale, likeness
from prunetune.scripts.golden_cases import Case, agree, kept, tensor


def clip(case: Case, **signals: Tensor) -> VisualTokens:
    """Return the stored video as one clip."""
    features = tensor(case, "video_features")  # (F, L, C)
    frames, rows, columns = np.asarray(case["grid_thw"]).tolist()
    flat = features.flatten(0, 1)[None]
    return VisualTokens(flat, flat, signals=signals, grid=(rows, columns), frames=frames)


def check_evs(case: Case) -> None:
    """Changes between frames."""
    pruner = build_pruner("evs", {"prune_rate": float(case["prune_rate"])})
    agree(case, "kept_indices", kept(pruner(clip(case), 1))[0])


def check_vidcom2(case: Case) -> None:
    """Likeness, shares of frames, and both counts."""
    tokens, ratio = clip(case), float(case["retention_ratio"])
    to_video, to_frame = likeness(tokens)
    agree(case, "similarity", (to_video + to_frame)[0])
    agree(case, "frame_scale", frame_scale(to_video, ratio)[0])
    for count, key in (("published", "kept_indices"), ("fixed", "kept_indices_fixed")):
        pruner = build_pruner("vidcom2", {"retention_ratio": ratio, "count": count})
        positions = kept(pruner(tokens, 1))[0]
        agree(case, key, positions)
        if count == "published":
            agree(case, "kept_per_frame", torch.bincount(positions // tokens.per_frame, minlength=tokens.frames))


def check_dycoke(case: Case) -> None:
    """Similarity to an earlier frame, and the order in which tokens are handed on."""
    tokens = clip(case)
    options = {"merge_ratio": float(case["merge_ratio"]), "groups": "published"}
    agree(case, "kept_indices", kept(build_pruner("dycoke", options)(tokens, 1))[0])
    ordered = build_pruner("dycoke", {**options, "order": "published"})(tokens, 1)
    assert ordered.origin is not None
    agree(case, "kept_indices", ordered.of(0))
    agree(case, "selection_order", ordered.origin[0])


def check_fastvid(case: Case) -> None:
    """Segments, anchors, salient tokens and merged features, from the pooling head's signals."""
    attention = tensor(case, "frame_attention").flatten()[None]
    tokens = clip(case, head_feature=tensor(case, "frame_global")[None], head_attention=attention)
    pruner = FastVID(
        count="published",
        frames="pooling_head",
        retention_ratio=float(case["retention_ratio"]),
        segments=int(case["dyseg_c"]),
        threshold=float(case["dyseg_tau"]),
        context_ratio=float(case["stprune_d"]),
        anchor_step=int(case["dtm_p"]),
        own_weight=float(case["dtm_beta"]),
    )
    selection = pruner(tokens, 1)
    agree(case, "kept_indices", kept(selection)[0])
    assert selection.mixing is not None
    agree(case, "merged_features", selection.mixing[0] @ tokens.require("projected")[0])
    budget = tokens.frames * int(tokens.per_frame * float(case["retention_ratio"]))
    plan, salient, _ = pruner.chosen(tokens, budget)
    agree(case, "segment_sizes", torch.bincount(plan.segment[0]))
    agree(case, "anchors_per_frame", plan.context[0])
    agree(case, "salient_indices", salient[0].flatten().nonzero()[:, 0])


VIDEO_CHECKS: dict[str, Callable[[Case], None]] = {
    "dycoke": check_dycoke,
    "evs": check_evs,
    "fastvid": check_fastvid,
    "vidcom2": check_vidcom2,
}
