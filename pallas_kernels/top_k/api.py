"""The best of many scores, as the Lightning Indexer chooses entries."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.top_k import bisection, mosaic_gpu, two_stage
from pallas_kernels.top_k.ref import top_k_xla

IMPLEMENTATIONS = {
    "xla": Implementation(run=top_k_xla),
    "mosaic_gpu": Implementation(
        run=mosaic_gpu.top_k_mosaic_gpu,
        platforms=("cuda",),
        supports=mosaic_gpu.supports,
    ),
    "two_stage": Implementation(
        run=two_stage.top_k_two_stage,
        platforms=("cuda",),
        supports=two_stage.supports,
    ),
    "bisection": Implementation(
        run=bisection.top_k_bisection,
        platforms=("tpu", "cuda"),
        supports=bisection.supports,
    ),
}


def top_k(
    scores_TC: Float[Array, "T C"],
    limits_T: Int[Array, " T"],
    best_Tc: Float[Array, "T c"] | None = None,
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
      best_Tc: the best score below the limit of every eight neighbours (or of another
        power of two), if it is known: not all scores are looked at then.
      k: places to choose.
      implementation: "xla", which sorts on TPUs and GPUs, or "mosaic_gpu", "two_stage"
        or "bisection", which do not; the first is a kernel for Hopper GPUs. None takes
        what suits the platform. (Where scores need not be written either,
        `indexer_topk` has a kernel.)

    Raises:
      ValueError: unknown implementation, or one that does not support the operands.
    """
    operands = (scores_TC, limits_T, best_Tc)
    return call("top_k", IMPLEMENTATIONS, implementation, *operands, k=k)
