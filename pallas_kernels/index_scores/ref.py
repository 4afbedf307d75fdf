"""The XLA reference, and the specification, of `index_scores`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import accum_dtype, precision
from pallas_kernels.ragged import Ragged, Table

# Entries scored at once: the scores of single heads are never all in memory.
CHUNK = 4096


def index_scores_xla(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    limits_T: Int[Array, " T"] | None,
) -> Float[Array, "T C"]:
    """See `api.index_scores`; every score counts."""
    k_BCH, q_BQNH = keys.whole(), ragged.padded(q_TNH, 0)
    weights_BQN = ragged.padded(weights_TN, 0)

    def score(k_BcH):
        dots_BQNc = jnp.einsum(
            "BQNH,BCH->BQNC",
            q_BQNH,
            k_BcH,
            precision=precision(q_BQNH.dtype),
            preferred_element_type=accum_dtype(q_BQNH.dtype),
        )
        return jnp.einsum(
            "BQN,BQNC->BQC",
            weights_BQN,
            jax.nn.relu(dots_BQNc),
            precision=jax.lax.Precision.HIGHEST,
        )

    entries = k_BCH.shape[1]
    chunks = -(-entries // CHUNK)
    if chunks == 1:
        return ragged.flat(score(k_BCH))
    missing = chunks * CHUNK - entries
    padded_BCH = jnp.pad(k_BCH, ((0, 0), (0, missing), (0, 0)))
    k_nBcH = jnp.moveaxis(padded_BCH.reshape(len(k_BCH), chunks, CHUNK, -1), 1, 0)
    scores_nBQc = jax.lax.map(score, k_nBcH)
    scores_BQnc = jnp.moveaxis(scores_nBQc, 0, 2)
    scores_BQC = scores_BQnc.reshape(*scores_BQnc.shape[:2], -1)[..., :entries]
    return ragged.flat(scores_BQC)
