"""Masks of grammars in a round: of the rows that are verified, and of the first draft.

A host works them out between the two halves of a round (`round.draft`, `round.verify`).
They come after all else that a request does to its logits. A grammar is the stronger:
where it and what else excludes tokens (allowed ids, bad words, min_tokens) leave none,
the logits are the model's own under the grammar alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxspark.decoding.adjusted_logits import Adjuster
from jaxspark.decoding.adjustment_arrays import unpacked
from jaxspark.models import FlatTokens
from jaxspark.parallel import vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MaskedAdjuster:
    """Adjusts logits of one round as `Adjuster` does, then masks them.

    Attributes:
      adjuster: what else is done to them; None is nothing.
      masks_BQU: bits of the tokens that may come behind the anchor, and behind each
        draft. The draft half of a round has only the first row.
      anchors_B: positions of the anchors.
    """

    adjuster: Adjuster | None
    masks_BQU: UInt[Array, "B Q U"]
    anchors_B: Int[Array, " B"]

    def rows(
        self,
        logits_TV: Float[Array, "T V"],
        tokens: FlatTokens,
        drafts_BG: Int[Array, "B G"],
    ) -> Float[Array, "T V"]:
        """Logits of verified rows, anchors and drafts."""
        z_TV = logits_TV
        if self.adjuster is not None:
            z_TV = self.adjuster.rows(logits_TV, tokens, drafts_BG)
        row_T = tokens.positions_T - self.anchors_B[tokens.slots_T]
        words_TU = self.masks_BQU.at[tokens.slots_T, row_T].get(mode="clip")
        may_TV = vocabulary.part(unpacked(words_TU, tokens_of(logits_TV)))
        return masked(z_TV, logits_TV, may_TV)

    def drafts(
        self,
        logits_BW: Float[Array, "B W"],
        j: Int[Array, ""],
        ids_W: Int[Array, " W"] | None,
    ) -> Float[Array, "B W"]:
        """Logits that draft j of every slot is drawn from; the first one is masked.

        What may come behind it nobody knows yet. Where nothing that may come can be
        drafted, the logits stay: it is the target that decides.
        """
        z_BW = logits_BW
        if self.adjuster is not None:
            z_BW = self.adjuster.drafts(logits_BW, j, ids_W)
        words_BU = self.masks_BQU[:, 0]
        if ids_W is None:
            may_BW = vocabulary.part(unpacked(words_BU, tokens_of(logits_BW)))
        else:
            bit_W = (ids_W % 32).astype(jnp.uint32)
            may_BW = (words_BU[:, ids_W // 32] >> bit_W) & 1 > 0
        may_BW |= j > 0
        masked_BW = jnp.where(may_BW, z_BW, -jnp.inf)
        possible_B1 = vocabulary.maximum(masked_BW) > -jnp.inf
        return jnp.where(possible_B1, masked_BW, z_BW)


def tokens_of(logits: Float[Array, "R W"]) -> int:
    """Tokens that there are, of which these are this shard's."""
    return logits.shape[-1] * vocabulary.size(vocabulary.MODEL)


def masked(
    adjusted_RV: Float[Array, "R V"],
    logits_RV: Float[Array, "R V"],
    may_RV: Array,
) -> Float[Array, "R V"]:
    """Adjusted logits of the tokens that may come, else the model's own."""
    z_RV = jnp.where(may_RV, adjusted_RV, -jnp.inf)
    possible_R1 = vocabulary.maximum(z_RV) > -jnp.inf
    return jnp.where(possible_R1, z_RV, jnp.where(may_RV, logits_RV, -jnp.inf))
