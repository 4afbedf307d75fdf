"""One draft of every slot from logits that depend on the token before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.draft_sampling import mosaic_tpu
from pallas_kernels.draft_sampling.ref import draft_sampling_xla
from pallas_kernels.draws import Draws, Rows

IMPLEMENTATIONS = {
    "xla": Implementation(run=draft_sampling_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.draft_sampling_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def draft_sampling(
    base_GBW: Float[Array, "G B W"],
    row: int | Int[Array, ""],
    latent_BR: Float[Array, "B R"],
    weight_WR: Float[Array, "W R"],
    rows: Rows,
    *,
    first: int | Int[Array, ""] = 0,
    ids_W: Int[Array, " W"] | None = None,
    implementation: str | None = None,
) -> Draws:
    """Step j of DSpark's sequential head: draws from u_j + W2 l (arXiv 2607.05147).

    Args:
      base_GBW: u, float32 base logits of all steps; one is read, where it lies.
      row: j.
      latent_BR: l, what the token before makes of the low-rank bias.
      weight_WR: W2.
      rows: temperatures and keys.
      first: id of the first token of the part of the vocabulary that is here.
      ids_W: the tokens' ids, where they do not follow `first`: noise goes by them.
      implementation: "xla", or "mosaic_tpu", a kernel for float32 or bfloat16 biases;
        None takes that in programs for TPUs where it can.

    Returns:
      Draws with the sums for the drafts' certainty.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    row, first = jnp.asarray(row, jnp.int32), jnp.asarray(first, jnp.int32)
    operands = (base_GBW, row, latent_BR, weight_WR, rows, first, ids_W)
    with jax.named_scope("draft_sampling"):
        return call("draft_sampling", IMPLEMENTATIONS, implementation, *operands)
