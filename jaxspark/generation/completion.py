"""What a request became."""

from dataclasses import dataclass, field
from typing import Literal

# Tokens and their log-probabilities, best first.
Likely = list[tuple[int, float]]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class PromptLogProb:
    """What the model thinks of a prompt's token, given those before it.

    Attributes:
      log_prob: its log-probability.
      rank: its place in the order of likelihood, from 1.
      top: the most likely tokens there.
    """

    log_prob: float
    rank: int
    top: Likely


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one request became.

    Attributes:
      tokens: output token ids; a stop token that ended it is the last one.
      text: decoded output without the stop token; None without a tokenizer.
      finish_reason: "stop", "length", "cancelled", or "error" for a request that could
        not be served.
      error: what was wrong with it; None otherwise.
      log_probs: the model's log-probability of each output token (before adjustments,
        temperature and filters); None unless asked for.
      top_log_probs: the most likely tokens beside each output token, by the same
        distribution; None unless asked for.
      prompt_log_probs: of the prompt's tokens, the first of which has none; None unless
        asked for. A request that was cancelled early has those that were read.
      rounds: target passes it took.
      drafted: rounds that drafted.
      verified: drafts that were verified in them.
      reached: per draft position, rounds in which it was verified with all earlier
        drafts accepted.
      accepted: per draft position, rounds in which it was accepted; drafts accepted
        behind a stop token count here, though they are not emitted.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    error: str | None = None
    log_probs: list[float] | None = None
    top_log_probs: list[Likely] | None = None
    prompt_log_probs: list[PromptLogProb | None] | None = None
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Mean tokens per round, the target's own token included."""
        return len(self.tokens) / max(self.rounds, 1)
