"""How many rounds run before the host looks up again.

Many save the host's work between them; few let others in, and tokens out, sooner. So
a call takes about a fixed time, and is short while prompts are read between calls.
"""

import math
from dataclasses import dataclass

# Weight of the newest measurement.
_NEWEST = 0.2


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Bounds of rounds per call.

    Attributes:
      few: rounds while prompts are being read.
      most: rounds at any time.
      seconds: what a call takes otherwise, about.
    """

    few: int = 1
    most: int = 16
    seconds: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.few <= self.most or self.seconds <= 0:
            raise ValueError(f"expected 1 <= few <= most and seconds > 0, got {self}")


class Pacer:
    """Chooses rounds by what they took so far."""

    def __init__(self, pace: Pace):
        self.pace = pace
        self.round_seconds: float | None = None

    def rounds(self, *, reading: bool) -> int:
        """Rounds of the next call; `reading` says whether prompts are being read."""
        if reading or not self.round_seconds:
            return self.pace.few
        fit = math.ceil(self.pace.seconds / self.round_seconds)
        return min(max(fit, self.pace.few), self.pace.most)

    def note(self, rounds: int, seconds: float) -> None:
        """A call that only decoded took so long."""
        if not rounds:
            return
        each = seconds / rounds
        before = self.round_seconds
        self.round_seconds = (
            each if before is None else before + _NEWEST * (each - before)
        )
