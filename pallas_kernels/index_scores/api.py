"""Scores of the Lightning Indexer (DeepSeek-V4 report, section 2.3.1)."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.index_scores import mosaic_gpu
from pallas_kernels.index_scores.ref import index_scores_xla
from pallas_kernels.ragged import Ragged, Table

IMPLEMENTATIONS = {
    "xla": Implementation(run=index_scores_xla),
    "mosaic_gpu": Implementation(
        run=mosaic_gpu.index_scores_mosaic_gpu,
        platforms=("cuda",),
        supports=mosaic_gpu.supports,
    ),
}


def index_scores(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    limits_T: Int[Array, " T"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "T C"]:
    """sum_n w_n ReLU(q_n . k_c) in float32, for every compressed entry c.

    Args:
      q_TNH: index queries.
      keys: one shared index key per compressed entry.
      weights_TN: of the index heads, scales included.
      ragged: the tokens' slots.
      limits_T: scores at or past a token's limit may be anything; None: all count.
      implementation: "xla", or "mosaic_gpu", a kernel for Hopper GPUs, which None takes
        in programs for them where it can. (TPUs have `indexer_topk`.)

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    operands = (q_TNH, keys, weights_TN, ragged, limits_T)
    return call("index_scores", IMPLEMENTATIONS, implementation, *operands, best=False)


def scores_and_best(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    limits_T: Int[Array, " T"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "T C"], Float[Array, "T c"]]:
    """The same scores, and the best of every eight neighbours below a token's limit.

    A choice may begin among those, see `top_k`. Where no entry of an eight is below the
    limit, the best is -inf or anything.
    """
    operands = (q_TNH, keys, weights_TN, ragged, limits_T)
    return call("index_scores", IMPLEMENTATIONS, implementation, *operands, best=True)
