"""The XLA reference, and the specification, of `index_scores`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import accum_dtype, precision
from pallas_kernels.ragged import Ragged, Table

# Entries scored at once: the scores of single heads are never all in memory.
CHUNK = 4096
# Neighbours of which the best score is told.
EIGHT = 8


def index_scores_xla(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    limits_T: Int[Array, " T"] | None,
    *,
    best: bool = False,
) -> Float[Array, "T C"] | tuple[Float[Array, "T C"], Float[Array, "T c"]]:
    """See `api.index_scores`; every score counts."""
    scores_TC = _scores(q_TNH, keys, weights_TN, ragged)
    return (scores_TC, best_of_eights(scores_TC, limits_T)) if best else scores_TC


def best_of_eights(
    scores_TC: Float[Array, "T C"], limits_T: Int[Array, " T"] | None
) -> Float[Array, "T c"]:
    """The best of every eight neighbours below the limit; -inf where none is."""
    missing = -scores_TC.shape[1] % EIGHT
    if limits_T is not None:
        seen_TC = jnp.arange(scores_TC.shape[1]) < limits_T[:, None]
        scores_TC = jnp.where(seen_TC, scores_TC, -jnp.inf)
    widths = ((0, 0), (0, missing))
    scores_TC = jnp.pad(scores_TC, widths, constant_values=-jnp.inf)
    return scores_TC.reshape(len(scores_TC), -1, EIGHT).max(-1)


def _scores(q_TNH, keys: Table, weights_TN, ragged: Ragged):
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
