"""A group of queries' gradients on a TPU, and what they add to those of its rows.

Moved: what the forward kernel moves, twice, and the outputs' gradients; besides, per
chunk of entries, their gradients so far, in float32, from and to memory. Computed: a
first pass over a group's rows finds each query's normaliser and the mean of its
weights' gradients, as an online softmax; a second one has

    p = softmax(s)    ds = p (dp - sum p dp)    dp = do k
    dq = sum ds k     dk = ds q + p do
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import product
from pallas_kernels.ragged import LANES
from pallas_kernels.sparse_attention import mosaic_tpu_chunks as chunks
from pallas_kernels.sparse_attention.mosaic_tpu_queries import clear_padding, turn
from pallas_kernels.sparse_attention.mosaic_tpu_recent import seen_by
from pallas_kernels.sparse_attention.mosaic_tpu_softmax import LOG2E, UNSEEN
from pallas_kernels.sparse_attention.plan import ROWS


def differentiate(*refs, plan, scale, per, norm, turned):
    """A group of queries; see the top of the file."""
    first_ref, count_ref, before_ref, own_ref, chunks_ref, limit_ref, *refs = refs
    used_ref, slot_ref, recent_ref, *refs = refs
    sinks_ref, q_any, do_any, recent_any, *refs = refs
    turns_ref, refs = (refs[0], refs[1:]) if turned else (None, refs)
    tables, lists = [], []
    if plan.piece:
        tables, lists, refs = (
            refs[:1],
            refs[1 : 2 + plan.chosen],
            refs[2 + plan.chosen :],
        )
    sums = 1 + len(tables)
    refs = refs[sums:]  # the same memory as these outputs
    dq_any, dsinks_ref, *refs = refs
    totals, (q_buf, do_buf, r_buf, *refs) = refs[:sums], refs[sums:]
    e_bufs, refs = refs[: len(tables)], refs[len(tables) :]
    add_bufs, (m_ref, l_ref, d_ref, *norms, dq_ref, sem) = refs[:sums], refs[sums:]
    core, i = pl.program_id(0), pl.program_id(1)
    g = core * per + i
    Q, N, H = q_buf.shape
    count, there = count_ref[g], chunks_ref[g]
    pieces = plan.tile // plan.piece if plan.piece else 0

    def move(*ends):
        copies = [pltpu.make_async_copy(*pair, sem) for pair in ends]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()

    def factor(scale):
        """Of products with queries, which are not normed: of each row, or of all."""
        return norms[0][...] * scale if norms else scale

    def scores(k_SH, seen):
        """In units of log 2, and the gradients of their weights."""
        q_MH, do_MH = q_buf[...].reshape(-1, H), do_buf[...].reshape(-1, H)
        s_MS = product(q_MH, k_SH, (1, 1)) * factor(scale * LOG2E)
        parts = [s_MS[q * N : (q + 1) * N] for q in range(Q)]
        parts = [jnp.where(seen(q), part, UNSEEN) for q, part in enumerate(parts)]
        return jnp.concatenate(parts), product(do_MH, k_SH, (1, 1))

    def measure(k_SH, seen):
        s_MS, dp_MS = scores(k_SH, seen)
        m_M1 = jnp.maximum(m_ref[...], s_MS.max(-1, keepdims=True))
        p_MS, keep_M1 = jnp.exp2(s_MS - m_M1), jnp.exp2(m_ref[...] - m_M1)
        m_ref[...] = m_M1
        l_ref[...] = keep_M1 * l_ref[...] + p_MS.sum(-1, keepdims=True)
        d_ref[...] = keep_M1 * d_ref[...] + (p_MS * dp_MS).sum(-1, keepdims=True)

    def gradients(k_SH, seen):
        """Adds to the queries' gradients; returns those of the rows."""
        s_MS, dp_MS = scores(k_SH, seen)
        p_MS = jnp.exp2(s_MS - m_ref[...])
        ds_MS = (p_MS * (dp_MS - d_ref[...]) * factor(scale)).astype(k_SH.dtype)
        dq_ref[...] += product(ds_MS, k_SH, (1, 0))
        q_MH, do_MH = q_buf[...].reshape(-1, H), do_buf[...].reshape(-1, H)
        dk_SH = product(ds_MS, q_MH, (0, 0))
        return dk_SH + product(p_MS.astype(k_SH.dtype), do_MH, (0, 0))

    def recent(query):
        return seen_by(query, before_ref[g], own_ref[g], plan)

    def place(j, piece):
        start = lists[0][0, 0, j * pieces + piece]
        start = pl.multiple_of(start, plan.piece) if plan.piece > 1 else start
        return pl.ds(start, plan.piece), pl.ds(piece * plan.piece, plan.piece)

    def of_chunk(j):
        """Its rows, and which of them a query sees."""
        chunk = e_bufs[0].at[0]
        chunks.start(j, chunk, tables[0], lists[0], sem, plan=plan)
        chunks.wait(chunk, sem)

        def seen(query):
            if plan.chosen:
                here = pl.ds(pl.multiple_of(j * plan.tile, LANES), plan.tile)
                return (lists[1][0, :, here] & (1 << query)) != 0
            row_1S = jax.lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1)
            return row_1S + j * plan.tile < limit_ref[g * Q + query]

        return chunks.rows_of(e_bufs[0], 0), seen

    def add(j, dk_SH):
        """To the gradients of a chunk's pieces; what fills the chunk up is left."""
        total, buffer = totals[1].at[core], add_bufs[1]
        n = jnp.clip(used_ref[g] - j * pieces, 0, pieces)

        def each(there, act):
            def one(piece, _):
                memory, mine = place(j, piece)
                ends = (total.at[memory], buffer.at[mine])
                act(pltpu.make_async_copy(*(ends if there else ends[::-1]), sem))
                return _

            jax.lax.fori_loop(0, n, one, 0)

        each(True, lambda copy: copy.start())
        each(True, lambda copy: copy.wait())
        buffer[...] += dk_SH.reshape(buffer.shape)
        each(False, lambda copy: copy.start())
        each(False, lambda copy: copy.wait())

    @pl.when(i == 0)
    def _():
        clear_padding(slot_ref, dq_any, q_buf.at[0], sem)
        dsinks_ref[...] = jnp.zeros(dsinks_ref.shape, jnp.float32)
        r_buf[...] = jnp.zeros(r_buf.shape, r_buf.dtype)
        if plan.piece:  # what no piece fills is added to as well
            add_bufs[1][...] = jnp.zeros(add_bufs[1].shape, jnp.float32)

    @pl.when(count > 0)
    def _():
        rows = pl.ds(pl.multiple_of(recent_ref[g], ROWS), plan.recent)
        move((recent_any.at[rows], r_buf.at[pl.ds(0, plan.recent)]))
        for query in range(Q):

            @pl.when(query < count)
            def _(query=query):
                at = first_ref[g] + query
                move((q_any.at[at], q_buf.at[query]), (do_any.at[at], do_buf.at[query]))
                if turns_ref is not None:
                    # Turning outputs back has the transpose of turning.
                    turn(q_buf, query, turns_ref)
                    turn(do_buf, query, turns_ref)

            @pl.when(query >= count)
            def _(query=query):
                q_buf[query] = jnp.zeros((N, H), q_buf.dtype)
                do_buf[query] = jnp.zeros((N, H), do_buf.dtype)

        if norm is not None:
            squares_MH = jnp.square(q_buf[...].reshape(-1, H).astype(jnp.float32))
            norms[0][...] = jax.lax.rsqrt(squares_MH.mean(-1, keepdims=True) + norm)
        sinks_M1 = sinks_ref[...]
        m_ref[...] = sinks_M1
        l_ref[...] = jnp.ones(l_ref.shape, jnp.float32)
        d_ref[...] = jnp.zeros(d_ref.shape, jnp.float32)
        dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)
        measure(r_buf[...], recent)
        if plan.piece:

            @pl.loop(0, there)
            def _(j):
                measure(*of_chunk(j))

        d_ref[...] = d_ref[...] / l_ref[...]
        m_ref[...] += jnp.log2(l_ref[...])
        dsinks_ref[0] -= jnp.exp2(sinks_M1 - m_ref[...]) * d_ref[...]
        total = totals[0].at[core, rows]
        move((total, add_bufs[0]))
        add_bufs[0][...] += gradients(r_buf[...], recent)[: plan.recent]
        move((add_bufs[0], total))
        if plan.piece:

            @pl.loop(0, there)
            def _(j):
                add(j, gradients(*of_chunk(j)))

        dq_MH = dq_ref[...]
        if norm is not None:  # A longer query is the same query.
            q_MH = q_buf[...].reshape(-1, H).astype(jnp.float32)
            along_M1 = (dq_MH * q_MH).sum(-1, keepdims=True) / H
            dq_MH -= along_M1 * jnp.square(norms[0][...]) * q_MH
        q_buf[...] = dq_MH.astype(q_buf.dtype).reshape(Q, N, H)
        for query in range(Q):

            @pl.when(query < count)
            def _(query=query):
                if turns_ref is not None:
                    turn(q_buf, query, turns_ref, back=True)
                move((q_buf.at[query], dq_any.at[first_ref[g] + query]))
