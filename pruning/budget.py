"""How many visual tokens to keep: a number, a ratio or a percentage."""

from __future__ import annotations

from prunetune.pruning.errors import PruningError

Budget = int | float | str


def check_budget(keep: Budget) -> Budget:
    """Return ``keep`` if it reads as a budget: ``64``, ``0.111`` (share of all tokens) or ``"50%"``.

    Raises:
        PruningError: for anything else, with the three accepted forms.
    """
    # YAML's `keep: true` is a bool, which Python counts as the number 1.
    if isinstance(keep, int) and not isinstance(keep, bool):
        if keep < 1:
            raise PruningError(f"keep={keep}: a budget keeps at least 1 visual token")
        return keep
    share = _share(keep)
    if share is None or not 0 < share <= 1:
        raise PruningError(
            f"keep={keep!r} is no budget; write a number of tokens (64), a ratio in (0, 1] (0.111) "
            'or a percentage in (0, 100] ("11.1%")'
        )
    return keep


def resolve_budget(keep: Budget, count: int) -> int:
    """Return the number of tokens that ``keep`` means for an item with ``count`` visual tokens.

    Of 576 tokens, ``64`` is 64, ``0.111`` is 64 and ``"50%"`` is 288. Ratios round half to even, as DivPrune's
    published code does.

    Raises:
        PruningError: if the budget is not readable, rounds to zero or asks for more tokens than there are.
    """
    check_budget(keep)
    share = _share(keep)
    wanted = int(keep) if share is None else round(share * count)
    if wanted < 1:
        raise PruningError(
            f"keep={keep!r} of {count} visual tokens rounds to 0; the smallest budget is {1 / count:.4f}"
        )
    if wanted > count:
        raise PruningError(
            f"keep={keep!r} asks for {wanted} visual tokens, but each item has only {count}; choose at most {count}"
        )
    return wanted


def _share(keep: Budget) -> float | None:
    """Return a ratio or a percentage as a share, or None for a number of tokens and for what can't be read."""
    if isinstance(keep, str):
        return _percentage(keep)
    return keep if isinstance(keep, float) else None


def _percentage(text: str) -> float | None:
    """Return ``"50%"`` as 0.5, or None if the text is no percentage."""
    number, sign, rest = text.strip().partition("%")
    try:
        return float(number) / 100 if sign and not rest else None
    except ValueError:
        return None
