"""The XLA reference, and the specification, of `top_k`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k_xla(
    scores_TC: Float[Array, "T C"],
    limits_T: Int[Array, " T"],
    best_Tc: Float[Array, "T c"] | None = None,
    *,
    k: int,
) -> Int[Array, "T X"]:
    """See `api.top_k`."""
    entry_C = jnp.arange(scores_TC.shape[1])
    # A sort may hold -0 for less than 0.
    scores_TC = jnp.where(scores_TC == 0, 0, scores_TC)
    scores_TC = jnp.where(entry_C < limits_T[:, None], scores_TC, -jnp.inf)
    _, chosen_TX = jax.lax.top_k(scores_TC, min(k, len(entry_C)))
    return jnp.where(chosen_TX < limits_T[:, None], chosen_TX, -1)
