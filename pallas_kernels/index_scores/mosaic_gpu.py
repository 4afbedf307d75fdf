"""`index_scores` on Hopper GPUs: the scores of single heads stay in registers.

Moved: per group of up to 8 queries of a slot and some hundred of its keys, the queries
of all heads once, then keys, 64 to each of two warpgroups, the next ones by TMA while
these are worked on; out of all layers' table, piece by piece (see the plan of
`sparse_attention`). Written: a score per query and key. Computed: keys are the rows of
a product and heads its columns, so that what a key's heads add lies in the registers of
four threads.

XLA writes the scores of all heads before it adds them up, 64 times as much.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import no_hopper
from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.index_scores.ref import index_scores_xla
from pallas_kernels.ragged import Ragged, Table
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.plan import Plan

# Keys of a warpgroup, the rows of the smallest product; of a chunk; chunks of a block.
_KEYS, _WARPGROUPS, _PER = 64, 2, 8
_CHUNK = _KEYS * _WARPGROUPS
_TILE_ROWS, _SWIZZLED = 8, 64  # of a tile of the matrix units
_MOST_HEADS, _WIDEST = 64, 128
_ROW_OF_HEADS = plgpu.Layout.WGMMA.reduce(0)


def supports(q_TNH, keys: Table, weights_TN, ragged: Ragged, limits_T) -> str | None:
    """Why the kernel cannot score these; None if it can."""
    _, heads, width = q_TNH.shape
    rows = keys.rows_LBCH
    if reason := no_hopper(q_TNH, rows):
        return reason
    if heads % 8 or heads > _MOST_HEADS or width % _SWIZZLED or width > _WIDEST:
        return (
            f"needs heads in multiples of 8, {_MOST_HEADS} at most, that are a "
            f"multiple of {_SWIZZLED} wide, {_WIDEST} at most, got {heads} x {width}"
        )
    if rows.ndim != 4 or rows.shape[2] % _TILE_ROWS:
        return f"reads keys by {_TILE_ROWS}, got {rows.shape[2]} to a slot or page"
    return None


def _counted(q_TNH, keys, weights_TN, ragged, limits_T):
    """The reference, of which scores at or past the limits do not count."""
    scores_TC = index_scores_xla(q_TNH, keys, weights_TN, ragged, None)
    if limits_T is None:
        return scores_TC
    return jnp.where(jnp.arange(keys.length) < limits_T[:, None], scores_TC, 0)


@with_gradients_of(_counted)
def index_scores_mosaic_gpu(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    limits_T: Int[Array, " T"] | None,
) -> Float[Array, "T C"]:
    """See `api.index_scores`; gradients are the reference's."""
    if limits_T is None:
        limits_T = jnp.full(len(q_TNH), keys.length)
    entries = Entries(keys, limits_T=limits_T)
    plan = Plan.of(ragged, entries, 0, True, 1, tiles=(_CHUNK, _CHUNK))
    T, N, H = q_TNH.shape
    first_G, count_G, _, _, chunks_G, *_ = plan.scalars
    slot_G = jnp.arange(plan.groups) // plan.blocks
    groups_G4 = jnp.stack([first_G, count_G, chunks_G, slot_G], axis=1)
    chunks = plan.pieces.shape[-1] * plan.piece // _CHUNK
    copies, dtype = _KEYS // min(plan.piece, _KEYS), q_TNH.dtype

    def tiled(*shape):
        transforms = (
            plgpu.TilingTransform((_TILE_ROWS, _SWIZZLED)),
            plgpu.SwizzleTransform(_SWIZZLED * dtype.itemsize),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    scores_TC = plgpu.kernel(
        functools.partial(_score, piece=min(plan.piece, _KEYS), size=plan.piece),
        out_type=jax.ShapeDtypeStruct((T, chunks * _CHUNK), jnp.float32),
        scratch_types=[
            tiled(plan.queries, N, H),
            tiled(2, _WARPGROUPS, _KEYS, H),
            plgpu.Barrier(num_arrivals=plan.queries),
            plgpu.Barrier(num_arrivals=copies, num_barriers=2 * _WARPGROUPS),
        ],
        cost_estimate=pl.CostEstimate(
            flops=2 * q_TNH.size * chunks * _CHUNK,
            transcendentals=0,
            bytes_accessed=q_TNH.size * dtype.itemsize
            + plan.groups * chunks * _CHUNK * H * dtype.itemsize
            + 4 * T * chunks * _CHUNK,
        ),
        grid=(-(-chunks // _PER), plan.groups),
        grid_names=("part", "group"),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="index_scores",
    )(
        groups_G4.astype(jnp.int32),
        q_TNH,
        weights_TN.astype(jnp.float32),
        plan.table,
        plan.pieces[:, 0],
    )
    return scores_TC[:, : keys.length]


def _score(
    groups_ref,
    q_ref,
    weights_ref,
    keys_ref,
    pieces_ref,
    o_ref,
    q_buf,
    k_buf,
    loaded,
    filled,
    *,
    piece,
    size,
):
    """Some chunks of a group's keys."""
    g, me = jax.lax.axis_index("group"), jax.lax.axis_index("warpgroup")
    first, count, chunks, slot = (groups_ref[g, k] for k in range(4))
    begin = jax.lax.axis_index("part") * _PER
    end = jnp.minimum(begin + _PER, chunks)
    queries, heads, _ = q_buf.shape
    tokens = [jnp.minimum(first + q, len(q_ref) - 1) for q in range(queries)]

    def fetch(j):
        side = jax.lax.rem(j, 2)
        for at in range(0, _KEYS, piece):
            row = j * _CHUNK + me * _KEYS + at
            place = pieces_ref[slot, row // size] + jax.lax.rem(row, size)
            plgpu.copy_gmem_to_smem(
                keys_ref.at[pl.ds(pl.multiple_of(place, _TILE_ROWS), piece)],
                k_buf.at[side, me, pl.ds(at, piece)],
                filled.at[side * _WARPGROUPS + me],
            )

    def chunk(j):
        side = jax.lax.rem(j, 2)
        pl.when(j + 1 < end)(lambda: fetch(j + 1))
        plgpu.barrier_wait(filled.at[side * _WARPGROUPS + me])
        here = pl.ds(pl.multiple_of(j * _CHUNK + me * _KEYS, _KEYS), _KEYS)
        for query, t in enumerate(tokens):

            def product(acc_ref, query=query):
                q_HN = q_buf.at[query].transpose((1, 0))
                plgpu.wgmma(acc_ref, k_buf.at[side, me], q_HN)
                return acc_ref[...]

            accumulator = plgpu.ACC((_KEYS, heads), jnp.float32)
            dots_SN = pl.run_scoped(product, accumulator)
            weight_N = plgpu.load(
                weights_ref.at[t], layout=_ROW_OF_HEADS, optimized=False
            )
            weight_SN = jax.lax.broadcast_in_dim(weight_N, dots_SN.shape, [1])
            score_S = (jnp.maximum(dots_SN, 0.0) * weight_SN).sum(1)

            @pl.when(query < count)
            def _(t=t, score_S=score_S):
                plgpu.store(o_ref.at[t, here], score_S, optimized=False)

    @pl.when(begin < end)
    def _():
        @pl.when(me == 0)
        def _():
            for query, t in enumerate(tokens):
                plgpu.copy_gmem_to_smem(q_ref.at[t], q_buf.at[query], loaded)

        fetch(begin)
        plgpu.barrier_wait(loaded)
        pl.loop(begin, end)(chunk)
