"""How many visual tokens to keep: a number, a ratio or a percentage; and what it counts for in a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunetune.pruning.errors import PruningError

Budget = int | float | str


@dataclass(frozen=True)
class BudgetRule:
    """A budget, and how it is read.

    Attributes:
        keep: the budget itself.
        small_images: what happens where there are fewer tokens than it asks for: "stop" or "keep_all".
        unit: what it counts for in a video: each "frame", the "clip", or each "second".
        seconds: how long each video is, in reading order; empty where that is unknown.
    """

    keep: Budget
    small_images: str = "stop"
    unit: str = "frame"
    seconds: Sequence[float] = ()

    def of_item(self, count: int) -> int:
        """Return the budget of an item, image or frame, with ``count`` tokens."""
        # A share of the tokens always fits; only a number can exceed them.
        if isinstance(self.keep, int) and self.keep > count and self.small_images == "keep_all":
            return count
        return resolve_budget(self.keep, count)

    def of_clip(self, clip: int, frames: int, per_frame: int) -> int:
        """Return the budget of the whole of video ``clip``, with ``frames`` times ``per_frame`` tokens.

        Of 4 frames with 10 tokens that last 2 seconds, 6 is 24 with "frame", 6 with "clip" and 12 with "second".

        Raises:
            PruningError: if the budget does not fit, or counts for seconds that are unknown.
        """
        if self.unit == "frame":
            return frames * self.of_item(per_frame)
        count = frames * per_frame
        # A share of a second is the same share of the clip.
        if self.unit == "clip" or not isinstance(self.keep, int):
            return self.of_item(count)
        if not self.seconds:
            raise PruningError(
                "video_budget: second needs to know how long a video is: pass `video_seconds`, one number per video "
                "(a Formatter does), or set pruning.video_budget to frame or clip"
            )
        wanted = max(1, round(self.keep * self.seconds[clip]))
        if wanted <= count:
            return wanted
        if self.small_images == "keep_all":
            return count
        raise PruningError(
            f"keep={self.keep} a second asks for {wanted} visual tokens in {self.seconds[clip]:g} s, but the video has "
            f"only {count}; choose less, or set pruning.small_images to keep_all"
        )

    def of_frames(self, clip: int, frames: int, per_frame: int) -> list[int]:
        """Return the budget of each frame of video ``clip``; those of the whole video are dealt out evenly over time.

        Of 4 frames with 10 tokens, 6 for the clip is ``[1, 2, 1, 2]``.

        Raises:
            PruningError: as of :meth:`of_clip`, or if there is less than one token for a frame.
        """
        total = self.of_clip(clip, frames, per_frame)
        if total < frames:
            raise PruningError(
                f"keep={self.keep!r} is {total} visual tokens for a video of {frames} frames, and a method that "
                "chooses in each frame keeps at least one of each; choose more, or set pruning.scope to image"
            )
        return [(total * (frame + 1)) // frames - (total * frame) // frames for frame in range(frames)]


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
    share = share_of(keep)
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
    share = share_of(keep)
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


def keeps_all(keep: Budget) -> bool:
    """Return whether a budget is all tokens of any item: ``"100%"`` and ``1.0`` are, and ``1`` is one token."""
    return share_of(keep) == 1.0


def share_of(keep: Budget) -> float | None:
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
