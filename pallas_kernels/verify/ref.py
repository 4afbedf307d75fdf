"""Verification from logits that XLA writes and reads: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.draws import Draws, Rows
from pallas_kernels.draws_xla import draws_of
from pallas_kernels.precision import accum_dtype, precision


def verify_xla(
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    rows: Rows,
    named_T: Int[Array, " T"] | None,
    first: Int[Array, ""],
) -> Draws:
    """See `api.verify`."""
    z_TV = products(hidden_TD, head_VD)
    ids_V = first + jnp.arange(z_TV.shape[1], dtype=jnp.int32)
    return draws_of(z_TV, rows, ids_V, named_T, certainty=False)


def products(
    x_RI: Float[Array, "R I"], w_VI: Float[Array, "V I"]
) -> Float[Array, "R V"]:
    """x W^T, in at least float32."""
    return jax.lax.dot_general(
        x_RI,
        w_VI,
        (((1,), (1,)), ((), ())),
        precision=precision(x_RI.dtype),
        preferred_element_type=accum_dtype(x_RI.dtype),
    )
