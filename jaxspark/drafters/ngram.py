"""Prompt lookup: continue the newest earlier occurrence of the last few tokens.

No training and no model (Saxena 2023, "prompt lookup decoding"), on the device: every
position of the slot's own text is compared with its last n tokens at once. Of the
positions where the longest suffix matches, the newest is followed. Where the copied
text runs into the anchor it continues with what was just copied, so a loop of any
period is drafted in full.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.drafters.base import Proposal, WithoutContext

# The rate at which copies are believed to hold, by match length; longer ones alike.
BELIEVED_RATES = (0.0, 0.35, 0.5, 0.65, 0.8)


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class NgramDrafter(WithoutContext):
    """Copies what followed the longest matching suffix of `longest`..`shortest` tokens.

    Attributes:
      block_length: most tokens proposed at once.
      longest: longest suffix compared; long ones tell a copy from a coincidence.
      shortest: shortest suffix that counts as a match.
    """

    block_length: int = 8
    longest: int = 8
    shortest: int = 2
    may_skip: ClassVar[bool] = True

    def __post_init__(self):
        if self.block_length < 1:
            raise ValueError(
                f"block_length must be at least 1, got {self.block_length}"
            )
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                "n-gram lengths must satisfy 1 <= shortest <= longest, got "
                f"shortest={self.shortest}, longest={self.longest}"
            )

    def propose(self, target, cache, context, sampler, block_length):
        """The continuation of the best match; proposes nothing where none is found."""
        tokens_BG, match_B = self.find(
            context.tokens_BS, context.lengths_B, block_length
        )
        return Proposal(
            tokens_BG=tokens_BG,
            lengths_B=jnp.where(match_B >= self.shortest, block_length, 0),
            confidence_BG=jnp.broadcast_to(
                _believed(match_B)[:, None], tokens_BG.shape
            ),
            certainty_BG=jnp.zeros(tokens_BG.shape, jnp.float32),
        ), cache

    def find(
        self,
        tokens_BS: Int[Array, "B S"],
        lengths_B: Int[Array, " B"],
        block_length: int,
    ) -> tuple[Int[Array, "B G"], Int[Array, " B"]]:
        """What followed the best match of each slot, and how many tokens matched."""
        match_length_BS = self._matches(tokens_BS, lengths_B)
        S = tokens_BS.shape[1]
        # Longest match first, then the newest: one integer orders both.
        score_BS = match_length_BS * S + jnp.arange(S)
        best_B = jnp.argmax(score_BS, axis=1)
        period_B = jnp.maximum(lengths_B - 1 - best_B, 1)
        offset_BG = jnp.arange(block_length) % period_B[:, None]
        place_BG = jnp.minimum(best_B[:, None] + 1 + offset_BG, S - 1)
        tokens_BG = jnp.take_along_axis(tokens_BS, place_BG, axis=1)
        return tokens_BG, jnp.max(match_length_BS, axis=1)

    def _matches(self, tokens_BS, lengths_B):
        """How many tokens ending at s equal the slot's last ones, 0..longest [B, S]."""
        S = tokens_BS.shape[1]
        position_S = jnp.arange(S)
        # A match ends before the anchor, or there is nothing to copy.
        running_BS = position_S < lengths_B[:, None] - 1
        length_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
        for n in range(self.longest):
            place_B = jnp.maximum(lengths_B - 1 - n, 0)
            last_B = jnp.take_along_axis(tokens_BS, place_B[:, None], axis=1)
            shifted_BS = jnp.roll(tokens_BS, n, axis=1)
            running_BS &= (shifted_BS == last_B) & (position_S >= n)
            length_BS += running_BS
        return length_BS


def _believed(match_B: Int[Array, " B"]) -> Float[Array, " B"]:
    """The logit of acceptance that a match of so many tokens promises."""
    rates_M = jnp.array(BELIEVED_RATES, jnp.float32)
    longest = len(BELIEVED_RATES) - 1
    return jax.scipy.special.logit(rates_M[jnp.clip(match_B, 1, longest)])
