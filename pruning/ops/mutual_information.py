"""Mutual information of vectors, their channels taken as samples, by the distances of nearest neighbours."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

NEIGHBOURS = 3
PAIRS_AT_ONCE = 2**22
"""Distances of channels that are held at a time: at 4096 channels a single pair has 16.8 million."""


def mutual_information(
    tokens: Float[Tensor, "B N D"],
    words: Float[Tensor, "B M D"],
) -> Float[Tensor, "B N M"]:
    """Return the mutual information (B, N, M) in nats of every token with every word, at least 0, float32.

    The estimator of Kraskov, Stoegbauer and Grassberger that scikit-learn has for two continuous variables, with 3
    neighbours: a channel is a sample, and its neighbourhood reaches just short of its third neighbour in the larger of
    the two distances. Each vector is divided by its standard deviation; no noise is added against ties.

    This compares all pairs of channels of every token and word, D * D numbers each: minutes for an image of 576 tokens
    and 4096 channels on a CPU. It is there to repeat an ablation.
    """
    batch, count, channels = tokens.shape
    per_item = words.shape[1]
    first, second = _scaled(tokens).flatten(0, 1), _scaled(words).flatten(0, 1)
    pairs = torch.arange(batch * count * per_item, device=tokens.device)
    parts = []
    for some in pairs.split(max(1, PAIRS_AT_ONCE // channels**2)):
        token = some // per_item  # counted through the batch, as the words are
        word = token // count * per_item + some % per_item
        parts.append(_of_pairs(first[token], second[word]))
    return torch.cat(parts).view(batch, count, per_item).float()


def _scaled(vectors: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Return vectors divided by their standard deviation, float64; constant ones as they are."""
    vectors = vectors.double()
    deviation = vectors.std(dim=-1, correction=0, keepdim=True)
    return vectors / torch.where(deviation > 0, deviation, 1)


def _of_pairs(
    first: Float[Tensor, "P D"],
    second: Float[Tensor, "P D"],
) -> Float[Tensor, " P"]:
    """Return the mutual information (P,) of pairs of vectors."""
    channels = first.shape[1]
    apart_first = (first[:, :, None] - first[:, None, :]).abs()  # (P, D, D)
    apart_second = (second[:, :, None] - second[:, None, :]).abs()
    joint = torch.maximum(apart_first, apart_second)
    # One neighbour more, for each channel is its own.
    number = min(NEIGHBOURS, channels - 1)
    reach = joint.topk(number + 1, dim=-1, largest=False).values[..., -1:]  # (P, D, 1)
    reach = torch.nextafter(reach, torch.zeros_like(reach))
    terms = []
    for apart in (apart_first, apart_second):
        within = (apart <= reach).sum(dim=-1)  # (P, D), itself included
        terms.append(torch.digamma(within.double()).mean(dim=-1))
    counts = torch.tensor([float(channels), float(max(number, 1))], dtype=torch.float64, device=first.device)
    return (torch.digamma(counts).sum() - terms[0] - terms[1]).clamp(min=0)
