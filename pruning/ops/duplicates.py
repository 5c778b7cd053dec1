"""VisPruner's removal of duplicates: rounds that drop the even tokens most similar to an odd one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHORT = 1024
"""Up to so many tokens a round scans whole rows; beyond, on a CPU, it looks at nearest neighbours first.

On one CPU thread whole rows take 6 ms and neighbours 12 ms for 576 tokens, 24 and 22 for 1024, 857 and 113 for 2880.
"""
NEIGHBOURS = 12
"""Nearest neighbours that are looked at first: 12 were fastest, 90 ms for 2880 tokens (4: 269, 8: 103, 24: 93)."""
_BELOW_ALL = -4.0  # below every cosine, also when a cosine is added to it


def without_duplicates(
    similarity: Float[Tensor, "B N N"],
    rest: Int[Tensor, "B R"],
    wanted: int,
    per_round: int,
) -> Int[Tensor, "B W"]:
    """Shrink ``rest`` round by round; the order of what stays decides the next round's split.

    A round splits the list into its even and its odd entries, sorts the even tokens by their largest similarity to any
    odd one, drops the first ``per_round`` of them, and goes on with the other even tokens, in that order, and then the
    odd ones. Of the list ``[7, 3, 5, 1]`` with 1 to drop the even entries are 7 and 5, the odd ones 3 and 1; if 5
    resembles 1 most, the list becomes ``[7, 3, 1]``.

    On a CPU the rounds run on float32 numbers, which are half as long to read, and a round in which two are equal
    goes back to float64: rounding keeps the order of what it tells apart, and the largest of rounded numbers is the
    rounded largest. So the answer is that of float64, and on a GPU, where looking for equals would wait, it is computed
    so.

    Args:
        similarity: (B, N, N) cosine, float64 where it must not depend on the batch.
        rest: (B, R) positions, in order.
        wanted: how many stay.
        per_round: how many a round drops at most.

    Returns:
        (B, wanted) positions.
    """
    exact = None
    if similarity.dtype == torch.float64 and not similarity.is_cuda:
        exact = similarity
        similarity = similarity.float()
    one_after_another = _by_neighbours
    if similarity.is_cuda or similarity.shape[1] <= SHORT:
        one_after_another = _by_rows
    batch, count, _ = similarity.shape
    positions = torch.arange(count, device=rest.device).expand(batch, -1)  # of the tokens that the matrix holds
    while rest.shape[1] > wanted:
        # With half of its tokens dropped the matrix is cut to the others, so that a round reads shorter rows: 857 ms
        # instead of 966 for 2880 tokens by rows. Each cut is a copy, so there are no more than log2(N) of them.
        if 2 * rest.shape[1] <= similarity.shape[1]:
            similarity = _among(similarity, rest)
            positions = positions.gather(1, rest)
            rest = torch.arange(rest.shape[1], device=rest.device).expand(batch, -1)
        stop = max(wanted, similarity.shape[1] // 2)
        rest = one_after_another(similarity, rest, wanted, per_round, stop, exact, positions)
    return positions.gather(1, rest)


def _by_rows(
    similarity: Float[Tensor, "B N N"],
    rest: Int[Tensor, "B R"],
    wanted: int,
    per_round: int,
    stop: int,
    exact: Float[Tensor, "B N0 N0"] | None,
    positions: Int[Tensor, "B N"],
) -> Int[Tensor, "B S"]:
    """Do rounds until ``stop`` or fewer are left, reading the whole row of every odd token.

    Args:
        similarity: (B, N, N).
        rest: (B, R) positions in it.
        wanted: how many stay in the end.
        per_round: how many a round drops at most.
        stop: how many may be left.
        exact: (B, N0, N0) what ``similarity`` was rounded from, before it was cut; None if it was not rounded.
        positions: (B, N) where its tokens stand there.
    """
    batch, count, _ = similarity.shape
    rows = similarity.reshape(batch * count, count)
    first_row = _first_rows(batch, count, rest.device)
    while rest.shape[1] > stop:
        even = rest[:, 0::2]
        odd = rest[:, 1::2]
        if odd.shape[1]:
            # Whole rows in one copy, and the even columns picked from their maximum: less to look up than every pair.
            odd_rows = (odd + first_row).flatten()
            of_odd = rows.index_select(0, odd_rows).view(batch, -1, count)  # (B, odd, N)
            duplicated = of_odd.amax(dim=1).gather(1, even)  # (B, even)
        else:  # a single token is left, and it has nothing to resemble
            duplicated = torch.zeros_like(even, dtype=similarity.dtype)
        excess = rest.shape[1] - wanted
        order = _falling(duplicated, even, odd, exact, positions)
        rest = _after_round(even, odd, order, excess, per_round)
    return rest


def _by_neighbours(
    similarity: Float[Tensor, "B N N"],
    rest: Int[Tensor, "B R"],
    wanted: int,
    per_round: int,
    stop: int,
    exact: Float[Tensor, "B N0 N0"] | None,
    positions: Int[Tensor, "B N"],
) -> Int[Tensor, "B S"]:
    """Do the same with each token's nearest neighbours; only where none of them is odd, a whole row is read.

    The nearest odd neighbour is the nearest odd token, so the answer is that of :func:`_by_rows`.
    """
    batch, count, _ = similarity.shape
    rows = similarity.reshape(batch * count, count)
    first_row = _first_rows(batch, count, rest.device)
    near = similarity.topk(min(NEIGHBOURS + 1, count), dim=-1)  # one more, for a token is its own neighbour
    near_values = near.values.flatten(0, 1)  # (B * N, k)
    near_rows = (near.indices + first_row[..., None]).flatten(0, 1)  # (B * N, k), counted through the batch
    # 0 for odd tokens and below every cosine for the others: one addition then leaves the odd neighbours alone.
    penalty = torch.empty(batch * count, dtype=similarity.dtype, device=rest.device)
    while rest.shape[1] > stop:
        even = rest[:, 0::2]
        odd = rest[:, 1::2]
        penalty.fill_(_BELOW_ALL).index_fill_(0, (odd + first_row).flatten(), 0)
        even_rows = (even + first_row).flatten()
        neighbour_penalty = _looked_up(penalty, near_rows.index_select(0, even_rows))
        duplicated = (near_values.index_select(0, even_rows) + neighbour_penalty).amax(dim=-1)
        undecided = (duplicated < _BELOW_ALL / 2).nonzero()[:, 0]  # no neighbour is odd
        if len(undecided):
            item = undecided // even.shape[1]
            whole = rows.index_select(0, even_rows[undecided])  # (undecided, N)
            whole = whole + penalty.view(batch, count)[item]
            duplicated[undecided] = whole.amax(dim=-1)
        excess = rest.shape[1] - wanted
        order = _falling(duplicated.view(even.shape), even, odd, exact, positions)
        rest = _after_round(even, odd, order, excess, per_round)
    return rest


def _among(
    similarity: Float[Tensor, "B N N"],
    rest: Int[Tensor, "B R"],
) -> Float[Tensor, "B R R"]:
    """Return the similarities (B, R, R) among the tokens ``rest`` (B, R)."""
    batch, count, _ = similarity.shape
    chosen = (rest + _first_rows(batch, count, rest.device)).flatten()
    rows = similarity.reshape(batch * count, count).index_select(0, chosen)
    rows = rows.view(batch, -1, count)  # (B, R, N)
    columns = rest[:, None].expand(-1, rest.shape[1], -1)
    return rows.gather(2, columns)


def _falling(
    duplicated: Float[Tensor, "B even"],
    even: Int[Tensor, "B even"],
    odd: Int[Tensor, "B odd"],
    exact: Float[Tensor, "B N0 N0"] | None,
    positions: Int[Tensor, "B N"],
) -> Int[Tensor, "B even"]:
    """Return the order (B, even) of the even tokens by falling similarity, from exact numbers if rounded ones tie."""
    values, order = duplicated.sort(dim=-1, descending=True, stable=True)
    if exact is None or not odd.shape[1]:
        return order
    equal = values[:, 1:] == values[:, :-1]
    if not bool(equal.any()):
        return order
    # Only those that tie are looked up: of 2880 tokens a few do in every eighth round.
    ties = F.pad(equal, (0, 1)) | F.pad(equal, (1, 0))  # (B, even), by falling similarity
    item, place = ties.nonzero().unbind(dim=1)
    index = order[item, place]
    of_tied = exact[item, positions.gather(1, even)[item, index]]  # (ties, N0)
    is_odd = torch.zeros(exact.shape[:2], dtype=torch.bool, device=odd.device)
    is_odd.scatter_(1, positions.gather(1, odd), True)
    exactly = duplicated.to(exact.dtype)
    exactly[item, index] = of_tied.masked_fill(~is_odd[item], _BELOW_ALL).amax(dim=-1)
    # Exact numbers stay within half a step of the rounded ones, and so on their side of all that do not tie.
    return exactly.sort(dim=-1, descending=True, stable=True).indices


def _after_round(
    even: Int[Tensor, "B even"],
    odd: Int[Tensor, "B odd"],
    order: Int[Tensor, "B even"],
    excess: int,
    most: int,
) -> Int[Tensor, "B left"]:
    """Return the list after a round: the even tokens in ``order`` without the first, then the odd ones."""
    drop = min(most, excess, even.shape[1])
    staying = even.gather(1, order[:, drop:])
    return torch.cat([staying, odd], dim=1)


def _first_rows(batch: int, count: int, device: torch.device) -> Int[Tensor, "B 1"]:
    """Return the number (B, 1) of each item's first row when all rows of a batch are counted through."""
    return (torch.arange(batch, device=device) * count)[:, None]


def without_duplicates_each(
    similarity: Float[Tensor, "B N N"],
    order: Int[Tensor, "B N"],
    start: list[int],
    wanted: list[int],
    per_round: int,
) -> Bool[Tensor, "B N"]:
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
    index = torch.arange(count, device=device)
    # Every list begins at column 0; what lies behind its length is padding that is masked wherever it could matter.
    from_start = index + torch.tensor(start, device=device)[:, None]
    rest = order.gather(1, from_start.clamp(max=count - 1))  # (B, N)
    lengths = [count - head for head in start]
    rows = similarity.reshape(batch * count, count)
    first_row = _first_rows(batch, count, device)
    while True:
        # Lengths and budgets are known on the host, so that no round waits for the device.
        drops = _drops(lengths, wanted, per_round)
        if not any(drops):
            break
        length = torch.tensor(lengths, device=device)[:, None]
        drop = torch.tensor(drops, device=device)[:, None]
        even = rest[:, 0::2]
        odd = rest[:, 1::2]
        # How many of either are no padding, (B, 1).
        real_even = (length + 1) // 2
        real_odd = length // 2
        if odd.shape[1]:
            odd_rows = (odd + first_row).flatten()
            of_odd = rows.index_select(0, odd_rows).view(batch, -1, count)  # (B, odd, N)
            is_padding = index[: odd.shape[1]] >= real_odd
            of_odd = of_odd.masked_fill(is_padding[..., None], _BELOW_ALL)
            duplicated = of_odd.amax(dim=1).gather(1, even)  # (B, even)
        else:
            duplicated = torch.zeros_like(even, dtype=similarity.dtype)
        # Padding goes to the end of the order, behind every real token.
        is_padding = index[: even.shape[1]] >= real_even
        duplicated = duplicated.masked_fill(is_padding, float("-inf"))
        by_similarity = even.gather(1, duplicated.sort(dim=-1, descending=True, stable=True).indices)
        # The new list is read out of [even by similarity, odd]: from behind the dropped to the last real even token,
        # then from the first odd one.
        left = real_even - drop
        from_even = index + drop
        from_odd = even.shape[1] + index - left
        source = torch.where(index < left, from_even, from_odd).clamp(0, count - 1)
        rest = torch.cat([by_similarity, odd], dim=1).gather(1, source)
        lengths = [length - drop for length, drop in zip(lengths, drops, strict=True)]
    stays = index < torch.tensor(lengths, device=device)[:, None]
    # Padding may repeat a position that stays; the maximum lets it stay.
    mask = torch.zeros(batch, count, device=device)
    mask = mask.scatter_reduce_(1, rest, stays.float(), "amax")
    return mask.bool()


def _drops(lengths: list[int], wanted: list[int], per_round: int) -> list[int]:
    """Return how many tokens a round drops of each list: at most its even ones, and none below the budget."""
    drops = []
    for length, want in zip(lengths, wanted, strict=True):
        even = (length + 1) // 2
        drops.append(max(0, min(per_round, length - want, even)))
    return drops


def _looked_up(
    values: Float[Tensor, " V"],
    indices: Int[Tensor, "R k"],
) -> Float[Tensor, "R k"]:
    """Return ``values`` (V,) at ``indices`` (R, k)."""
    # On one CPU thread index_select takes 0.01 ms where take has 0.03 and indexing 0.04 (1440 x 13 of 2880).
    flat = values.index_select(0, indices.flatten())
    return flat.view(indices.shape)
