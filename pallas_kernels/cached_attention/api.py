"""Attention of a few tokens per slot over a position-indexed cache."""

from jaxtyping import Array, Float, Int

from pallas_kernels.cached_attention import mosaic_tpu
from pallas_kernels.cached_attention.ref import cached_attention_xla
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.ragged import Ragged

IMPLEMENTATIONS = {
    "xla": Implementation(run=cached_attention_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.cached_attention_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def cached_attention(
    q_TNH: Float[Array, "T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    ragged: Ragged,
    limits_T: Int[Array, " T"],
    *,
    scale: float,
    pages_BP: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Grouped-query attention where a token sees cached positions below its limit.

    Causal attention, verification and the bidirectional draft block are the same call:
    they differ in `limits_T` alone. Rows at or past a limit are never read into the
    result, so a cache may hold (finite) garbage there.

    Args:
      q_TNH: queries of N heads, a multiple of K.
      k_BKSH: cached keys by absolute position; with `pages_BP` those of a page of S
        positions, and pages in place of slots.
      v_BKSH: cached values, likewise.
      ragged: the tokens' slots.
      limits_T: number of visible positions, in 1..S for tokens that are not padding.
      scale: factor on the scores, usually H ** -0.5.
      pages_BP: the pages that hold a slot's positions, in order; 0 where it has none,
        which any number of slots may name.
      implementation: "xla", or "mosaic_tpu", a kernel that reads what is visible, for
        heads that are a multiple of 128 wide; None takes that in programs for TPUs
        where it can.

    Returns:
      Attention output, same shape and dtype as `q_TNH`; padding's is anything.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    return call(
        "cached_attention",
        IMPLEMENTATIONS,
        implementation,
        *(q_TNH, k_BKSH, v_BKSH, ragged, limits_T, pages_BP),
        scale=scale,
    )
