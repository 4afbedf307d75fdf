"""What hyper-connections do after a sublayer (Xie et al. 2026)."""

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.hyper_mix import mosaic_tpu
from pallas_kernels.hyper_mix.ref import hyper_mix_xla

IMPLEMENTATIONS = {
    "xla": Implementation(run=hyper_mix_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.hyper_mix_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def hyper_mix(
    y_TD: Float[Array, "T D"],
    x_TMD: Float[Array, "T M D"],
    post_TM: Float[Array, "T M"],
    comb_TMM: Float[Array, "T M M"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T M D"]:
    """x'_k = post_k y + sum_j comb_jk x_j.

    Args:
      y_TD: what the sublayer gave.
      x_TMD: the residual streams before it.
      post_TM: see `hyper_connections`.
      comb_TMM: likewise.
      implementation: "xla", or "mosaic_tpu", a kernel for four streams in multiples of
        128; None takes that in programs for TPUs where it can.

    Returns:
      The streams after it, in their type.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    operands = (y_TD, x_TMD, post_TM, comb_TMM)
    return call("hyper_mix", IMPLEMENTATIONS, implementation, *operands)
