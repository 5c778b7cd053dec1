"""VisPruner's removal of duplicates: rounds that drop the tokens at even places most similar to one at an odd place."""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 1024
"""Up to so many tokens a round scans whole rows; beyond, on a CPU, it looks at nearest neighbours first."""
NEIGHBOURS = 12
_NOWHERE = -4.0  # below every cosine


def without_duplicates(similarity: Tensor, rest: Tensor, wanted: int, per_round: int) -> Tensor:
    """Shrink ``rest`` round by round; the order of what stays decides the next round's split.

    A round splits the list into even and odd places, sorts the even tokens by their largest similarity to any odd one,
    drops the first ``per_round`` of them, and goes on with the other even tokens, in that order, and then the odd ones.

    Args:
        similarity: (B, N, N) cosine, float64 where it must not depend on the batch.
        rest: (B, R) positions, in order.
        wanted: how many stay.
        per_round: how many a round drops at most.

    Returns:
        (B, wanted) positions.
    """
    rounds = _by_rows if similarity.is_cuda or similarity.shape[1] <= SHORT else _by_neighbours
    names = None
    while rest.shape[1] > wanted:
        if 2 * rest.shape[1] <= similarity.shape[1]:  # half is gone: the matrix is cut to what is left
            similarity, names = _among(similarity, rest), rest if names is None else names.gather(1, rest)
            rest = torch.arange(rest.shape[1], device=rest.device).expand(len(rest), -1)
        rest = rounds(similarity, rest, wanted, per_round, stop=max(wanted, similarity.shape[1] // 2))
    return rest if names is None else names.gather(1, rest)


def _by_rows(similarity: Tensor, rest: Tensor, wanted: int, per_round: int, stop: int) -> Tensor:
    """Do rounds until ``stop`` or fewer are left, reading the whole row of every odd token."""
    batch, count, _ = similarity.shape
    rows, first = similarity.reshape(batch * count, count), _offsets(rest, count)
    while rest.shape[1] > stop:
        even, odd = rest[:, 0::2], rest[:, 1::2]
        if odd.shape[1]:
            near = rows.index_select(0, (odd + first).flatten()).view(batch, -1, count)
            duplicated = near.amax(dim=1).gather(1, even)
        else:  # a single token is left, and it has nothing to resemble
            duplicated = torch.zeros_like(even, dtype=similarity.dtype)
        rest = _next(even, odd, duplicated, rest.shape[1] - wanted, per_round)
    return rest


def _by_neighbours(similarity: Tensor, rest: Tensor, wanted: int, per_round: int, stop: int) -> Tensor:
    """Do the same with each token's nearest neighbours; only where none of them is odd, a whole row is read."""
    batch, count, _ = similarity.shape
    rows, first = similarity.reshape(batch * count, count), _offsets(rest, count)
    near = similarity.topk(min(NEIGHBOURS + 1, count), dim=-1)  # a token itself is one of them
    values, places = near.values.flatten(0, 1), (near.indices + first[..., None]).flatten(0, 1)
    penalty = torch.empty(
        batch * count, dtype=similarity.dtype, device=rest.device
    )  # 0 for odd tokens; the others count as nowhere near
    while rest.shape[1] > stop:
        even, odd = rest[:, 0::2], rest[:, 1::2]
        penalty.fill_(_NOWHERE).index_fill_(0, (odd + first).flatten(), 0)
        who = (even + first).flatten()
        duplicated = (values.index_select(0, who) + _looked_up(penalty, places.index_select(0, who))).amax(dim=-1)
        lost = (duplicated < _NOWHERE / 2).nonzero()[:, 0]
        if len(lost):
            whole = rows.index_select(0, who[lost]) + penalty.view(batch, count)[lost // even.shape[1]]
            duplicated[lost] = whole.amax(dim=-1)
        rest = _next(even, odd, duplicated.view(even.shape), rest.shape[1] - wanted, per_round)
    return rest


def _among(similarity: Tensor, rest: Tensor) -> Tensor:
    """Return the similarities (B, R, R) among the tokens ``rest`` (B, R)."""
    batch, count, _ = similarity.shape
    rows = similarity.reshape(batch * count, count).index_select(0, (rest + _offsets(rest, count)).flatten())
    return rows.view(batch, -1, count).gather(2, rest[:, None].expand(-1, rest.shape[1], -1))


def _next(even: Tensor, odd: Tensor, duplicated: Tensor, excess: int, per_round: int) -> Tensor:
    drop = min(per_round, excess, even.shape[1])
    order = duplicated.sort(dim=-1, descending=True, stable=True).indices
    return torch.cat([even.gather(1, order[:, drop:]), odd], dim=1)


def _offsets(rest: Tensor, count: int) -> Tensor:
    return (torch.arange(len(rest), device=rest.device) * count)[:, None]


def without_duplicates_each(
    similarity: Tensor, order: Tensor, start: list[int], wanted: list[int], per_round: int
) -> Tensor:
    """Do as :func:`without_duplicates`, with lists and budgets of different length in one batch.

    Args:
        similarity: (B, N, N) cosine, float64 where it must not depend on the batch.
        order: (B, N) positions, in order.
        start: for each item, how many positions at the head of ``order`` are not in its list.
        wanted: for each item, how many stay.
        per_round: how many a round drops at most.

    Returns:
        (B, N) boolean mask of what stays.
    """
    batch, count = order.shape
    device = order.device
    place = torch.arange(count, device=device)
    rest = order.gather(1, (place + torch.tensor(start, device=device)[:, None]).clamp(max=count - 1))
    lengths = [count - head for head in start]
    rows, first = similarity.reshape(batch * count, count), _offsets(order, count)
    while any(length > want for length, want in zip(lengths, wanted, strict=True)):
        drops = [
            max(0, min(per_round, length - want, (length + 1) // 2))
            for length, want in zip(lengths, wanted, strict=True)
        ]
        length = torch.tensor(lengths, device=device)[:, None]
        even, odd = rest[:, 0::2], rest[:, 1::2]
        evens, odds = (length + 1) // 2, length // 2
        among = rows.index_select(0, (odd + first).flatten()).view(batch, -1, count)
        among = among.masked_fill((place[: odd.shape[1]] >= odds)[..., None], _NOWHERE)
        duplicated = (
            among.amax(dim=1).gather(1, even) if odd.shape[1] else torch.zeros_like(even, dtype=similarity.dtype)
        )
        duplicated = duplicated.masked_fill(place[: even.shape[1]] >= evens, float("-inf"))
        ranked = even.gather(1, duplicated.sort(dim=-1, descending=True, stable=True).indices)
        drop = torch.tensor(drops, device=device)[:, None]
        stay = evens - drop
        source = torch.where(place < stay, place + drop, even.shape[1] + place - stay).clamp(0, count - 1)
        rest = torch.cat([ranked, odd], dim=1).gather(1, source)
        lengths = [length - drop for length, drop in zip(lengths, drops, strict=True)]
    stays = place < torch.tensor(lengths, device=device)[:, None]
    return torch.zeros(batch, count, device=device).scatter_reduce_(1, rest, stays.float(), "amax").bool()


def _looked_up(values: Tensor, places: Tensor) -> Tensor:
    """Return ``values`` (N,) at ``places`` (R, k); ``index_select`` is faster than ``take`` on a CPU."""
    return values.index_select(0, places.flatten()).view(places.shape)
