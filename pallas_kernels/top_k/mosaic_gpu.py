"""`top_k` on Hopper GPUs: two stages, in each of which a kernel chooses.

Moved: up to 4,096 keys of a row, once, into the registers of a block of 128 threads;
the places of the k highest. XLA would read them 16 times to find the k-th highest, and
write what it counts.

Computed: the k-th highest key by its bits, of 32, from the highest down; a count of all
keys tries each. What is above it is chosen, and of its equals the first. Their places
are found by the matrix units, as the keys' 64 x 64 are few for them: a product with a
triangle counts what is chosen up to each column, another what is in the rows before.
The j-th chosen one lies in the row in which the count passes j, which a product with
rows of one 1 fetches, at the first column where it does. Counts are 64 at most there,
so bfloat16 is exact.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.dispatch import not_hopper
from pallas_kernels.precision import in_32_bits
from pallas_kernels.top_k import bisection, two_stage

SIDE = 64  # rows and columns of a row's keys
MOST = SIDE * SIDE
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_LOWEST = -(2**31)


def supports(scores_TC, limits_T, best_Tc, *, k) -> str | None:
    """Why it does not choose among these; None if it does."""
    if reason := not_hopper():
        return reason
    each = bisection if scores_TC.shape[1] <= MOST else two_stage
    return each.supports(scores_TC, limits_T, best_Tc, k=k)


def top_k_mosaic_gpu(
    scores_TC: Float[Array, "T C"],
    limits_T: Int[Array, " T"],
    best_Tc: Float[Array, "T c"] | None = None,
    *,
    k: int,
) -> Int[Array, "T X"]:
    """See `api.top_k`; lower entries come first."""
    k = min(k, scores_TC.shape[1])
    operands = (scores_TC, limits_T, best_Tc)
    return two_stage.top_k_two_stage(*operands, k=k, highest=highest, few=MOST)


def highest(keys_TC: UInt32[Array, "T C"], k: int) -> Int[Array, "T X"]:
    """Places of the k highest keys above 0, in order; -1 behind the last."""
    if keys_TC.shape[1] > MOST:
        return bisection.highest(keys_TC, k)
    return _highest(jax.lax.bitcast_convert_type(keys_TC, jnp.int32), k=k)


@in_32_bits
def _highest(keys_TC, *, k):
    T, C = keys_TC.shape
    keys_TC = jnp.pad(keys_TC, ((0, 0), (0, MOST - C)))
    tiles = -(-k // SIDE)
    transforms = (
        plgpu.TilingTransform((8, SIDE)),
        plgpu.SwizzleTransform(SIDE * jnp.dtype(jnp.bfloat16).itemsize),
    )
    square = plgpu.SMEM((SIDE, SIDE), jnp.bfloat16, transforms=transforms)
    places_TX = plgpu.kernel(
        lambda *refs: _choose(*refs, k=k),
        out_type=jax.ShapeDtypeStruct((T, tiles * SIDE), jnp.int32),
        scratch_types=[square] * 4 + [plgpu.SMEM((2, SIDE), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=2 * T * SIDE**3 * (4 + tiles),
            transcendentals=0,
            bytes_accessed=4 * (keys_TC.size + T * tiles * SIDE),
        ),
        grid=(T,),
        grid_names=("row",),
        kernel_name="top_k",
    )(keys_TC.reshape(T, SIDE, SIDE))
    return places_TX[:, :k]


def _choose(
    keys_ref, places_ref, chosen_buf, counts_buf, upto_buf, below_buf, rows_buf, *, k
):
    """One row; see the top of the file."""
    t = jax.lax.axis_index("row")
    row_RC, column_RC = (
        plgpu.broadcasted_iota(jnp.int32, (SIDE, SIDE), axis, layout=plgpu.Layout.WGMMA)
        for axis in range(2)
    )

    def put(buf, x_RC):
        """For the matrix units to read, once they have read what lay there."""
        plgpu.commit_smem()
        buf[...] = x_RC.astype(buf.dtype)
        plgpu.commit_smem()

    put(upto_buf, row_RC <= column_RC)
    put(below_buf, column_RC < row_RC)
    keys_RC = plgpu.load(keys_ref.at[t], layout=plgpu.Layout.WGMMA, optimized=False)
    keys_RC += _LOWEST  # 0 becomes the lowest integer with a sign

    def count(seen_RC):
        return seen_RC.astype(jnp.int32).sum(1).sum()

    def turn(i, known):
        tried = known + jax.lax.shift_left(jnp.int32(1), 31 - i)
        return jnp.where(count(keys_RC >= tried) >= k, tried, known)

    lowest = jax.lax.fori_loop(0, 32, turn, jnp.int32(_LOWEST))
    above_RC = keys_RC > lowest
    equal_RC = (keys_RC == lowest) & (keys_RC > _LOWEST)
    missing = (k - count(above_RC)).astype(jnp.float32)

    def counted(seen_RC):
        """How many there are up to each place of a row, and in the rows before."""
        put(chosen_buf, seen_RC)
        inside_RC = product(chosen_buf, upto_buf)
        return inside_RC, product(below_buf, chosen_buf).sum(1)

    def across(x_R):
        return jax.lax.broadcast_in_dim(x_R, (SIDE, SIDE), [0])

    inside_RC, before_R = counted(equal_RC)
    chosen_RC = above_RC | (equal_RC & (inside_RC + across(before_R) <= missing))
    inside_RC, before_R = counted(chosen_RC)
    rows_buf[0] = before_R
    rows_buf[1] = before_R + chosen_RC.astype(jnp.float32).sum(1)
    put(counts_buf, inside_RC)
    first_JR, end_JR = (
        jax.lax.broadcast_in_dim(
            plgpu.load(rows_buf.at[n], layout=_COLUMN, optimized=False),
            (SIDE, SIDE),
            [1],
        )
        for n in range(2)
    )

    @pl.loop(0, places_ref.shape[1] // SIDE)
    def _(tile):
        rank_JR = (row_RC + tile * SIDE).astype(jnp.float32)
        here_JR = (first_JR <= rank_JR) & (rank_JR < end_JR)
        put(chosen_buf, here_JR)
        counts_JC = product(chosen_buf, counts_buf)
        start_J = jnp.where(here_JR, first_JR, 0.0).sum(1)
        passed_JC = counts_JC <= rank_JR - across(start_J)
        column_J = passed_JC.astype(jnp.int32).sum(1)
        row_J = jnp.where(here_JR, column_RC, 0).sum(1)
        found_J = here_JR.astype(jnp.int32).sum(1)
        place_J = jnp.where(found_J > 0, row_J * SIDE + column_J, -1)
        plgpu.store(
            places_ref.at[t, pl.ds(pl.multiple_of(tile * SIDE, SIDE), SIDE)],
            place_J,
            optimized=False,
        )


def product(a_ref, b_ref):
    """Of two squares, in float32."""

    def run(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    return pl.run_scoped(run, plgpu.ACC((SIDE, SIDE), jnp.float32))
