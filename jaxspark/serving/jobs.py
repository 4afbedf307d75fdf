"""An output that the engine works on, from its arrival to its end."""

from dataclasses import dataclass, field
from typing import Literal

from jaxspark.generation.completion import FinishReason
from jaxspark.generation.request import CheckedRequest
from jaxspark.serving.demands import Demand
from jaxspark.serving.stream import Stream


@dataclass(eq=False, kw_only=True)
class Job:
    """One demand, and what became of it so far. Times are `time.monotonic`'s.

    Attributes:
      demand: what is wanted.
      request: the same, checked; its index is the job's.
      client: who asks, for fairness.
      stream: who is told.
      arrived: when it came.
      expires: when it is given up; None never.
      admitted: when it got a slot.
      began: when its first token came.
      latest: when its latest token came.
      tokens: how many have come.
      because: why it is being cancelled.
    """

    demand: Demand
    request: CheckedRequest
    client: str
    stream: Stream = field(repr=False)
    arrived: float
    expires: float | None = None
    admitted: float | None = None
    began: float | None = None
    latest: float | None = None
    tokens: int = 0
    because: FinishReason | Literal["late"] | None = None

    @property
    def prompt(self) -> int:
        """Tokens of its prompt."""
        return len(self.request.ids)

    def is_late(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires
