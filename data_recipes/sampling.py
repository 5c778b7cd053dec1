"""Which frames of a video are looked at: the one place where these options are written."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class VideoSampling(BaseModel):
    """How many frames of a video are looked at, and which."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    frames: int = Field(
        8, ge=1, description="frames spread evenly over a video, its first and last among them; with fps the most"
    )
    fps: float | None = Field(None, gt=0, description="frames per second instead, from the first on")
    frame_rate: float | None = Field(
        None, gt=0, description="frames per second of folders of frames, which do not say it themselves"
    )

    def indices(self, total: int, rate: float | None) -> list[int]:
        """Return which of ``total`` frames are looked at.

        Of 10 frames at 5 a second, 4 frames are ``[0, 3, 6, 9]``, and 2 per second (with room for them) are
        ``[0, 2, 5, 7]``.

        Args:
            total: how many frames there are.
            rate: frames per second; None if nobody knows, and ``fps`` is not used then.
        """
        if self.fps is not None and rate is not None:
            step = max(rate / self.fps, 1.0)  # there are no frames between frames
            number = int((total - 1) / step) + 1
            if number <= self.frames:
                return [int(place * step) for place in range(number)]
        if self.frames == 1 or total == 1:
            return [0]
        number = min(self.frames, total)
        return [place * (total - 1) // (number - 1) for place in range(number)]
