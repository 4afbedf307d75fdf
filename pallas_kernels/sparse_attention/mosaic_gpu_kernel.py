"""The kernel of `mosaic_gpu`: a block of threads serves 64 heads of one query, or of a
part of what they read.

Of a chunk of rows, each of two warpgroups makes the scores of one half of the rows over
the whole width. They exchange the greatest score, then the weights, and each adds all
rows to one half of the output's width: so 64 x 512 sums lie in the registers of both,
and no product is made twice.

Moved: the query once; rows in a ring of two chunks, recent ones first, then entries. A
chunk is asked for while the scores of the one before it are made. Rows that lie
together come by TMA. Chosen ones come through registers, all of a chunk at once, since
Hopper's TMA gathers nothing; while the chunk before is added up, they go to a buffer
[rows, width], and from there into tiles as the matrix units want them.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_queries import (
    COLUMN,
    ROW,
    give_out,
    take_in,
    turning,
)

LOG2E = math.log2(math.e)
UNSEEN = -1e30
LEAST = 1e-30  # sum of weights, of a part that sees nothing
HEADS = 64  # of a block of threads: the rows of the smallest product
SIDES = 2  # of the ring
HALVES = 2
TILE_ROWS, SWIZZLED = 8, 64  # of a tile of the matrix units: rows, columns at most


def accumulate(acc_NH, p_NS, k_ref, meanwhile):
    """acc + p @ k, and something to do until it is there.

    JAX's simulator of GPUs knows no product of what is in registers; tests there have
    their own.
    """

    def add(acc_ref):
        plgpu.wgmma(acc_ref, p_NS, k_ref)
        meanwhile()

    return pl.run_state(add)(plgpu.ACC.init(acc_NH))


def attend(
    token_ref,
    q_ref,
    recent_ref,
    sinks_ref,
    *refs,
    plan,
    scale,
    parts,
    norm,
    turns,
):
    """One query, 64 heads of it; see the top of the file."""
    turns_ref, angles_ref, *refs = refs if turns else (None, None, *refs)
    table_ref, pieces_ref, *refs = refs if plan.piece else (None, None, *refs)
    o_ref, lse_ref, q_buf, k_buf, p_buf, m_buf, *refs = refs
    rows_buf, names_buf, *refs = refs if plan.chosen else (None, None, *refs)
    angles_buf, *refs = refs if turns else (None, *refs)
    loaded, filled, emptied, compared, weighed = refs
    blocks = q_ref.shape[1] // HEADS
    block, part = jax.lax.axis_index("block"), jax.lax.axis_index("part")
    t, heads = block // blocks, pl.ds(block % blocks * HEADS, HEADS)
    me = jax.lax.axis_index("warpgroup")
    tile, width = k_buf.shape[2:]
    half, piece = tile // HALVES, plan.piece if plan.piece > 1 else tile
    my_rows = pl.ds(pl.multiple_of(me * half, half), half)
    columns = [pl.ds(c * width, width) for c in range(HALVES)]
    my_columns = pl.ds(pl.multiple_of(me * width, width), width)
    slot, first, recent, chunks = (token_ref[t, k] for k in range(4))
    begin, end = (jax.lax.div((part + k) * chunks, parts) for k in range(2))

    def tile_layout(rows):
        swizzle = min(tile, SWIZZLED) * k_buf.dtype.itemsize
        return plgpu.Layout.SMEM_GMEM_COPY((rows, width), k_buf.dtype, swizzle)

    def meet(barrier):
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def is_recent(j):
        return j < jnp.minimum(recent, end)

    def is_entries(j):
        return (j >= recent) & (j < end)

    def fetch(j):
        """Asks for a chunk; returns the rows of it that come through registers."""
        side = jax.lax.rem(j, SIDES)
        pl.when((j >= begin + SIDES) & (j < end))(
            lambda: plgpu.barrier_wait(emptied.at[side])
        )

        def copy(source, place, at):
            """Starts the copy of a piece, one half of its width."""
            lines = pl.ds(pl.multiple_of(place, TILE_ROWS), piece)
            target = k_buf.at[side, me, pl.ds(at, piece)]
            source = source.at[lines, my_columns]
            plgpu.copy_gmem_to_smem(source, target, filled.at[side])

        @pl.when(is_recent(j))
        def _():
            for at in range(0, tile, piece):
                copy(recent_ref.at[slot], first + j * tile + at, at)

        if plan.piece > 1:

            @pl.when(is_entries(j))
            def _():
                for at in range(0, tile, piece):
                    name = ((j - recent) * tile + at) // piece
                    copy(table_ref, pieces_ref[slot, name], at)

        if not plan.chosen:
            return []
        layout = plgpu.Layout.WG_STRIDED((HALVES * width,), HALVES * width // 128)

        def gather():
            names = [names_buf[j - recent, me * half + r] for r in range(half)]
            rows = [table_ref.at[jnp.maximum(name, ~name)] for name in names]
            return [plgpu.load(row, layout=layout, optimized=False) for row in rows]

        def nothing():
            row = jnp.zeros(table_ref.shape[1:], table_ref.dtype)
            return [plgpu.layout_cast(row, layout)] * half

        return jax.lax.cond(is_entries(j), gather, nothing)

    def put(j, rows):
        """Puts rows that came through registers where they belong."""
        if not plan.chosen:
            return
        side = jax.lax.rem(j, SIDES)
        layout = tile_layout(half)

        @pl.when(is_entries(j))
        def _():
            for r, row in enumerate(rows):
                rows_buf[me, r] = row
            for c in range(HALVES):
                part = rows_buf.at[me, :, columns[c]]
                part_SH = plgpu.load(part, layout=layout, optimized=False)
                k_buf[side, c, my_rows] = part_SH
            plgpu.commit_smem()
            plgpu.barrier_arrive(filled.at[side])

    def clear(j, side):
        """Zeros to rows that no query sees: what lies there may be no number."""
        step = TILE_ROWS * 4 // math.gcd(4, width // SWIZZLED)  # a tile to each warp
        layout = tile_layout(step)
        limit = token_ref[t, 6] - j * tile

        @pl.when(is_entries(j) & (limit < tile))
        def _():
            @pl.loop(jax.lax.div(jnp.maximum(limit, 0), step), tile // step)
            def _(i):
                start = pl.multiple_of(i * step, step)
                rows = k_buf.at[side, me, pl.ds(start, step)]
                row_SH = plgpu.load(rows, layout=layout, optimized=False)
                at_SH = plgpu.broadcasted_iota(
                    jnp.int32, row_SH.shape, 0, layout=layout
                )
                absent_SH = at_SH + start >= limit
                rows[...] = jnp.where(absent_SH, jnp.zeros_like(row_SH), row_SH)

            plgpu.commit_smem()
            meet(compared)

    def seen(j):
        """Which of a chunk's rows, of one half of them, the query sees."""
        shape = (HEADS, half)
        col_NS = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        col_NS += j * tile + me * half
        oldest, newest, limit = (token_ref[t, k] for k in (4, 5, 6))
        low = jnp.where(j < recent, oldest, 0)
        high = jnp.where(j < recent, newest, limit)
        seen_NS = (col_NS >= low) & (col_NS < high)
        if not plan.chosen:
            return seen_NS
        names = names_buf.at[jnp.maximum(j - recent, 0), my_rows]
        name_S = plgpu.load(names, layout=COLUMN, optimized=False)
        name_S = jnp.maximum(name_S, jnp.where(j < recent, 0, -1))
        return seen_NS & jax.lax.broadcast_in_dim(name_S >= 0, shape, [1])

    def chunk(j, carry):
        """One step of the online softmax."""
        acc_NH, m_N, l_N = carry
        side = jax.lax.rem(j, SIDES)
        plgpu.barrier_wait(filled.at[side])
        if not plan.chosen:
            clear(j, side)

        def scores(s_ref):
            # Not in one order: 64 registers would keep where the query's parts lie.
            for i in range(HALVES):
                c = jax.lax.rem(side + i, HALVES)
                k_ref = k_buf.at[side, c, my_rows].transpose((1, 0))
                plgpu.wgmma(s_ref, q_buf.at[c], k_ref)
            rows = fetch(j + 1)
            return s_ref[...], rows

        s_NS, rows = pl.run_scoped(scores, plgpu.ACC((HEADS, half), jnp.float32))
        s_NS = jnp.where(seen(j), s_NS * (scale * LOG2E), UNSEEN)
        new_N = s_NS.max(1)
        m_buf[me] = new_N
        meet(compared)
        theirs_N = plgpu.load(m_buf.at[1 - me], layout=ROW, optimized=False)
        new_N = jnp.maximum(jnp.maximum(m_N, new_N), theirs_N)
        keep_N = jnp.exp2(m_N - new_N)
        p_NS = jnp.exp2(s_NS - jax.lax.broadcast_in_dim(new_N, s_NS.shape, [0]))
        l_N = l_N * keep_N + p_NS.sum(1)
        p_buf[me] = p_NS.astype(p_buf.dtype)
        acc_NH = acc_NH * jax.lax.broadcast_in_dim(keep_N, acc_NH.shape, [0])
        meet(weighed)
        p_NS = jnp.concatenate(
            [plgpu.load(p_buf.at[i], layout=plgpu.Layout.WGMMA) for i in range(HALVES)],
            axis=1,
        )
        acc_NH = accumulate(acc_NH, p_NS, k_buf.at[side, me], lambda: put(j + 1, rows))
        plgpu.barrier_arrive(emptied.at[side])
        return acc_NH, new_N, l_N

    @pl.when(me == 0)
    def _():
        for c in range(HALVES):
            plgpu.copy_gmem_to_smem(q_ref.at[t, heads, columns[c]], q_buf.at[c], loaded)
        if plan.chosen:
            plgpu.copy_gmem_to_smem(pieces_ref.at[token_ref[t, 7]], names_buf, loaded)
        if turns:
            plgpu.copy_gmem_to_smem(angles_ref, angles_buf, loaded)

    turn = turning(turns_ref.at[t], angles_buf) if turns else None
    m_N = plgpu.load(sinks_ref.at[heads], layout=ROW, optimized=False)
    # Each of the two sums the weights of its rows; one counts the sink.
    counts = jnp.where((me == 0) & (part == 0), 1.0, 0.0)
    l_N = plgpu.layout_cast(jnp.full(HEADS, counts), ROW)
    acc_NH = jnp.zeros((HEADS, width), jnp.float32)
    acc_NH = plgpu.layout_cast(acc_NH, plgpu.Layout.WGMMA)
    plgpu.barrier_wait(loaded)
    if turns or norm is not None:
        take_in(q_buf, m_buf, turn, norm=norm, meet=lambda: meet(compared))
    put(begin, fetch(begin))
    acc_NH, m_N, l_N = jax.lax.fori_loop(begin, end, chunk, (acc_NH, m_N, l_N))
    m_buf[me] = l_N
    meet(compared)
    l_N += plgpu.load(m_buf.at[1 - me], layout=ROW, optimized=False)
    l_N = jnp.maximum(l_N, LEAST)
    o_NH = acc_NH / jax.lax.broadcast_in_dim(l_N, acc_NH.shape, [0])
    q_buf[me] = o_NH.astype(q_buf.dtype)
    if turns:
        give_out(q_buf, turn)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_buf.at[me], o_ref.at[part, t, heads, my_columns])

    @pl.when(me == 0)
    def _():
        lse_N = m_N + LOG2E * jnp.log(l_N)
        plgpu.store(lse_ref.at[part, t, heads], lse_N, optimized=False)

    plgpu.wait_smem_to_gmem(0)
