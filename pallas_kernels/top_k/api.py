"""The best of many scores, as the Lightning Indexer chooses entries."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.top_k.bisection import top_k_bisection
from pallas_kernels.top_k.ref import top_k_xla

# So few are sorted at once.
FEW = 1024


def _supports(scores_TC, limits_T, *, k) -> str | None:
    if (entries := scores_TC.shape[1]) <= FEW:
        return f"is for more than {FEW} scores of a token, not {entries}"
    return None


IMPLEMENTATIONS = {
    "xla": Implementation(run=top_k_xla),
    "bisection": Implementation(
        run=top_k_bisection, platforms=("tpu", "cuda"), supports=_supports
    ),
}


def top_k(
    scores_TC: Float[Array, "T C"],
    limits_T: Int[Array, " T"],
    *,
    k: int,
    implementation: str | None = None,
) -> Int[Array, "T X"]:
    """Places of each row's min(k, C) best scores below its limit, in any order.

    Equal scores are chosen from the lowest place on, and -0 equals 0. Where a row has
    fewer than k places below its limit, the rest are -1.

    Args:
      scores_TC: float32, no NaNs.
      limits_T: places a row may choose, from the first on.
      k: places to choose.
      implementation: "xla" sorts on TPUs and GPUs; "bisection" does not.

    Raises:
      ValueError: unknown implementation, or one that does not support the operands.
    """
    operands = (scores_TC, limits_T)
    return call("top_k", IMPLEMENTATIONS, implementation, *operands, k=k)
