"""Compare our pruners with answers of the published code: ``python scripts/check_golden.py DIR [--method NAME]``.

DIR holds ``METHOD/CASE.npz`` files; one without a matching folder may be METHOD's own folder. Prints a line per case,
``METHOD CASE ok``, ``METHOD CASE differs: what`` or ``METHOD CASE defined differently: why``, and ``N of M agree``.
Cases that are defined differently do not count. Exit status 1 if any case differs or there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.pruning import VisualTokens, build_pruner
from prunetune.pruning.methods.cdpruner import CDPruner
from prunetune.pruning.methods.tome import merge_step, unmerged
from prunetune.pruning.ops.attention import cls_attention, received_attention
from prunetune.scripts.golden_cases import (
    Case,
    DefinedDifferently,
    Device,
    Differs,
    agree,
    agree_per_item,
    defined_differently,
    kept,
    tensor,
)
from prunetune.scripts.golden_image import IMAGE_CHECKS
from prunetune.scripts.golden_video import VIDEO_CHECKS


def either_way(check: Callable[[Tensor | None], None], count: int) -> None:
    """Run a check with every item as an image of its own, and if that differs with all as crops of one image.

    Cases of several items hold the one or the other; the answer must be one of the two, whole.
    """
    try:
        check(None)
    except Differs:
        if count == 1:
            raise
        check(torch.zeros(count, dtype=torch.long, device=Device.current))


def check_fastervlm(case: Case) -> None:
    """Attention alone."""
    attention = tensor(case, "cls_attention")
    tokens = VisualTokens(attention.transpose(1, 2), signals={"cls_attention": attention})
    agree_per_item(case, "kept_indices", kept(build_pruner("fastervlm")(tokens, int(case["keep"]))))


def check_vispruner(case: Case) -> None:
    """Attention and features."""
    options = {
        "important_ratio": float(case["important_ratio"]),
        "removed_per_round": int(case["remove_per_iter"]),
    }
    tokens = VisualTokens(tensor(case, "vision_hidden"), signals={"cls_attention": tensor(case, "cls_attention")})
    agree_per_item(case, "kept_indices", kept(build_pruner("vispruner", options)(tokens, int(case["keep"]))))


def check_divprune(case: Case) -> None:
    """Projected features."""
    projected = tensor(case, "projected")
    agree_per_item(
        case, "kept_indices", kept(build_pruner("divprune")(VisualTokens(projected, projected), int(case["keep"])))
    )


def check_cdpruner(case: Case) -> None:
    """Relevance and picks, with minimum and maximum over each item or over all of them."""
    projected, keep = tensor(case, "projected"), int(case["keep"])
    text = tensor(case, "text_embeds").expand(len(projected), -1, -1)
    pruner = CDPruner(eps=float(case["eps"]))

    def tokens(image: Tensor | None) -> VisualTokens:
        return VisualTokens(
            projected,
            projected,
            signals={"image_embeds": tensor(case, "image_embeds"), "text_embeds": text},
            image=image,
        )

    either_way(lambda image: agree(case, "relevance", pruner.quality(tokens(image))), len(projected))
    either_way(lambda image: agree_per_item(case, "kept_indices", kept(pruner(tokens(image), keep))), len(projected))
    image = torch.zeros(len(projected), dtype=torch.long, device=Device.current)
    for name, owner in (("independent", None), ("joint", image)):
        if f"kept_indices_{name}_minmax" in case:
            agree_per_item(case, f"kept_indices_{name}_minmax", kept(pruner(tokens(owner), keep)))


def check_hiprune(case: Case) -> None:
    """From queries and keys: the attention received, then the selection."""
    received = {
        layer: received_attention(tensor(case, f"q_{layer}"), tensor(case, f"k_{layer}"), float(case["scale"]), skip=1)
        for layer in ("object", "deep")
    }
    for layer, value in received.items():
        agree(case, f"received_{layer}", value.mean(dim=1))
    columns = int(case["grid_width"])
    count = received["deep"].shape[-1]
    tokens = VisualTokens(
        received["deep"].transpose(1, 2),
        signals={"received_attention": received["deep"], "object_attention": received["object"]},
        grid=(count // columns, columns),
    )
    pruner = build_pruner("hiprune", {"alpha": float(case["alpha"]), "object_layer": int(case["object_layer_1based"])})
    agree_per_item(case, "kept_indices", kept(pruner(tokens, int(case["keep"]))))


def check_visionzip(case: Case) -> None:
    """The published pair of numbers is a ratio of their sum; dominant counts [CLS]."""
    hidden, keys = tensor(case, "vision_hidden_with_cls"), tensor(case, "metric_with_cls")
    contextual, keep = int(case["contextual"]), int(case["total_tokens"])
    tokens = VisualTokens(
        hidden[:, 1:],
        signals={"cls_attention": tensor(case, "cls_attention"), "cls_feature": hidden[:, 0], "keys": keys[:, 1:]},
    )
    selection = build_pruner("visionzip", {"contextual_ratio": contextual / keep})(tokens, keep)
    assert selection.merged is not None and selection.origin is not None
    origin = torch.stack(selection.origin)
    agree_per_item(case, "kept_indices", list(origin[:, 1 : keep - contextual]))
    # Targets are stored as places among the tokens that are not dominant.
    rest = [[n for n in range(hidden.shape[1] - 1) if n not in set(row)] for row in np.asarray(case["kept_indices"])]
    stored = np.asarray(case["contextual_target_indices"])
    ours = origin[:, keep - contextual :].cpu().numpy()
    places = np.array([[rest[b].index(n) for n in row] for b, row in enumerate(ours)]).reshape(stored.shape)
    if not (np.array_equal(stored, ours) or np.array_equal(stored, places) or np.array_equal(stored, ours + 1)):
        raise Differs("contextual_target_indices differ")
    agree(case, "merged_features", torch.stack(selection.merged))


def _prumerge(case: Case, name: str) -> None:
    hidden, keys, query = (tensor(case, key) for key in ("vision_hidden", "keys_with_cls", "q_cls"))
    attention = cls_attention(query[:, None, None], keys[:, None], float(case["qk_scale"]))[:, 0]
    agree(case, "cls_attention", attention)
    count, neighbours = "outliers" if bool(case["adaptive"]) else "budget", int(case["neighbours"])
    ratio = float(case["fixed_ratio"])
    keep = int(hidden.shape[1] * ratio) + 1  # the published budget does not count the extra token
    options: dict[str, Any] = {"count": count, "neighbours": neighbours}
    if name == "prumerge_plus" and count == "budget":  # the published fixed ratio adds samples to the budget
        options |= {"count": "ratio", "ratio": ratio}

    def check(image: Tensor | None) -> None:
        tokens = VisualTokens(hidden, signals={"reader_attention": attention, "reader_keys": keys[:, 1:]}, image=image)
        selection = build_pruner(name, options)(tokens, keep)
        assert selection.merged is not None and selection.origin is not None
        agree_per_item(case, "selection_order", [row[row >= 0] for row in selection.origin])
        agree_per_item(case, "kept_indices", kept(selection))
        agree_per_item(case, "merged_features", selection.merged)

    either_way(check, len(hidden))


def check_prumerge(case: Case) -> None:
    """From the [CLS] query and the keys of the layer that reads the features."""
    _prumerge(case, "prumerge")


def check_prumerge_plus(case: Case) -> None:
    """The same with samples."""
    _prumerge(case, "prumerge_plus")


def check_trim(case: Case) -> None:
    """CLIP embeddings of tokens and text; ratio -1 is the adaptive count."""
    hidden = tensor(case, "vision_hidden")
    adaptive = float(case["ratio"]) < 0
    keep = 1 if adaptive else int(case["keep"]) + 1  # the published budget does not count the extra token
    pruner = build_pruner("trim", {"count": "outliers" if adaptive else "budget"})

    def check(image: Tensor | None) -> None:
        tokens = VisualTokens(
            hidden,
            signals={"image_embeds": tensor(case, "image_embeds"), "text_embeds": tensor(case, "text_embeds")[:, None]},
            image=image,
        )
        selection = pruner(tokens, keep)
        if selection.merged is None:  # one token is dropped, and ours passes all as they are
            agree_per_item(case, "aggregated_token", [hidden[b, _dropped(case, b)] for b in range(len(hidden))])
            return
        agree_per_item(case, "kept_indices", kept(selection))
        agree_per_item(case, "aggregated_token", [row[-1] for row in selection.merged])

    either_way(check, len(hidden))


def _dropped(case: Case, item: int) -> int:
    stored = set(np.asarray(case["kept_indices"])[item].tolist())
    return next(n for n in range(len(stored) + 1) if n not in stored)


def check_tome(case: Case) -> None:
    """One step that removes r tokens, or as many steps as it takes to leave K."""
    state = unmerged(tensor(case, "metric"), tensor(case, "vision_hidden"))
    if "r" in case:
        state = merge_step(state, int(case["r"]), bool(case["class_token"]))
    else:
        while state.features.shape[1] > int(case["keep"]):
            left = merge_step(state, state.features.shape[1] - int(case["keep"]), bool(case["class_token"]))
            if left is state:
                raise Differs(f"a class token can't merge, so {int(case['keep'])} tokens can't be reached")
            state = left
        if not bool(case["class_token"]):
            tokens = VisualTokens(tensor(case, "vision_hidden"), signals={"keys": tensor(case, "metric")})
            selection = build_pruner("tome")(tokens, int(case["keep"]))
            assert selection.merged is not None
            agree(case, "merged_features", torch.stack(selection.merged))
    agree(case, "assignment", state.assignment)
    agree(case, "size", state.size)
    agree(case, "merged_features", state.features)


CHECKS: dict[str, Callable[[Case], None]] = {
    "cdpruner": check_cdpruner,
    "divprune": check_divprune,
    "fastervlm": check_fastervlm,
    "hiprune": check_hiprune,
    "prumerge": check_prumerge,
    "prumerge_plus": check_prumerge_plus,
    "tome": check_tome,
    "trim": check_trim,
    "visionzip": check_visionzip,
    "vispruner": check_vispruner,
    **IMAGE_CHECKS,
    **VIDEO_CHECKS,
}
"""How the cases of each method are read and compared; a method is one function."""


def check(folder: Path, method: str | None = None) -> tuple[list[str], int, int]:
    """Check all cases under ``folder``; return the lines, how many agree and how many were compared."""
    lines, same, total = [], 0, 0
    for name in [method] if method else CHECKS:
        for file in _files(folder, name):
            with np.load(file) as stored:
                case = {key: stored[key] for key in stored.files}
            reason = defined_differently(name, case)
            if reason is not None:
                lines.append(f"{name} {file.stem} defined differently: {reason}")
                continue
            total += 1
            try:
                CHECKS[name](case)
            except DefinedDifferently as reason:
                total -= 1
                lines.append(f"{name} {file.stem} defined differently: {reason}")
            except Differs as difference:
                lines.append(f"{name} {file.stem} differs: {difference}")
            except Exception as error:  # one broken case must not hide the others
                lines.append(f"{name} {file.stem} differs: {type(error).__name__}: {error}")
            else:
                same += 1
                lines.append(f"{name} {file.stem} ok")
    return lines, same, total


def _files(folder: Path, method: str) -> list[Path]:
    """Return a method's cases: those in its folder, or all of a folder that is the method's own."""
    found = sorted((folder / method).glob("*.npz"))
    if not found and folder.name == method:
        found = sorted(folder.glob("*.npz"))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the report and return the exit status."""
    parser = argparse.ArgumentParser("check_golden")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of METHOD/CASE.npz files")
    parser.add_argument("--method", choices=sorted(CHECKS))
    parser.add_argument("--device", default="cpu", help="for example cuda")
    options = parser.parse_args(arguments)
    Device.current = torch.device(options.device)
    lines, same, total = check(options.folder, options.method)
    print("\n".join([*lines, f"{same} of {total} agree"]))
    if not lines:
        print(f"no cases under {options.folder}: expected {options.folder}/METHOD/CASE.npz", file=sys.stderr)
    return 0 if lines and same == total else 1


if __name__ == "__main__":
    sys.exit(main())
