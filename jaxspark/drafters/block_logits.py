"""Logits of a sequential head, kept as what they are made of (see `heads`).

Row j of a block has u_j + W2 l_j: base logits of all rows at once, and a low-rank bias
by the token before, of which only the latent l_j [B, R] is new. What was drawn from
them is known again from u, W2 and l, so the sums themselves need not be kept.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.drafters.distribution import over_target
from jaxspark.models.layers.linear import head_logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockLogits:
    """Logits of a block's rows, but for the latents.

    Attributes:
      base_GBW: u, over the draft vocabulary.
      weight_WR: W2.
    """

    base_GBW: Float[Array, "G B W"]
    weight_WR: Float[Array, "W R"]

    def row(
        self, j: Int[Array, ""], latent_BR: Float[Array, "B R"]
    ) -> Float[Array, "B W"]:
        """Those of row j."""
        return self.base_GBW[j] + head_logits(latent_BR, self.weight_WR)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockDistribution:
    """What the drafts of a block were drawn from, beside `DraftDistribution`.

    Attributes:
      logits: of the rows.
      latents_BGR: what the token before each draft makes of the bias.
      log_q_BG: log-probabilities of the drafts.
      ids_W: target ids of the draft vocabulary; None where it is the target's own.
    """

    logits: BlockLogits
    latents_BGR: Float[Array, "B G R"]
    log_q_BG: Float[Array, "B G"]
    ids_W: Int[Array, " W"] | None

    def log_prob(self, _: Int[Array, "B G"]) -> Float[Array, "B G"]:
        """log q_j(x_{j+1}) of the drafts."""
        return self.log_q_BG

    def logits_of(self, row_B: Int[Array, " B"]) -> Float[Array, "B W"]:
        """Logits of one draft of each slot."""
        slot_B = jnp.arange(len(row_B))
        base_BW = self.logits.base_GBW[row_B, slot_B]
        latent_BR = self.latents_BGR[slot_B, row_B]
        return base_BW + head_logits(latent_BR, self.logits.weight_WR)

    def over_target(self, q_BW: Float[Array, "B W"], vocab: int):
        """Probabilities of the draft vocabulary over this shard's part of `vocab`."""
        return q_BW if self.ids_W is None else over_target(q_BW, self.ids_W, vocab)
