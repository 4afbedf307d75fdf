"""Hyper-connections before a sublayer, on TPUs: the streams are read once.

Moved: the streams in, their weighted sum and the coefficients out; fn once. Computed,
for 128 tokens at a time: the squares and products of all streams, Sinkhorn's
iterations, and the sum.

Tokens lie in lanes while coefficients are made: each of the M x M is a row, so that
forty normalizations are plain arithmetic between rows. XLA makes a program of each,
which takes longer than its few numbers need. For the sum each of the M weights of a
token is spread over a row of lanes, once, and meets all columns of 16 tokens. Streams
are blocks [M, 128, D]: so XLA lays them out where it mixes them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.hyper_connections.ref import by_row, hyper_connections_xla
from pallas_kernels.ragged import LANES

# At most; and of it for what is not a window on the operands.
VMEM, _SPARE = 32 << 20, 4 << 20
_SUBLANES = 8
# Rows of a tile of bfloat16; tokens that are summed at once.
_PACKED = 16
# Of a float32: a bfloat16.
_UPPER_HALF = -(1 << 16)
_WIDTHS = (512, 256, LANES)
# Of these widths, one after the other: the matrix units fill and drain less often.
_UNROLL = 4


def supports(x_TMD, fn_XY, scale, base_X, *, iterations, eps, norm_eps) -> str | None:
    """Why the kernel cannot take these streams; None if it can."""
    if fn_XY.dtype != jnp.float32:
        return f"takes coefficients in float32, got {fn_XY.dtype}"
    return unfit(x_TMD, arrays=x_TMD.shape[1] + 1, rest=fn_XY.nbytes)


def unfit(x_TMD: Float[Array, "T M D"], *, arrays: int, rest: int = 0) -> str | None:
    """Why streams do not fit kernels that hold 128 tokens of `arrays` and `rest`."""
    T, M, D = x_TMD.shape
    if x_TMD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes streams in float32 or bfloat16, got {x_TMD.dtype}"
    if not T or M != 4 or D % LANES:
        return f"takes tokens of 4 streams in multiples of {LANES}, got {x_TMD.shape}"
    windows = 2 * (arrays * LANES * D * x_TMD.dtype.itemsize + rest)
    if windows > VMEM - _SPARE:
        most = (VMEM - _SPARE) >> 20
        return f"has {most} MB for {LANES} tokens, too little for {windows >> 20}"
    return None


@with_gradients_of(hyper_connections_xla)
def hyper_connections_mosaic_tpu(
    x_TMD: Float[Array, "T M D"],
    fn_XY: Float[Array, "X MD"],
    scale: Float[Array, "3"],
    base_X: Float[Array, " X"],
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Float[Array, "T D"], Float[Array, "T M"], Float[Array, "T M M"]]:
    """See `api.hyper_connections`; gradients are XLA's."""
    T, M, D = x_TMD.shape
    X, blocks = len(fn_XY), pl.cdiv(T, LANES)
    affine_X2 = jnp.stack([by_row(scale, M), base_X], axis=1)
    options = {"iterations": iterations, "eps": eps, "norm_eps": norm_eps}
    h_TD, z_XT = pl.pallas_call(
        functools.partial(_before, **options),
        out_shape=[
            jax.ShapeDtypeStruct((T, D), x_TMD.dtype),
            jax.ShapeDtypeStruct((X, blocks * LANES), jnp.float32),
        ],
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((X, 2), lambda i: (0, 0)),
            pl.BlockSpec((X, M * D), lambda i: (0, 0)),
            *[
                pl.BlockSpec((pl.squeezed, LANES, D), lambda i, m=m: (m, i, 0))
                for m in range(M)
            ],
        ],
        out_specs=[
            pl.BlockSpec((LANES, D), lambda i: (i, 0)),
            pl.BlockSpec((X, LANES), lambda i: (0, i)),
        ],
        scratch_shapes=[pltpu.VMEM((M, LANES, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * M * D * (X + 2),
            transcendentals=T * X,
            bytes_accessed=x_TMD.nbytes + x_TMD.nbytes // M + fn_XY.nbytes + 4 * T * X,
        ),
        name="hyper_connections",
    )(affine_X2, fn_XY, *[x_TMD.transpose(1, 0, 2)] * M)
    z_TX = z_XT[:, :T].T
    return h_TD, z_TX[:, M : 2 * M], z_TX[:, 2 * M :].reshape(T, M, M)


def _before(affine_ref, fn_ref, *refs, iterations, eps, norm_eps):
    """128 tokens; see the top of the file."""
    *x_refs, h_ref, z_ref, pre_ref = refs
    M, (tokens, D) = len(x_refs), h_ref.shape
    width = columns_at_once(D)

    def columns(chunk, first=0):
        return pl.ds(pl.multiple_of(first + chunk * width, LANES), width)

    def measure(chunk, sums):
        product_XT, squares_TL = sums
        for m, x_ref in enumerate(x_refs):
            x_TC = x_ref[:, columns(chunk)]
            product_XT += _product(fn_ref[:, columns(chunk, m * D)], x_TC)
            x_TC = x_TC.astype(jnp.float32)
            for at in range(0, width, LANES):
                squares_TL += jnp.square(x_TC[:, at : at + LANES])
        return product_XT, squares_TL

    zeros = [
        jnp.zeros(shape, jnp.float32)
        for shape in ((fn_ref.shape[0], tokens), (tokens, LANES))
    ]
    product_XT, squares_TL = jax.lax.fori_loop(
        0, D // width, measure, tuple(zeros), unroll=min(_UNROLL, D // width)
    )
    mean_1T = squares_TL.T.sum(0, keepdims=True) / (M * D)
    product_XT *= jax.lax.rsqrt(mean_1T + norm_eps)
    z_XT = product_XT * affine_ref[:, :1] + affine_ref[:, 1:]
    z = [z_XT[row : row + 1] for row in range(len(z_XT))]
    pre = [jax.nn.sigmoid(row) + eps for row in z[:M]]
    post = [2 * jax.nn.sigmoid(row) for row in z[M : 2 * M]]
    comb = _sinkhorn([z[2 * M + j * M :][:M] for j in range(M)], iterations, eps)
    rows = [*pre, *post, *sum(comb, [])]
    for row, value in enumerate(rows):
        z_ref[row : row + 1] = value
    pre_TM = z_ref[:_SUBLANES].T[:, :M]
    for m in range(M):
        pre_ref[m] = jnp.broadcast_to(pre_TM[:, m : m + 1], pre_ref.shape[1:])

    @pl.loop(0, tokens // _PACKED)
    def _(group):
        here = pl.ds(pl.multiple_of(group * _PACKED, _PACKED), _PACKED)
        pre = [pre_ref[m, here] for m in range(M)]
        for at in range(0, D, LANES):
            there = here, slice(at, at + LANES)
            h_TL = sum(
                pre_TL * x_ref[there].astype(jnp.float32)
                for pre_TL, x_ref in zip(pre, x_refs)
            )
            h_ref[there] = h_TL.astype(h_ref.dtype)


def _product(fn_XC, x_TC):
    """fn x^T as if all were float32.

    bfloat16 numbers meet three parts of fn that sum up to it: half the passes, and
    nothing to be done to each number.
    """
    contracted = (((1,), (1,)), ((), ()))
    if x_TC.dtype == jnp.float32:
        exact = jax.lax.Precision.HIGHEST
        return jax.lax.dot_general(fn_XC, x_TC, contracted, precision=exact)
    rows, parts = len(fn_XC), []
    for _ in range(3):
        # Cut off, not rounded: compilers may take rounding there and back for nothing.
        bits = jax.lax.bitcast_convert_type(fn_XC, jnp.int32) & _UPPER_HALF
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        fn_XC = fn_XC - parts[-1]
    parts.append(jnp.zeros((-3 * rows % _PACKED, fn_XC.shape[1]), jnp.float32))
    products = jax.lax.dot_general(
        jnp.concatenate(parts).astype(x_TC.dtype),
        x_TC,
        contracted,
        preferred_element_type=jnp.float32,
    )
    return sum(products[n * rows : (n + 1) * rows] for n in range(3))


def columns_at_once(D: int) -> int:
    """Columns that are computed at once."""
    return next(width for width in _WIDTHS if D % width == 0)


def _sinkhorn(z, iterations, eps):
    """As in the reference; `z[j][k]` are rows of tokens."""

    def each_row(comb):
        return [_divided(row, sum(row[1:], row[0]) + eps) for row in comb]

    def each_column(comb):
        return list(map(list, zip(*each_row(zip(*comb)))))

    comb = []
    for row in z:
        most = functools.reduce(jnp.maximum, row)
        powers = [jnp.exp(each - most) for each in row]
        softmax = _divided(powers, sum(powers[1:], powers[0]))
        comb.append([each + eps for each in softmax])
    comb = each_column(comb)

    def turn(_, flat):
        square = [list(flat[j * len(z) :][: len(z)]) for j in range(len(z))]
        return tuple(sum(each_column(each_row(square)), []))

    flat = jax.lax.fori_loop(0, iterations - 1, turn, tuple(sum(comb, [])))
    return [list(flat[j * len(z) :][: len(z)]) for j in range(len(z))]


def _divided(row, by):
    # Sums of what is positive: no infinity, no zero, which a division looks out for.
    inverse = pltpu.reciprocal(by, full_range=False)
    return [each * inverse for each in row]
