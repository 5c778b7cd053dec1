"""What methods go by, as maps: attention that tokens receive, and how close they are to the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunetune.models import Arm
from prunetune.pruning.signals import layer_of, of_source, signal_of
from prunetune.pruning.types import VisualTokens
from prunetune.pruning.vision import Vision


@dataclass(frozen=True)
class TokenMap:
    """A number for every token.

    Attributes:
        title: what it is.
        values: (T,) float32 by the tokens' numbers.
        methods: the labels of the methods that read it.
    """

    title: str
    values: np.ndarray
    methods: tuple[str, ...]


def maps_of(arms: Sequence[tuple[str, Arm, Vision]], instruction: str, rows: Sequence[int]) -> list[TokenMap]:
    """Return the attention and relevance maps that some methods read of one prompt, each once.

    Args:
        arms: the label of each method with its arm, and the image encoded with the signals that it reads.
        instruction: what methods may read of the question.
        rows: the row of each image.
    """
    found: dict[str, TokenMap] = {}
    for label, arm, vision in arms:
        for title, values in _of_arm(arm, vision, instruction, rows):
            known = found.get(title)
            if known is None:
                found[title] = TokenMap(title, values, (label,))
            elif label not in known.methods:
                found[title] = TokenMap(title, known.values, (*known.methods, label))
    return list(found.values())


def _of_arm(arm: Arm, vision: Vision, instruction: str, rows: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    needs = arm.pruned.needs
    found = []
    for need in of_source(needs, "attention", "reader", "head"):
        signal = signal_of(need)
        if signal.axes not in ("B H N", "B N"):
            continue
        number = layer_of(need)
        at = "" if number is None else f", layer {number}"
        found.append((f"{_TITLES.get(signal.name, signal.name)}{at}", _joined(vision, signal.name)))
    if not arm.pruned.reads_text:
        return found
    seen = arm.pruned.text.add(vision, arm.pruned.pruner, [instruction] * (max(rows) + 1), rows)
    for title, own, text in _RELEVANCE:
        names = {signal_of(need).name for need in of_source(needs, "text")}
        if text in names and (own == "projected" or own in names):
            values = [_relevance(tokens, own, text) for tokens in seen.groups]
            found.append((title, _numbers(values)))
    return found


_TITLES = {
    "cls_attention": "attention of [CLS], mean over heads",
    "shallow_attention": "attention of [CLS], mean over heads",
    "received_attention": "attention received, mean over heads",
    "object_attention": "attention received, mean over heads",
    "reader_attention": "attention of [CLS] in the layer behind the features",
    "head_attention": "attention of the pooling head",
}
_RELEVANCE = (
    ("cosine with the question in CLIP's space", "image_embeds", "text_embeds"),
    ("cosine with the nearest word of the question, LLM space", "projected", "text_token_embeds"),
)


def _joined(vision: Vision, name: str) -> np.ndarray:
    """Return a signal of all groups by the tokens' numbers (T,), the mean over heads."""
    values = []
    for tokens in vision.groups:
        own = tokens.require(name).float()
        values.append(own.mean(dim=1) if own.ndim == 3 else own)
    return _numbers(values)


def _relevance(tokens: VisualTokens, own: str, text: str) -> Tensor:
    """Return for each token (B, N) the greatest cosine with a piece of the text; rows of zeros are padding."""
    visual = torch.nn.functional.normalize(tokens.require(own).float(), dim=-1)
    words = tokens.require(text).float()  # (B, M, E)
    cosines = visual @ torch.nn.functional.normalize(words, dim=-1).transpose(1, 2)  # (B, N, M)
    return cosines.masked_fill((words == 0).all(dim=-1)[:, None, :], -1.0).amax(dim=-1)


def _numbers(values: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([own.flatten() for own in values]).cpu().numpy()
