"""The terms of an objective: each a function of what was read of the model, summed over its units, in float32.

What a unit is depends on the term: a supervised token, a text position behind the image, a row with images, or the
update itself. A term's sum is divided by the number of its units over a whole update, so that it does not depend on how
samples are laid out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from prunetune.train.engine.head import wide


def ce(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the cross entropy, the sum of -log p(target)."""
    return functional.cross_entropy(wide(logits), targets, reduction="sum")


def gce(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], q: float) -> Float[Tensor, ""]:
    """Return the generalised cross entropy (Zhang & Sabuncu 2018), the sum of (1 - p(target)^q) / q.

    Its gradient is that of the cross entropy times p^q: a target that the model can't see, since what would show it was
    pruned away, pulls little. Towards q = 0 it is the cross entropy, at q = 1 the mean absolute error.

    Args:
        logits: of the positions.
        targets: the tokens that stand behind them.
        q: above 0, at most 1.
    """
    scores = functional.log_softmax(wide(logits), dim=-1).gather(1, targets[:, None])
    # expm1 keeps what 1 - p^q would round away where p is almost 1.
    return -torch.expm1(q * scores).sum() / q


def kl(logits: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], temperature: float = 1.0) -> Float[Tensor, ""]:
    """Return T^2 times the sum of KL(teacher || student), of distributions softened by the temperature T.

    With t and s the softmax of teacher's and student's logits over T, a position adds
    T^2 sum_v t_v (log t_v - log s_v); T^2 keeps the size of the gradient (Hinton et al. 2015).
    """
    student = functional.log_softmax(wide(logits) / temperature, dim=-1)
    taught = functional.log_softmax(wide(teacher) / temperature, dim=-1)
    return temperature**2 * functional.kl_div(student, taught, reduction="sum", log_target=True)


def kl_of_top(
    logits: Float[Tensor, "n V"],
    words: Int[Tensor, "n k"],
    taught: Float[Tensor, "n k1"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Return :func:`kl` over k words and all others taken together, as one more word.

    It is at most :func:`kl` over all words, and the same where the others' mass is shared out alike.

    Args:
        logits: the student's.
        words: the teacher's k likeliest.
        taught: (n, k + 1) their log-probabilities at this temperature, and last the log of the others' mass, which is
            -inf where there are none.
        temperature: of both distributions.
    """
    scores = functional.log_softmax(wide(logits) / temperature, dim=-1)
    own = scores.gather(1, words)
    others = scores.scatter(1, words, float("-inf")).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([own, others], dim=1)
    taught = taught.to(student.dtype)
    # Of no mass nothing is compared: 0 log 0 is 0, and -inf - (-inf) would be no number.
    there = taught > float("-inf")
    difference = taught.masked_fill(~there, 0) - student.masked_fill(~there, 0)
    return temperature**2 * (taught.exp() * difference).sum()


def hidden(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Return the sum over positions of |s - t|^2 / |t|^2, of hidden states after the LLM's final norm."""
    student, teacher = wide(student), wide(teacher)
    return ((student - teacher).square().sum(dim=-1) / teacher.square().sum(dim=-1)).sum()


def feature(student: Float[Tensor, "rows D"], teacher: Float[Tensor, "rows D"]) -> Float[Tensor, ""]:
    """Return the sum over rows of |s - t|^2 / |t|^2, of means over the visual tokens that reach the LLM."""
    return hidden(student, teacher)


def anchor(weights: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return |w - w0|^2 / |w0|^2 over all tensors of the projector together.

    Args:
        weights: what trains, by name.
        originals: the same of the original projector.
    """
    moved, sizes = [], []
    for name, weight in weights.items():
        original = wide(originals[name])
        moved.append((wide(weight) - original).square().sum())
        sizes.append(original.square().sum())
    return torch.stack(moved).sum() / torch.stack(sizes).sum()
