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

Prompts count for repetition alone. What arrays a state has for it, and so what is
compiled, is told by `AdjustmentLimits`. `adjusted_logits` does the arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxspark.settings import standard_settings

_BITS = 32


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
        left = set(range(vocab) if self.allowed_ids is None else self.allowed_ids)
        left -= {word[-1] for word in self.bad_words}
        if self.min_tokens:
            left -= set(stop_ids)
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalties:
    """Penalties of B slots (or of R rows), see `Adjustment`."""

    presence_B: Float[Array, " B"]
    frequency_B: Float[Array, " B"]
    repetition_B: Float[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """Adjustments of B slots.

    Attributes:
      asks_B: slots that want any.
      prompt_lengths_B: tokens before the output.
      min_tokens_B: see `Adjustment`; None is not compiled.
      penalties: likewise.
      bias_ids_BX: biased tokens, padded with -1.
      bias_BX: what is added to them.
      allowed_BU: bits of the tokens that may be sampled, 32 in a word, the first
        token's bit the lowest; no words are not compiled.
      bad_words_BWX: bad words, padded with -1 in front.
      vocab: tokens that there are.
    """

    asks_B: Bool[Array, " B"]
    prompt_lengths_B: Int[Array, " B"]
    min_tokens_B: Int[Array, " B"] | None
    penalties: Penalties | None
    bias_ids_BX: Int[Array, "B X"]
    bias_BX: Float[Array, "B X"]
    allowed_BU: UInt[Array, "B U"]
    bad_words_BWX: Int[Array, "B W X"]
    vocab: int = field(metadata={"static": True})

    @classmethod
    @standard_settings()
    def of(
        cls,
        adjustments: Sequence[Adjustment],
        limits: AdjustmentLimits,
        *,
        vocab: int,
        prompt_lengths: Sequence[int],
    ) -> "Adjustments":
        """Arrays for one adjustment per slot.

        Raises:
          ValueError: one is more than the limits have room for.
        """

        def column(name: str, dtype: Any = np.float32) -> Array:
            return jnp.array([getattr(each, name) for each in adjustments], dtype)

        slots, X = len(adjustments), limits.biases
        ids_BX, bias_BX = np.full((slots, X), -1), np.zeros((slots, X))
        shape = (slots, limits.bad_words, limits.bad_word_tokens)
        words_BWX = np.full(shape, -1)
        for slot, each in enumerate(adjustments):
            limits.check(each)
            ids_BX[slot, : len(each.logit_bias)] = list(each.logit_bias)
            bias_BX[slot, : len(each.logit_bias)] = list(each.logit_bias.values())
            for place, word in enumerate(each.long_bad_words):
                words_BWX[slot, place, -len(word) :] = word
        penalties = Penalties(
            column("presence_penalty"),
            column("frequency_penalty"),
            column("repetition_penalty"),
        )
        allowed = [_allowed(each, vocab, limits) for each in adjustments]
        return cls(
            asks_B=column("asks", bool),
            prompt_lengths_B=jnp.array(prompt_lengths, jnp.int32),
            min_tokens_B=column("min_tokens", np.int32) if limits.min_tokens else None,
            penalties=penalties if limits.penalties else None,
            bias_ids_BX=jnp.array(ids_BX, jnp.int32),
            bias_BX=jnp.array(bias_BX, jnp.float32),
            allowed_BU=jnp.array(np.stack(allowed)),
            bad_words_BWX=jnp.array(words_BWX, jnp.int32),
            vocab=vocab,
        )

    @classmethod
    def none(
        cls, slots: int, limits: AdjustmentLimits, vocab: int
    ) -> "Adjustments | None":
        """Of slots that want nothing; None where nothing is compiled."""
        if not limits.anything:
            return None
        plain = [Adjustment()] * slots
        return cls.of(plain, limits, vocab=vocab, prompt_lengths=[0] * slots)

    @property
    def limits(self) -> AdjustmentLimits:
        """What the arrays have room for."""
        return AdjustmentLimits(
            penalties=self.penalties is not None,
            min_tokens=self.min_tokens_B is not None,
            exclusions=self.allowed_BU.shape[1] > 0,
            biases=self.bias_ids_BX.shape[1],
            bad_words=self.bad_words_BWX.shape[1],
            bad_word_tokens=self.bad_words_BWX.shape[2],
        )


def _allowed(
    adjustment: Adjustment, vocab: int, limits: AdjustmentLimits
) -> np.ndarray:
    """Bits of the tokens that may be sampled, [U]."""
    if not limits.exclusions:
        return np.zeros((0,), np.uint32)
    allowed = adjustment.allowed_ids
    may_V = np.full(-(-vocab // _BITS) * _BITS, allowed is None)
    may_V[list(allowed or ())] = True
    may_V[[word[0] for word in adjustment.bad_words if len(word) == 1]] = False
    return np.packbits(may_V, bitorder="little").view("<u4").astype(np.uint32)


def unpacked(words_BU: UInt[Array, "B U"], vocab: int) -> Bool[Array, "B V"]:
    """Bits as truth values."""
    bits_BUX = (words_BU[..., None] >> jnp.arange(_BITS, dtype=jnp.uint32)) & 1
    return bits_BUX.reshape(len(words_BU), -1)[:, :vocab] > 0
