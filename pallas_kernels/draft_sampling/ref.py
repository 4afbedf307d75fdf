"""Drafts from corrected logits that XLA writes and reads: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.draws import Draws, Rows
from pallas_kernels.draws_xla import draws_of
from pallas_kernels.verify.ref import products


def draft_sampling_xla(
    base_GBW: Float[Array, "G B W"],
    row: Int[Array, ""],
    latent_BR: Float[Array, "B R"],
    weight_WR: Float[Array, "W R"],
    rows: Rows,
    first: Int[Array, ""],
    ids_W: Int[Array, " W"] | None,
) -> Draws:
    """See `api.draft_sampling`."""
    z_BW = jax.lax.dynamic_index_in_dim(base_GBW, row, keepdims=False)
    z_BW = z_BW + products(latent_BR, weight_WR)
    if ids_W is None:
        ids_W = first + jnp.arange(z_BW.shape[1], dtype=jnp.int32)
    return draws_of(z_BW, rows, ids_W, None, certainty=True)
