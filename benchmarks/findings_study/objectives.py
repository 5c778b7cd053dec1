"""What a projector is trained towards: each term summed over its units, as ``objective.terms`` names them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of answer tokens, logits (M, V) and targets (M,)."""
    return F.cross_entropy(logits, targets, reduction="sum")


def gce(logits: Tensor, targets: Tensor, q: float) -> Tensor:
    """Return the generalised cross entropy (1 - p^q) / q: answers that can't be seen pull less."""
    likelihood = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return ((1 - (q * likelihood).exp()) / q).sum()


def kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of two sets of logits (M, V)."""
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)


def hidden(states: Tensor, teacher: Tensor) -> Tensor:
    """Return |s - t|^2 / |t|^2 of states (M, D), position by position."""
    return ((states - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()


def feature(visual: Tensor, teacher: Tensor) -> Tensor:
    """Return the same of the mean of the visual tokens (B, K, D) that reach the LLM and the teacher's (B, D)."""
    return hidden(visual.mean(dim=1), teacher)


def total(parts: dict[str, Tensor], weights: dict[str, float], units: dict[str, int]) -> Tensor:
    """Return the weighted sum of terms, each over the units of the whole update."""
    loss = torch.zeros(())
    for name, part in parts.items():
        loss = loss + weights[name] * part / units[name]
    return loss
