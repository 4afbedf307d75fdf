"""Adjustments of a state's slots, as arrays; what is not compiled has no array."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxspark.decoding.adjustments import Adjustment, AdjustmentLimits
from jaxspark.settings import standard_settings

_BITS = 32


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
