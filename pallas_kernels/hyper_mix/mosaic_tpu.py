"""Hyper-connections after a sublayer, on TPUs: streams are read and written once.

Moved: the streams and the sublayer's output in, the streams out, a few weights.
Computed: each new stream from all of them, 128 tokens a step. The grid's inner axis
goes over the new streams, while what they are made of stays where it is. Streams lie
[M, T, D], as `hyper_connections`' kernel reads them; XLA writes them one by one, and
has to put them together before a kernel can read them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.hyper_connections import mosaic_tpu as before
from pallas_kernels.hyper_mix.ref import hyper_mix_xla
from pallas_kernels.ragged import LANES

# Of a tile; M weights and that of the output are its first rows.
_ROWS = 8


def supports(y_TD, x_TMD, post_TM, comb_TMM) -> str | None:
    """Why the kernel cannot mix these; None if it can."""
    if {post_TM.dtype, comb_TMM.dtype} != {jnp.dtype("float32")}:
        return f"takes weights in float32, got {post_TM.dtype} and {comb_TMM.dtype}"
    if y_TD.dtype != x_TMD.dtype:
        return f"wants one type for all, got {y_TD.dtype} and {x_TMD.dtype}"
    return before.unfit(x_TMD, arrays=6)


@with_gradients_of(hyper_mix_xla)
def hyper_mix_mosaic_tpu(
    y_TD: Float[Array, "T D"],
    x_TMD: Float[Array, "T M D"],
    post_TM: Float[Array, "T M"],
    comb_TMM: Float[Array, "T M M"],
) -> Float[Array, "T M D"]:
    """See `api.hyper_mix`; gradients are XLA's."""
    T, M, D = x_TMD.shape
    blocks = pl.cdiv(T, LANES)
    # Of each new stream: the weights of the M old ones, and of the output.
    weights_MRT = jnp.concatenate([comb_TMM.transpose(2, 1, 0), post_TM.T[:, None]], 1)
    padding = (0, 0), (0, _ROWS - M - 1), (0, blocks * LANES - T)
    mixed_MTD = pl.pallas_call(
        _mix,
        out_shape=jax.ShapeDtypeStruct((M, T, D), x_TMD.dtype),
        grid=(blocks, M),
        in_specs=[
            pl.BlockSpec((pl.squeezed, _ROWS, LANES), lambda i, k: (k, 0, i)),
            *[
                pl.BlockSpec((pl.squeezed, LANES, D), lambda i, k, m=m: (m, i, 0))
                for m in range(M)
            ],
            pl.BlockSpec((LANES, D), lambda i, k: (i, 0)),
        ],
        out_specs=pl.BlockSpec((pl.squeezed, LANES, D), lambda i, k: (k, i, 0)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=before.VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * M * (M + 1) * D,
            transcendentals=0,
            bytes_accessed=2 * x_TMD.nbytes + y_TD.nbytes + 4 * T * M * _ROWS,
        ),
        name="hyper_mix",
    )(jnp.pad(weights_MRT, padding), *[x_TMD.transpose(1, 0, 2)] * M, y_TD)
    return mixed_MTD.transpose(1, 0, 2)


def _mix(weights_ref, *refs):
    """128 tokens of one new stream."""
    *parts, mixed_ref = refs
    width = before.columns_at_once(mixed_ref.shape[1])
    weights_TR = weights_ref[...].T

    @pl.loop(0, mixed_ref.shape[1] // width)
    def _(chunk):
        here = pl.ds(pl.multiple_of(chunk * width, LANES), width)
        mixed_TC = sum(
            weights_TR[:, row : row + 1] * part_ref[:, here].astype(jnp.float32)
            for row, part_ref in enumerate(parts)
        )
        mixed_ref[:, here] = mixed_TC.astype(mixed_ref.dtype)
