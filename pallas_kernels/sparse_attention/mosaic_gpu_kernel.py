"""The kernel of `mosaic_gpu`: a block of threads serves 64 heads of one query.

Two warpgroups compute, a third one fetches. Of a chunk of rows each of the two makes
the scores of one half of the rows, over the whole width; they exchange the greatest
score, then the weights, and each adds all rows to its half of the output's width. So
the 64 x 512 accumulator lies in the registers of both, and no product is made twice.

Moved: the query once; chunks of rows into a ring of two, first the recent ones, then
entries. Rows that lie together come by TMA. Chosen ones come through registers, one
load of a warpgroup each, all of a chunk at once, and take their place in the tiles of
the matrix units by way of a buffer [rows, width].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
UNSEEN = -1e30
HEADS = 64  # of a block of threads: the rows of the smallest product
SIDES = 2  # of the ring
HALVES = 2
TILE_ROWS = 8  # of a tile of the matrix units
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def accumulate(acc_NH, p_NS, k_ref, meanwhile):
    """acc + p @ k, and something to do until it is there."""

    def add(acc_ref):
        plgpu.wgmma(acc_ref, p_NS, k_ref)
        meanwhile()

    return pl.run_state(add)(plgpu.ACC.init(acc_NH))


def attend(token_ref, q_ref, recent_ref, sinks_ref, *refs, plan, scale):
    """One query, 64 heads of it; see the top of the file."""
    table_ref, pieces_ref, *refs = refs if plan.piece else (None, None, *refs)
    o_ref, q_buf, k_buf, p_buf, m_buf, *refs = refs
    rows_buf, names_buf, *refs = refs if plan.chosen else (None, None, *refs)
    loaded, filled, emptied, compared, weighed = refs
    me, blocks = jax.lax.axis_index("warpgroup"), q_ref.shape[1] // HEADS
    t, head_block = jnp.divmod(jax.lax.axis_index("block"), blocks)
    heads = pl.ds(head_block * HEADS, HEADS)
    tile, width = k_buf.shape[2:]
    half = tile // HALVES
    mine = pl.ds(pl.multiple_of(me * half, half), half)
    my_columns = pl.ds(pl.multiple_of(me * width, width), width)
    slot, first, oldest, newest, limit, recent, chunks, group = (
        token_ref[t, k] for k in range(8)
    )

    lane_layout = plgpu.Layout.WG_STRIDED((HALVES * width,), HALVES * width // 128)
    swizzle = min(tile, 64) * k_buf.dtype.itemsize
    tile_layout = plgpu.Layout.SMEM_GMEM_COPY((half, width), k_buf.dtype, swizzle)

    def meet(barrier):
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def fetch(j):
        """Asks for a chunk; returns the rows of it that are on their way here."""
        side = jax.lax.rem(j, SIDES)
        pl.when((j >= SIDES) & (j < chunks))(
            lambda: plgpu.barrier_wait(emptied.at[side])
        )

        @pl.when(j < jnp.minimum(recent, chunks))
        def _():
            step = plan.piece if plan.piece > 1 else tile
            for i in range(0, tile, step):
                copy(recent_ref.at[slot], first + j * tile + i, side, i, step)

        if plan.piece > 1:

            @pl.when((j >= recent) & (j < chunks))
            def _():
                pieces = tile // plan.piece
                for i in range(pieces):
                    place = pieces_ref[slot, (j - recent) * pieces + i]
                    copy(table_ref, place, side, i * plan.piece, plan.piece)

        if not plan.chosen:
            return []

        def gather():
            names = [names_buf[j - recent, me * half + r] for r in range(half)]
            return [
                plgpu.load(
                    table_ref.at[jnp.maximum(name, ~name)],
                    layout=lane_layout,
                    optimized=False,
                )
                for name in names
            ]

        def nothing():
            row = jnp.zeros(table_ref.shape[1:], table_ref.dtype)
            return [plgpu.layout_cast(row, lane_layout)] * half

        return jax.lax.cond((j >= recent) & (j < chunks), gather, nothing)

    def copy(source, place, side, at, rows):
        """Starts the copy of rows that lie together, one half of their width."""
        lines = pl.ds(pl.multiple_of(place, TILE_ROWS), rows)
        target = k_buf.at[side, me, pl.ds(at, rows)]
        plgpu.copy_gmem_to_smem(source.at[lines, my_columns], target, filled.at[side])

    def put(j, rows):
        """Puts gathered rows where they belong."""
        if not plan.chosen:
            return
        side = jax.lax.rem(j, SIDES)

        @pl.when((j >= recent) & (j < chunks))
        def _():
            for r, row in enumerate(rows):
                rows_buf[me, r] = row
            for c in range(HALVES):
                rows_SH = rows_buf.at[me, :, pl.ds(c * width, width)]
                k_buf[side, c, mine] = plgpu.load(
                    rows_SH, layout=tile_layout, optimized=False
                )
            plgpu.commit_smem()
            plgpu.barrier_arrive(filled.at[side])

    def seen(j):
        shape = (HEADS, half)
        col_NS = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        col_NS += j * tile + me * half
        low = jnp.where(j < recent, oldest, 0)
        high = jnp.where(j < recent, newest, limit)
        seen_NS = (col_NS >= low) & (col_NS < high)
        if not plan.chosen:
            return seen_NS
        names = names_buf.at[jnp.maximum(j - recent, 0), mine]
        name_S = plgpu.load(names, layout=COLUMN, optimized=False)
        name_S = jnp.maximum(name_S, jnp.where(j < recent, 0, -1))
        return seen_NS & jax.lax.broadcast_in_dim(name_S >= 0, shape, [1])

    def chunk(j, carry):
        acc_NH, m_N, l_N = carry
        side = jax.lax.rem(j, SIDES)
        plgpu.barrier_wait(filled.at[side])

        def scores(s_ref):
            for c in range(HALVES):
                k_ref = k_buf.at[side, c, mine].transpose((1, 0))
                plgpu.wgmma(s_ref, q_buf.at[c], k_ref)
            rows = fetch(j + 1)
            return s_ref[...], rows

        s_NS, rows = pl.run_scoped(scores, plgpu.ACC((HEADS, half), jnp.float32))
        s_NS = jnp.where(seen(j), s_NS * (scale * LOG2E), UNSEEN)
        new_N = s_NS.max(1)
        m_buf[me] = new_N
        meet(compared)
        theirs = plgpu.load(m_buf.at[1 - me], layout=ROW, optimized=False)
        new_N = jnp.maximum(jnp.maximum(m_N, new_N), theirs)
        keep_N = jnp.exp2(m_N - new_N)
        p_NS = jnp.exp2(s_NS - jax.lax.broadcast_in_dim(new_N, s_NS.shape, [0]))
        l_N = l_N * keep_N + p_NS.sum(1)
        p_buf[me] = p_NS.astype(p_buf.dtype)
        acc_NH = acc_NH * jax.lax.broadcast_in_dim(keep_N, acc_NH.shape, [0])
        meet(weighed)
        halves = [
            plgpu.load(p_buf.at[i], layout=plgpu.Layout.WGMMA) for i in range(HALVES)
        ]
        p_NS = jnp.concatenate(halves, axis=1)
        acc_NH = accumulate(
            acc_NH, p_NS, k_buf.at[side, me], lambda: put(j + 1, rows)
        )
        plgpu.barrier_arrive(emptied.at[side])
        return acc_NH, new_N, l_N

    @pl.when(me == 0)
    def _():
        for c in range(HALVES):
            source = q_ref.at[t, heads, pl.ds(c * width, width)]
            plgpu.copy_gmem_to_smem(source, q_buf.at[c], loaded)
        if plan.chosen:
            plgpu.copy_gmem_to_smem(pieces_ref.at[group], names_buf, loaded)

    m_N = plgpu.load(sinks_ref.at[heads], layout=ROW, optimized=False)
    # Each of the two sums the weights of its rows; one counts the sink.
    l_N = plgpu.layout_cast(jnp.full(HEADS, jnp.where(me == 0, 1.0, 0.0)), ROW)
    acc_NH = jnp.zeros((HEADS, width), jnp.float32)
    acc_NH = plgpu.layout_cast(acc_NH, plgpu.Layout.WGMMA)
    plgpu.barrier_wait(loaded)
    put(0, fetch(0))
    acc_NH, _, l_N = jax.lax.fori_loop(0, chunks, chunk, (acc_NH, m_N, l_N))
    m_buf[me] = l_N
    meet(compared)
    l_N += plgpu.load(m_buf.at[1 - me], layout=ROW, optimized=False)
    o_NH = acc_NH / jax.lax.broadcast_in_dim(l_N, acc_NH.shape, [0])
    q_buf[me] = o_NH.astype(q_buf.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_buf.at[me], o_ref.at[t, heads, my_columns])
    plgpu.wait_smem_to_gmem(0)
