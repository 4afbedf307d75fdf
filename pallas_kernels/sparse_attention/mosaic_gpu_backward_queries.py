"""Gradients of queries on Hopper: a block of threads serves 64 heads of one query.

Moved: as in the forward kernel, the query and the rows that it sees, chosen ones one by
one through registers; besides, its output's gradient. Computed, of a chunk of 32 rows:

    p = exp(s - lse)    ds = p (do k - sum p (do k))    dq += ds k

of which the forward pass has kept the normaliser, and the sum is do o. The 64 x 512
sums lie in the registers of two warpgroups, as there. At the end the norm of queries is
differentiated, where their length and direction are at hand.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_backward_weights import (
    BASE,
    CHUNKS,
    FACTOR,
    FIRST,
    NORM,
    RECENT,
    SHIFT,
    fetch_heads,
    sees,
    weigh,
)
from pallas_kernels.sparse_attention.mosaic_gpu_kernel import HEADS
from pallas_kernels.sparse_attention.mosaic_gpu_queries import COLUMN, ROW, TURNING
from pallas_kernels.sparse_attention.mosaic_gpu_rows import HALVES, SIDES, TILE_ROWS

CHUNK = 32  # rows


def differentiate_queries(
    tokens_ref,
    q_ref,
    q_tail_ref,
    do_ref,
    do_tail_ref,
    stats_ref,
    rows_ref,
    *refs,
    entries,
    chosen,
    norm,
):
    """One query, 64 heads of it; see the top of the file."""
    names_ref, *refs = refs if chosen else (None, *refs)
    dq_ref, both_buf, k_buf, w_buf, sums_buf, *refs = refs
    rows_buf, names_buf, *refs = refs if chosen else (None, None, *refs)
    loaded, filled, emptied, weighed, summed = refs
    blocks = q_ref.shape[1] // HEADS
    block = jax.lax.axis_index("block")
    t, first_head = block // blocks, block % blocks * HEADS
    heads = pl.ds(first_head, HEADS)
    me = jax.lax.axis_index("warpgroup")
    width = k_buf.shape[-1]
    my_columns = pl.ds(pl.multiple_of(me * width, width), width)
    half = CHUNK // HALVES
    base, first, recent, chunks = (
        tokens_ref[t, k] for k in (BASE, FIRST, RECENT, CHUNKS)
    )
    tile_layout = plgpu.Layout.SMEM_GMEM_COPY(
        (TILE_ROWS, width), k_buf.dtype, CHUNK * k_buf.dtype.itemsize
    )

    def row_of(j):
        """Of a slot's rows, the first of a chunk."""
        return jnp.where(j < recent, first + j * CHUNK, entries + (j - recent) * CHUNK)

    def is_named(j):
        return (j >= recent) & (j < chunks)

    def fetch(j):
        """Asks for a chunk; returns the rows of it that come through registers."""
        side = jax.lax.rem(j, SIDES)
        pl.when((j >= SIDES) & (j < chunks))(
            lambda: plgpu.barrier_wait(emptied.at[side])
        )

        @pl.when(j < (jnp.minimum(recent, chunks) if chosen else chunks))
        def _():
            rows = pl.ds(pl.multiple_of(base + row_of(j), TILE_ROWS), CHUNK)
            plgpu.copy_gmem_to_smem(
                rows_ref.at[rows, my_columns], k_buf.at[side, me], filled.at[side]
            )

        if not chosen:
            return []
        layout = plgpu.Layout.WG_STRIDED((HALVES * width,), HALVES * width // 128)

        def gather():
            names = [names_buf[j - recent, me * half + r] for r in range(half)]
            rows = [rows_ref.at[jnp.maximum(name, ~name)] for name in names]
            return [plgpu.load(row, layout=layout, optimized=False) for row in rows]

        def nothing():
            row = jnp.zeros(HALVES * width, rows_ref.dtype)
            return [plgpu.layout_cast(row, layout)] * half

        return jax.lax.cond(is_named(j), gather, nothing)

    def put(j, rows):
        """Puts rows that came through registers where they belong, a tile at a time."""
        if not chosen:
            return
        side = jax.lax.rem(j, SIDES)

        @pl.when(is_named(j))
        def _():
            for at in range(0, half, TILE_ROWS):
                for r in range(TILE_ROWS):
                    rows_buf[me, r] = rows[at + r]
                target = pl.ds(pl.multiple_of(me * half + at, TILE_ROWS), TILE_ROWS)
                for c in range(HALVES):
                    part = rows_buf.at[me, :, pl.ds(c * width, width)]
                    part_SH = plgpu.load(part, layout=tile_layout, optimized=False)
                    k_buf[side, c, target] = part_SH
            plgpu.commit_smem()
            plgpu.barrier_arrive(filled.at[side])

    def seen(j):
        shape = (HEADS, CHUNK)
        col_NS = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        seen_NS = sees(col_NS + row_of(j), j < recent, tokens_ref, t, entries)
        if not chosen:
            return seen_NS
        names = names_buf.at[jnp.maximum(j - recent, 0)]
        name_S = plgpu.load(names, layout=COLUMN, optimized=False)
        name_S = jnp.maximum(name_S, jnp.where(j < recent, 0, -1))
        return seen_NS & jax.lax.broadcast_in_dim(name_S >= 0, shape, [1])

    def of_heads(stat, shape=(HEADS, CHUNK)):
        x_N = plgpu.load(stats_ref.at[t, stat, heads], layout=ROW, optimized=False)
        return jax.lax.broadcast_in_dim(x_N, shape, [0])

    def add(dq_ref):
        """Adds up all chunks."""
        factor, shift = of_heads(FACTOR + me), of_heads(SHIFT + me)

        @pl.loop(0, chunks)
        def _(j):
            side = jax.lax.rem(j, SIDES)
            plgpu.barrier_wait(filled.at[side])

            def products(x_ref):
                # Not in one order: registers would keep where the query's parts lie.
                for i in range(HALVES):
                    c = jax.lax.rem(side + i, HALVES)
                    k_ref = k_buf.at[side, c].transpose((1, 0))
                    plgpu.wgmma(x_ref, both_buf.at[me, c], k_ref)
                rows = fetch(j + 1)
                return x_ref[...], rows

            x_NS, rows = pl.run_scoped(products, plgpu.ACC((HEADS, CHUNK), jnp.float32))
            weigh(x_NS, seen(j), factor, shift, w_buf, weighed)
            plgpu.wgmma(dq_ref, w_buf.at[1], k_buf.at[side, me])
            put(j + 1, rows)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(emptied.at[side])

        return dq_ref[...]

    for operand, refs in enumerate(((q_ref, q_tail_ref), (do_ref, do_tail_ref))):

        @pl.when(me == operand)
        def _(operand=operand, refs=refs):
            fetch_heads(*refs, t, first_head, both_buf.at[operand], loaded)

    if chosen:
        pl.when(me == 0)(
            lambda: plgpu.copy_gmem_to_smem(names_ref.at[t], names_buf, loaded)
        )
    plgpu.barrier_wait(loaded)
    put(0, fetch(0))
    dq_NH = pl.run_scoped(add, plgpu.ACC((HEADS, width), jnp.float32))
    pieces = [pl.ds(at, TURNING) for at in range(0, width, TURNING)]

    def of_query(piece):
        return both_buf.at[0, me, :, piece]

    def query(piece):
        loaded = plgpu.load(of_query(piece), layout=plgpu.Layout.WGMMA)
        return loaded.astype(jnp.float32)

    def gradient(piece):
        return dq_NH[:, piece.start : piece.start + TURNING]

    if norm:
        along_N = sum((query(each) * gradient(each)).sum(1) for each in pieces)
        sums_buf[me] = along_N
        plgpu.barrier_arrive(summed)
        plgpu.barrier_wait(summed)
        along_N += plgpu.load(sums_buf.at[1 - me], layout=ROW, optimized=False)
        along_N *= plgpu.load(stats_ref.at[t, NORM, heads], layout=ROW, optimized=False)
    for each in pieces:
        d_NL = gradient(each)
        if norm:
            d_NL -= query(each) * jax.lax.broadcast_in_dim(along_N, d_NL.shape, [0])
            # Padding, which has no chunks, may be no number.
            head_NL = plgpu.broadcasted_iota(
                jnp.int32, d_NL.shape, 0, layout=plgpu.Layout.WGMMA
            )
            d_NL = jnp.where(head_NL < chunks * HEADS, d_NL, 0.0)
        of_query(each)[...] = d_NL.astype(both_buf.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(both_buf.at[0, me], dq_ref.at[t, heads, my_columns])
    plgpu.wait_smem_to_gmem(0)
