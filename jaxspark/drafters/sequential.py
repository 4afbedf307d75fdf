"""Drafting a block position by position.

Every drafter with a distribution ends here: each position's logits may depend on the
token drafted before it, so tokens are drawn one after another. What a drafter computes
for all positions at once is done before, and enters through `rows`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.drafters.base import DraftContext, DraftSampler, Proposal
from jaxspark.drafters.block_logits import BlockDistribution, BlockLogits
from jaxspark.drafters.distribution import DraftDistribution

# (carry, token before [B], j, rows of position j) -> carry, logits [B, W] or latents
# [B, R] of `BlockLogits`, and confidence logits [B]; None without a confidence head
# (certainty suggests some).
type Step[Carry, Rows] = Callable[
    [Carry, Int[Array, " B"], Int[Array, ""], Rows],
    tuple[Carry, Float[Array, "B X"], Float[Array, " B"] | None],
]


def draft_block[Carry, Rows](
    step: Step[Carry, Rows],
    carry: Carry,
    rows: Rows,
    context: DraftContext,
    sampler: DraftSampler,
    block_length: int,
    *,
    ids_W: Int[Array, " W"] | None = None,
    logits: BlockLogits | None = None,
) -> tuple[Proposal, Carry]:
    """Draws a block for every slot.

    Args:
      step: one position: what the drafter predicts, given the token before.
      carry: what steps hand on, beside the token drafted.
      rows: arrays whose leading axis is the position in the block, [G, ...].
      context: whose anchors come before the first draft.
      sampler: draws.
      block_length: G.
      ids_W: target ids of the draft vocabulary; None where it is the target's own.
      logits: what steps' latents belong to; None where steps give logits.

    Returns:
      The proposal, and what the last step handed on.
    """
    streamed = logits is not None and sampler.streams

    def position(state, inputs):
        carry, previous_B = state
        j, row = inputs
        carry, given_BX, confidence_B = step(carry, previous_B, j, row)
        if logits is None:
            drawn = sampler(given_BX, j, ids_W)
        elif streamed:
            drawn = sampler.stream(logits, j, given_BX, ids_W)
        else:
            drawn = sampler(logits.row(j, given_BX), j, ids_W)
        return (carry, drawn.tokens_B), (drawn, confidence_B)

    (carry, _), outputs = jax.lax.scan(
        position, (carry, context.anchors_B), (jnp.arange(block_length), rows)
    )
    drawn, confidence_BG = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)
    if confidence_BG is None:
        confidence_BG = sampler.suggested(drawn.certainty_B)
    q: DraftDistribution | BlockDistribution
    if logits is not None and streamed:
        q = BlockDistribution(logits, drawn.latent_BR, drawn.log_q_B, ids_W)
    else:
        q = DraftDistribution(drawn.log_q_BW, ids_W)
    proposal = Proposal(
        tokens_BG=drawn.tokens_B,
        lengths_B=jnp.full_like(context.lengths_B, block_length),
        confidence_BG=confidence_BG,
        certainty_BG=drawn.certainty_B,
        q=q,
    )
    return proposal, carry
