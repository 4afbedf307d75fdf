"""Attention of a few query rows per slot over a position-indexed cache."""

from jaxtyping import Array, Float, Int

from pallas_kernels.cached_attention.ref import cached_attention_xla
from pallas_kernels.dispatch import Implementation, call

IMPLEMENTATIONS = {"xla": Implementation(run=cached_attention_xla)}


def cached_attention(
    q_BKMH: Float[Array, "B K M H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    limits_BM: Int[Array, "B M"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B K M H"]:
    """Grouped-query attention where row m sees cached positions below its limit.

    Causal attention, verification and the bidirectional draft block are the same call:
    they differ in `limits_BM` alone. Rows at or past a limit are never read into the
    result, so a cache may hold (finite) garbage there.

    Args:
      q_BKMH: queries, M = query rows x query heads per key/value head.
      k_BKSH: cached keys by absolute position.
      v_BKSH: cached values by absolute position.
      limits_BM: number of visible positions for each query row, in 1..S for real rows.
      scale: factor on the scores, usually H ** -0.5.
      implementation: "xla", which None also means.

    Returns:
      Attention output, same shape and dtype as `q_BKMH`.

    Raises:
      ValueError: unknown implementation.
    """
    return call(
        "cached_attention",
        IMPLEMENTATIONS,
        implementation,
        *(q_BKMH, k_BKSH, v_BKSH, limits_BM),
        scale=scale,
    )
