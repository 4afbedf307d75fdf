"""What the engine tells of its outputs, in order for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxspark.generation.completion import FinishReason


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A token, or one of the prompt's.

    Attributes:
      token: its id.
      log_prob: the model's log-probability of it, if asked for.
      top: the most likely tokens and theirs, best first, if asked for.
      rank: of a prompt's token, its place in the order of likelihood, from 1.
      accepted: whether it is a draft that was accepted.
    """

    token: int
    log_prob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    rank: int | None = None
    accepted: bool = False


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A prompt was read.

    Attributes:
      choice: of which output.
      cached: its tokens that were there already.
      prompt: its tokens with log-probabilities, if asked for; the first has none.
    """

    choice: int
    cached: int = 0
    prompt: Sequence[Sampled] | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """New tokens of an output, as many as a round brought.

    Attributes:
      choice: of which output.
      tokens: in order.
    """

    choice: int
    tokens: Sequence[Sampled]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """No more tokens come.

    Attributes:
      choice: of which output.
      reason: why.
      error: what was wrong, for the reason "error".
      status: HTTP's word for it.
    """

    choice: int
    reason: FinishReason
    error: str | None = None
    status: int = 500


EngineEvent = Prefilled | Tokens | Ended
