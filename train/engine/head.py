"""The loss at supervised positions: logits of nothing else, and of those a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from prunetune.pruning.hooks import stood_in

PIECE = 1024
"""Positions whose logits exist at a time: of 32,000 words in float32 they take 131 MB."""


class FrozenHeadLoss(torch.autograd.Function):
    """The summed cross entropy of a frozen head, with the gradient to its input made in the forward pass.

    The logits of all positions never exist together, and nothing of their size is kept for the backward pass: the
    gradient to the hidden states is (softmax - one-hot) @ weight, a piece at a time. A fused kernel that also makes a
    gradient of the head's weight, as for training them, would compute what nobody reads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the sum over positions in float32."""
        total = wide(hidden.new_zeros(()))
        wanted_back = ctx.needs_input_grad[0]  # a held-out loss asks for none
        gradient = torch.empty_like(hidden) if wanted_back else None
        for first in range(0, len(hidden), PIECE):
            piece = slice(first, first + PIECE)
            # As the head computes them, in its dtype, and only then in float32.
            logits = wide(functional.linear(hidden[piece], weight, bias))
            scores = functional.log_softmax(logits, dim=-1)
            wanted = targets[piece, None]
            total -= scores.gather(1, wanted).sum()
            if gradient is None:
                continue
            excess = scores.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=scores.dtype))
            gradient[piece] = excess.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """Return the gradient to the hidden states."""
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(gradient.dtype), None, None, None


Terms = Callable[[Tensor, slice], Tensor]
"""Returns k summed terms (k,) of logits (m, V), and of which of all positions these are."""


class FrozenHeadTerms(torch.autograd.Function):
    """Several terms of a frozen head's logits, as :class:`FrozenHeadLoss` makes the one of cross entropy.

    What the terms are is not known here, so the gradient to a piece's logits is PyTorch's own, made and used up before
    the next piece begins. The terms' weights are given with them: their gradients are added where they are one piece's
    of the vocabulary, and not each kept for all positions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        terms: Terms,
        weights: Float[Tensor, " k"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
        """Return the weighted sum of the terms, which has the gradient, and each term's own."""
        sums = torch.zeros_like(weights)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), PIECE):
            piece = slice(first, first + PIECE)
            logits = wide(functional.linear(hidden[piece], weight, bias)).detach()
            if gradient is None:
                sums += terms(logits, piece)
                continue
            with torch.enable_grad():
                own = terms(logits.requires_grad_(), piece)
                (excess,) = torch.autograd.grad((own * weights).sum(), logits)
            sums += own.detach()
            gradient[piece] = excess.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """Return the gradient to the hidden states."""
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(gradient.dtype), None, None, None, None


@dataclass(frozen=True)
class Scores:
    """What scores the words at some positions: logits, or what a frozen head makes them of.

    Attributes:
        values: (n, V) logits, or (n, D) hidden states.
        head: what makes logits of hidden states; None where they are logits.
    """

    values: Float[Tensor, "n width"]
    head: nn.Linear | None = None

    def __len__(self) -> int:
        return len(self.values)

    def logits(self, piece: slice) -> Float[Tensor, "m V"]:
        """Return the logits of some positions in float32."""
        values = self.values[piece]
        return wide(values if self.head is None else functional.linear(values, self.head.weight, self.head.bias))

    def cross_entropy(self, targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the summed cross entropy in float32."""
        if self.head is None or not len(targets):
            return summed_loss(self.values, targets)
        loss: Tensor = FrozenHeadLoss.apply(self.values, self.head.weight, self.head.bias, targets)
        return loss

    def summed(self, terms: Terms, weights: Float[Tensor, " k"]) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
        """Return the weighted sum of terms, with a graph, and each term's own without one.

        Of no position they are 0, and the sum still has a graph.
        """
        if not len(self):
            return wide(self.values).sum(), torch.zeros_like(weights)
        if self.head is None:
            sums = terms(wide(self.values), slice(None))
            return (sums * weights).sum(), sums.detach()
        total, sums = FrozenHeadTerms.apply(self.values, self.head.weight, self.head.bias, terms, weights)
        return total, sums


def summed_loss(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the summed cross entropy in float32; of no position it is 0 and still has a graph."""
    if not len(targets):
        return wide(logits).sum()
    return functional.cross_entropy(wide(logits), targets, reduction="sum")


def wide(values: Tensor) -> Tensor:
    """Return values in float32, which losses are made in; those in float64 stay."""
    return values if values.dtype == torch.float64 else values.float()


def plain_head(model: nn.Module) -> nn.Linear | None:
    """Return the head if logits are its output and nothing else, as one small forward pass shows; None if not."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        return None
    ids = torch.arange(3, 7, device=head.weight.device)[None]
    mask = torch.ones_like(ids)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with hidden_instead_of_logits(head):
                hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            same = hidden.shape[-1] == head.in_features and torch.equal(head(hidden), logits)
    finally:
        model.train(was_training)
    return head if same else None


@contextmanager
def hidden_instead_of_logits(head: nn.Linear) -> Iterator[None]:
    """While open, the model returns the hidden states that would enter its head as its logits."""
    with stood_in(head, lambda hidden: hidden):
        yield
