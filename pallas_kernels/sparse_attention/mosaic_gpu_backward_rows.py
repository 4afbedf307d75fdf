"""Gradients of rows on Hopper: a block of threads serves 64 rows, and their sums.

Moved: the rows once; of each query that may see one of them, 32 heads at a time, in a
ring of two, the query and its output's gradient. Computed, for 32 heads at a time:

    p = exp(s - lse)    ds = p (do k - sum p (do k))    dk += ds q + p do

for all pairs of a row and a query, of which those that do not see each other are
masked: by limits, or by a bit for each pair. So every sum has one owner, who adds in
one order, in registers, and the same gradients come out every time. Queries could add
what they chose to memory instead, row by row, in an order that is chance.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_backward_weights import (
    FACTOR,
    SHIFT,
    fetch_heads,
    sees,
    weigh,
)
from pallas_kernels.sparse_attention.mosaic_gpu_queries import COLUMN
from pallas_kernels.sparse_attention.mosaic_gpu_rows import HALVES, SIDES

BLOCK, TOGETHER, WORD = 64, 32, 32  # rows; heads; bits


def differentiate_rows(
    blocks_ref,
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
    parts,
):
    """64 rows, by a part of the queries; see the top of the file."""
    words_ref, *refs = refs if chosen else (None, *refs)
    drows_ref, k_buf, both_buf, w_buf, *refs = refs
    loaded, filled, emptied, weighed = refs
    block, part = jax.lax.axis_index("block"), jax.lax.axis_index("part")
    me = jax.lax.axis_index("warpgroup")
    width = k_buf.shape[-1]
    my_columns = pl.ds(pl.multiple_of(me * width, width), width)
    lines = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
    per_token = q_ref.shape[1] // TOGETHER
    first, tokens, row = (blocks_ref[block, k] for k in range(3))
    turns = tokens * per_token
    begin, end = (jax.lax.div((part + k) * turns, parts) for k in range(2))

    def of_turn(i):
        """A turn's token, and the first of its heads."""
        head = pl.multiple_of(jax.lax.rem(i, per_token) * TOGETHER, TOGETHER)
        return first + jax.lax.div(i, per_token), head

    def fetch(i):
        side, (t, head) = jax.lax.rem(i, SIDES), of_turn(i)
        for operand, refs in enumerate(((q_ref, q_tail_ref), (do_ref, do_tail_ref))):

            @pl.when(me == operand)
            def _(operand=operand, refs=refs):
                target = both_buf.at[side, operand]
                fetch_heads(*refs, t, head, target, filled.at[side])

    def seen(t):
        shape = (BLOCK, TOGETHER)
        at_SN = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        is_recent = row < entries
        seen_SN = sees(at_SN + row, is_recent, tokens_ref, t, entries)
        if not chosen:
            return seen_SN
        word = jax.lax.div(jnp.maximum(row - entries, 0), WORD)
        low, high = (
            jnp.where(is_recent, -1, words_ref[t, word + k])
            for k in range(BLOCK // WORD)
        )
        bits_SN = jnp.where(at_SN < WORD, low, high) >> (at_SN & (WORD - 1))
        return seen_SN & ((bits_SN & 1) != 0)

    def add(dk_ref):
        """Adds up all turns."""

        @pl.loop(begin, end)
        def _(i):
            side, (t, head) = jax.lax.rem(i, SIDES), of_turn(i)
            plgpu.barrier_wait(filled.at[side])

            def of_heads(stat):
                x_N = stats_ref.at[t, stat, pl.ds(head, TOGETHER)]
                x_N = plgpu.load(x_N, layout=COLUMN, optimized=False)
                return jax.lax.broadcast_in_dim(x_N, (BLOCK, TOGETHER), [1])

            def products(x_ref):
                # Not in one order: registers would keep where the rows' parts lie.
                for n in range(HALVES):
                    c = jax.lax.rem(side + n, HALVES)
                    heads_ref = both_buf.at[side, me, c].transpose((1, 0))
                    plgpu.wgmma(x_ref, k_buf.at[c], heads_ref)
                # The other has read the weights and heads of the turn before.
                pl.when(i > begin)(lambda: plgpu.barrier_wait(emptied))
                pl.when(i + 1 < end)(lambda: fetch(i + 1))
                others = seen(t), of_heads(FACTOR + me), of_heads(SHIFT + me)
                return x_ref[...], *others

            x_SN, *others = pl.run_scoped(
                products, plgpu.ACC((BLOCK, TOGETHER), jnp.float32)
            )
            weigh(x_SN, *others, w_buf, weighed)
            for operand in range(HALVES):
                heads_ref = both_buf.at[side, 1 - operand, me]
                plgpu.wgmma(dk_ref, w_buf.at[operand], heads_ref)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(emptied)

        return dk_ref[...]

    @pl.when(begin < end)
    def _():
        fetch(begin)
        plgpu.copy_gmem_to_smem(rows_ref.at[lines, my_columns], k_buf.at[me], loaded)
        plgpu.barrier_wait(loaded)

    dk_SH = pl.run_scoped(add, plgpu.ACC((BLOCK, width), jnp.float32))
    plgpu.store(drows_ref.at[part, lines, my_columns], dk_SH, optimized=False)
