"""Scores of the Lightning Indexer (DeepSeek-V4 report, section 2.3.1)."""

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.index_scores.ref import index_scores_xla
from pallas_kernels.ragged import Ragged, Table

IMPLEMENTATIONS = {"xla": Implementation(run=index_scores_xla)}


def index_scores(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    *,
    implementation: str | None = None,
) -> Float[Array, "T C"]:
    """sum_n w_n ReLU(q_n . k_c) in float32, for every compressed entry c.

    Args:
      q_TNH: index queries.
      keys: one shared index key per compressed entry.
      weights_TN: of the index heads, scales included.
      ragged: the tokens' slots.
      implementation: "xla", which None also means.

    Raises:
      ValueError: unknown implementation.
    """
    operands = (q_TNH, keys, weights_TN, ragged)
    return call("index_scores", IMPLEMENTATIONS, implementation, *operands)
