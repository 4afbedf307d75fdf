"""Scores of the Lightning Indexer (DeepSeek-V4 report, section 2.3.1)."""

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.index_scores.ref import index_scores_xla

IMPLEMENTATIONS = {"xla": Implementation(run=index_scores_xla)}


def index_scores(
    q_BQNH: Float[Array, "B Q N H"],
    k_BCH: Float[Array, "B C H"],
    weights_BQN: Float[Array, "B Q N"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B Q C"]:
    """sum_n w_n ReLU(q_n . k_c) in float32, for every compressed entry c.

    Args:
      q_BQNH: index queries.
      k_BCH: one shared index key per compressed entry.
      weights_BQN: of the index heads, scales included.
      implementation: "xla", which None also means.

    Raises:
      ValueError: unknown implementation.
    """
    operands = (q_BQNH, k_BCH, weights_BQN)
    return call("index_scores", IMPLEMENTATIONS, implementation, *operands)
