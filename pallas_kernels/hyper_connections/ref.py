"""The XLA reference, and the specification, of `hyper_connections`.

Streams are handled one by one: with a short axis of streams beside the width, XLA's
programs for TPUs turn them between layouts and move five times the bytes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import precision, upcast


def hyper_connections_xla(
    x_TMD: Float[Array, "T M D"],
    fn_XY: Float[Array, "X MD"],
    scale: Float[Array, "3"],
    base_X: Float[Array, " X"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Array, "T D"], Float[Array, "T M"], Float[Array, "T M M"]]:
    """See `api.hyper_connections`."""
    T, M, _ = x_TMD.shape
    z_TX = project(fn_XY, x_TMD, norm_eps) * by_row(scale, M) + base_X
    pre_TM = jax.nn.sigmoid(z_TX[:, :M]) + eps
    post_TM = 2 * jax.nn.sigmoid(z_TX[:, M : 2 * M])
    comb_TMM = sinkhorn(z_TX[:, 2 * M :].reshape(T, M, M), iterations, eps)
    return collapse(pre_TM, x_TMD), post_TM, comb_TMM


def by_row(scale: Float[Array, "3"], streams: int) -> Float[Array, " X"]:
    """The scale of every row."""
    M = streams
    row_X = jnp.arange(M * (2 + M))
    later_X = jnp.where(row_X < 2 * M, scale[1], scale[2])
    return jnp.where(row_X < M, scale[0], later_X)


def project(
    fn_XY: Float[Array, "X MD"], x_TMD: Float[Array, "T M D"], eps: float
) -> Float[Array, "T X"]:
    """fn times the normed concatenation of all streams; the norm comes last."""
    streams = [upcast(x_TD) for x_TD in unstacked(x_TMD)]
    width = x_TMD.shape[1] * x_TMD.shape[2]
    squares_T1 = sum(jnp.sum(jnp.square(x), 1, keepdims=True) for x in streams)
    parts = jnp.split(fn_XY, len(streams), axis=1)
    exact = precision(fn_XY.dtype)
    product_TX = sum(
        jnp.dot(x_TD, fn_XD.T, precision=exact) for x_TD, fn_XD in zip(streams, parts)
    )
    return product_TX * jax.lax.rsqrt(squares_T1 / width + eps)


def sinkhorn(
    z_TMM: Float[Array, "T M M"], iterations: int, eps: float
) -> Float[Array, "T M M"]:
    """Doubly stochastic matrices from logits: rows by softmax, then columns, and so on.

    It ends on a column norm, as the released models do: the sum over the first M,
    from which streams are mixed, is 1.
    """
    comb_TMM = jax.nn.softmax(z_TMM, axis=2) + eps
    comb_TMM /= comb_TMM.sum(1, keepdims=True) + eps
    for _ in range(iterations - 1):
        comb_TMM /= comb_TMM.sum(2, keepdims=True) + eps
        comb_TMM /= comb_TMM.sum(1, keepdims=True) + eps
    return comb_TMM


def collapse(
    pre_TM: Float[Array, "T M"], x_TMD: Float[Array, "T M D"]
) -> Float[Array, "T D"]:
    """sum_j pre_j x_j."""
    return weighted(pre_TM, unstacked(x_TMD)).astype(x_TMD.dtype)


def weighted(
    weights_TM: Float[Array, "T M"], streams: list[Float[Array, "T D"]]
) -> Float[Array, "T D"]:
    """Sums of streams."""
    products = [weights_TM[:, m, None] * x_TD for m, x_TD in enumerate(streams)]
    return sum(products[1:], products[0])


def unstacked(x_TMD: Float[Array, "T M D"]) -> list[Float[Array, "T D"]]:
    """The streams one by one."""
    return [x_TMD[:, m] for m in range(x_TMD.shape[1])]
