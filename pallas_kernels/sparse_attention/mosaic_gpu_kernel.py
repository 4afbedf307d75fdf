"""The kernel of `mosaic_gpu`: a block of threads serves 64 heads of one query, or of a
part of what they read.

Of a chunk of rows, each of two warpgroups makes the scores of one half of the rows over
the whole width. They exchange the greatest score, then the weights, and each adds all
rows to one half of the output's width: so 64 x 512 sums lie in the registers of both,
and no product is made twice.

Moved: the query once; rows in a ring of two chunks, see `mosaic_gpu_rows`. A chunk is
asked for while the scores of the one before it are made.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_queries import (
    ROW,
    give_out,
    take_in,
    turning,
)
from pallas_kernels.sparse_attention.mosaic_gpu_rows import HALVES, SIDES, Rows

LOG2E = math.log2(math.e)
UNSEEN = -1e30
LEAST = 1e-30  # sum of weights, of a part that sees nothing
HEADS = 64  # of a block of threads: the rows of the smallest product


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
    ring,
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
    half = tile // HALVES
    columns = [pl.ds(c * width, width) for c in range(HALVES)]
    token = [token_ref[t, k] for k in range(token_ref.shape[1])]
    begin, end = (jax.lax.div((part + k) * token[3], parts) for k in range(2))
    rows = Rows(
        plan=plan,
        ring=ring,
        token=token,
        begin=begin,
        end=end,
        recent_ref=recent_ref,
        table_ref=table_ref,
        pieces_ref=pieces_ref,
        k_buf=k_buf,
        rows_buf=rows_buf,
        names_buf=names_buf,
        filled=filled,
        emptied=emptied,
    )

    def meet(barrier):
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def chunk(j, carry):
        """One step of the online softmax."""
        acc_NH, m_N, l_N = carry
        side = jax.lax.rem(j, SIDES)
        plgpu.barrier_wait(filled.at[side])
        rows.clear(j, lambda: meet(compared))

        def scores(s_ref):
            # Not in one order: 64 registers would keep where the query's parts lie.
            for i in range(HALVES):
                c = jax.lax.rem(side + i, HALVES)
                k_ref = k_buf.at[side, c, rows.my_rows].transpose((1, 0))
                plgpu.wgmma(s_ref, q_buf.at[c], k_ref)
            fetched = rows.fetch(j + 1)
            return s_ref[...], fetched

        s_NS, fetched = pl.run_scoped(scores, plgpu.ACC((HEADS, half), jnp.float32))
        s_NS = jnp.where(rows.seen(j, s_NS.shape), s_NS * (scale * LOG2E), UNSEEN)
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
        acc_NH = accumulate(
            acc_NH, p_NS, k_buf.at[side, me], lambda: rows.put(j + 1, fetched)
        )
        plgpu.barrier_arrive(emptied.at[side])
        return acc_NH, new_N, l_N

    @pl.when(me == 0)
    def _():
        for c in range(HALVES):
            plgpu.copy_gmem_to_smem(q_ref.at[t, heads, columns[c]], q_buf.at[c], loaded)
        if plan.chosen:
            plgpu.copy_gmem_to_smem(pieces_ref.at[token[7]], names_buf, loaded)
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
    rows.put(begin, rows.fetch(begin))
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
    plgpu.copy_smem_to_gmem(q_buf.at[me], o_ref.at[part, t, heads, rows.my_columns])

    @pl.when(me == 0)
    def _():
        lse_N = m_N + LOG2E * jnp.log(l_N)
        plgpu.store(lse_ref.at[part, t, heads], lse_N, optimized=False)

    plgpu.wait_smem_to_gmem(0)
