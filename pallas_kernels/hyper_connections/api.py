"""What hyper-connections do before a sublayer (Xie et al. 2026)."""

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.hyper_connections import mosaic_tpu
from pallas_kernels.hyper_connections.ref import hyper_connections_xla

IMPLEMENTATIONS = {
    "xla": Implementation(run=hyper_connections_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.hyper_connections_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def hyper_connections(
    x_TMD: Float[Array, "T M D"],
    fn_XY: Float[Array, "X MD"],
    scale: Float[Array, "3"],
    base_X: Float[Array, " X"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T M"], Float[Array, "T M M"]]:
    """The input of a sublayer, and the weights of what comes after it.

    z = scale * (fn norm([x_1; ...; x_M])) + base has rows for pre, post and comb (j k,
    row by row), each part with a scale of its own. Then pre = sigmoid(z) + eps, post =
    2 sigmoid(z), comb = sinkhorn(z), and the input is sum_j pre_j x_j.

    Args:
      x_TMD: the residual streams.
      fn_XY: X = (2 + M) M rows over all streams side by side.
      scale: of the three parts.
      base_X: biases.
      iterations: of Sinkhorn's algorithm, each over rows and columns.
      eps: added to sigmoids and to what Sinkhorn's algorithm divides by.
      norm_eps: of the norm, which has no weight.
      implementation: "xla", or "mosaic_tpu", a kernel for four streams in multiples of
        128; None takes that in programs for TPUs where it can.

    Returns:
      The sublayer's input in the type of the streams; post and comb, which is doubly
      stochastic, in that of `fn_XY`.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands.
    """
    return call(
        "hyper_connections",
        IMPLEMENTATIONS,
        implementation,
        *(x_TMD, fn_XY, scale, base_X),
        iterations=iterations,
        eps=eps,
        norm_eps=norm_eps,
    )
