"""What a request does to logits before temperature and filters: OpenAI's and vLLM's.

Of the logits z of the token that comes next, with n(v) the times that token v is in the
output so far, in vLLM's order (its `Sampler`, steps 3 to 6):

    allowed ids      z_v = -inf for all others
    bad words        z_v = -inf for the last token of a sequence whose others are the
                     newest of the output, in order
    min_tokens       z_v = -inf for stop ids while the output is shorter
    logit bias       z_v += bias_v
    repetition       z_v = z_v / r if z_v > 0 else z_v * r, where v is in prompt or
                     output (Keskar et al. 2019, "CTRL", section 4.1)
    frequency        z_v -= f n(v)
    presence         z_v -= p if n(v) > 0

Prompts count for repetition alone. `AdjustmentLimits` say what a decode loop is
compiled for, `adjustment_arrays` has the arrays of a state, and `adjusted_logits` does
the arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What one request wants done to its logits; by default nothing.

    Attributes:
      presence_penalty: subtracted from tokens that are in the output.
      frequency_penalty: subtracted for each time that they are.
      repetition_penalty: positive; divides positive logits of tokens that are in prompt
        or output, and multiplies others.
      logit_bias: added, by token.
      allowed_ids: the only tokens that may be sampled; None allows all.
      bad_words: token sequences that are not to be in the output.
      min_tokens: output tokens before which no stop id is sampled.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_ids: Sequence[int] | None = None
    bad_words: Sequence[Sequence[int]] = ()
    min_tokens: int = 0

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there count."""
        penalties = self.presence_penalty, self.frequency_penalty
        return any(penalties) or self.repetition_penalty != 1

    @property
    def long_bad_words(self) -> list[Sequence[int]]:
        """Those of several tokens; others are tokens that are never allowed."""
        return [word for word in self.bad_words if len(word) > 1]

    @property
    def excludes(self) -> bool:
        """Whether some tokens are never allowed."""
        banned = len(self.long_bad_words) < len(self.bad_words)
        return banned or self.allowed_ids is not None

    @property
    def asks(self) -> bool:
        """Whether it wants anything."""
        wanted = self.penalizes, self.logit_bias, self.bad_words, self.min_tokens
        return any(wanted) or self.allowed_ids is not None

    def check(self, vocab: int, stop_ids: Sequence[int]) -> None:
        """Raises `ValueError` if some output could have no next token."""
        barred = {word[-1] for word in self.bad_words}
        if self.min_tokens:
            barred |= set(stop_ids)
        allowed = self.allowed_ids
        left = vocab if allowed is None else len(set(allowed))
        left -= len(barred if allowed is None else barred.intersection(allowed))
        if not left:
            raise ValueError(
                "allowed_ids, bad_words and min_tokens together leave no token that "
                "may always be sampled; allow one that is neither the last of a bad "
                "word nor, with min_tokens, a stop id"
            )


@dataclass(frozen=True, kw_only=True)
class AdjustmentLimits:
    """What a decode loop is compiled for; by default nothing.

    Attributes:
      penalties: whether requests may ask for penalties.
      min_tokens: whether they may for least lengths.
      exclusions: whether they may for allowed ids, and bad words of one token.
      biases: most tokens that one may bias.
      bad_words: most bad words of several tokens that it may have.
      bad_word_tokens: most tokens of these.
    """

    penalties: bool = False
    min_tokens: bool = False
    exclusions: bool = False
    biases: int = 0
    bad_words: int = 0
    bad_word_tokens: int = 0

    @classmethod
    def serving(cls) -> "AdjustmentLimits":
        """For requests that nobody knows yet: all of it, 300 biases as OpenAI has."""
        return cls(
            penalties=True,
            min_tokens=True,
            exclusions=True,
            biases=300,
            bad_words=64,
            bad_word_tokens=16,
        )

    @classmethod
    def of(cls, adjustments: Sequence[Adjustment]) -> "AdjustmentLimits":
        """The least that does for these, sizes in powers of two to share programs."""

        def size(lengths: Sequence[int]) -> int:
            most = max(lengths, default=0)
            return max(4, 1 << (most - 1).bit_length()) if most else 0

        words = [word for each in adjustments for word in each.long_bad_words]
        return cls(
            penalties=any(each.penalizes for each in adjustments),
            min_tokens=any(each.min_tokens > 0 for each in adjustments),
            exclusions=any(each.excludes for each in adjustments),
            biases=size([len(each.logit_bias) for each in adjustments]),
            bad_words=size([len(each.long_bad_words) for each in adjustments]),
            bad_word_tokens=size([len(word) for word in words]),
        )

    @property
    def anything(self) -> bool:
        """Whether there is anything to compile."""
        return self != AdjustmentLimits()

    def check(self, adjustment: Adjustment) -> None:
        """Raises `ValueError` if it is more than the loop is compiled for."""
        needed = AdjustmentLimits(
            penalties=adjustment.penalizes,
            min_tokens=adjustment.min_tokens > 0,
            exclusions=adjustment.excludes,
            biases=len(adjustment.logit_bias),
            bad_words=len(adjustment.long_bad_words),
            bad_word_tokens=max(map(len, adjustment.long_bad_words), default=0),
        )
        for each in fields(self):
            most, given = getattr(self, each.name), getattr(needed, each.name)
            what = _WORDS[each.name]
            if given > most and isinstance(most, bool):
                raise ValueError(f"{what} are asked for, this batch was made without")
            if given > most:
                raise ValueError(f"{given} {what}, this batch has room for {most}")


_WORDS = {
    "penalties": "penalties",
    "min_tokens": "min_tokens",
    "exclusions": "allowed_ids or bad_words",
    "biases": "tokens of logit_bias",
    "bad_words": "bad_words of several tokens",
    "bad_word_tokens": "tokens of one of bad_words",
}
