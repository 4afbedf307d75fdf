"""The kernel of `mosaic_tpu`: one step of its grid serves a group of queries.

Moved: the group's queries and recent rows, asked for a step ahead; its entries, a chunk
ahead, the first of them while the recent rows are computed; outputs, which have two
steps to leave. Computed per chunk: scores [queries x heads, rows], an online softmax,
their product with the same rows.

The softmax of some queries runs on the vector units while the matrix units make the
scores of the next: so a chunk is done a few queries at a time. Absent queries compute
whatever their memory holds, and are not written.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import precision
from pallas_kernels.ragged import LANES
from pallas_kernels.sparse_attention import mosaic_tpu_chunks as chunks
from pallas_kernels.sparse_attention import mosaic_tpu_queries as queries
from pallas_kernels.sparse_attention import mosaic_tpu_recent as recent

LOG2E = math.log2(math.e)
UNSEEN = -1e30
# Rows (queries x heads) of which scores are made at once.
BLOCK_ROWS = 192


def attend(*refs, plan, scale, per, norm, turns):
    """One step: a group of queries over all that they see."""
    first_ref, count_ref, before_ref, own_ref, chunks_ref, limit_ref, *refs = refs
    _, slot_ref, recent_ref, sinks_ref, q_any, recent_any, *refs = refs
    turns_ref, table_any, pieces_ref, members_ref = None, None, None, None
    if turns:
        turns_ref, *refs = refs
    if plan.piece:
        table_any, pieces_ref, *refs = refs
    if plan.chosen:
        members_ref, *refs = refs
    o_any, q_tiles, q_tokens, q_there, q_ref, r_buf, e_buf, o_buf, *refs = refs
    m_ref, l_ref, acc_ref, sems = refs
    i = pl.program_id(1)
    g = pl.program_id(0) * per + i
    side = jax.lax.rem(i, 2)
    Q, (M, H) = o_buf.shape[1], q_ref.shape
    N = M // Q

    def each_query(group, act):
        count = tokens_of(count_ref, group)
        for query in range(Q):
            pl.when(query < count)(functools.partial(act, query))

    def fetch_queries(group):
        tokens = first_ref[group], tokens_of(count_ref, group)
        queries.fetch(*tokens, q_any, q_tiles, q_there, sems.at[3])

    def recent_rows(side):
        return r_buf.at[side, pl.ds(0, plan.recent)], sems.at[0, side]

    def fetch_recent(group, side):
        @pl.when(tokens_of(count_ref, group) > 0)
        def _():
            ends = recent_any, *recent_rows(side)
            recent.start(recent_ref[group], *ends, plan)

    def outputs(group, side, act):
        def one(query):
            target = o_any.at[first_ref[group] + query]
            source = o_buf.at[side, query]
            act(pltpu.make_async_copy(source, target, sems.at[1, side]))

        each_query(group, one)

    def start_chunk(j, side):
        buffer, sem = e_buf.at[side], sems.at[2, side]
        chunks.start(j, buffer, table_any, pieces_ref, sem, plan=plan)

    def accumulate(k_SH, seen, *, first=False):
        """One step of the online softmax, some queries after the other.

        The next queries' scores are asked for before the softmax of these, so that the
        matrix units work meanwhile.
        """
        size = min(max(1, BLOCK_ROWS // N), -(-Q // 2))
        blocks = [range(q, min(q + size, Q)) for q in range(0, Q, size)]
        ahead = scores(blocks[0], k_SH, seen)
        for block, following in zip(blocks, [*blocks[1:], None]):
            s_MS = ahead
            if following is not None:
                ahead = scores(following, k_SH, seen)
            rows = pl.ds(block[0] * N, len(block) * N)
            old_M1 = sinks_ref[rows] if first else m_ref[rows]
            m_M1 = jnp.maximum(old_M1, s_MS.max(-1, keepdims=True))
            p_MS, keep_M1 = jnp.exp2(s_MS - m_M1), jnp.exp2(old_M1 - m_M1)
            m_ref[rows] = m_M1
            l_M1 = keep_M1 if first else keep_M1 * l_ref[rows]
            l_ref[rows] = l_M1 + p_MS.sum(-1, keepdims=True)
            o_MH = product(p_MS.astype(k_SH.dtype), k_SH, 0)
            acc_ref[rows] = o_MH if first else keep_M1 * acc_ref[rows] + o_MH

    def scores(block, k_SH, seen):
        q_MH = q_ref[pl.ds(block[0] * N, len(block) * N)]
        s_MS = product(q_MH, k_SH, 1) * (scale * LOG2E)
        parts = [s_MS[k * N : (k + 1) * N] for k in range(len(block))]
        return jnp.concatenate(
            [jnp.where(seen(q), part, UNSEEN) for q, part in zip(block, parts)]
        )

    def product(x, k_SH, contracted):
        return jax.lax.dot_general(
            x,
            k_SH,
            (((1,), (contracted,)), ((), ())),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when(i == 0)
    def _():
        if plan.recent < plan.recent_columns:
            tail = pl.ds(plan.recent, plan.recent_columns - plan.recent)
            for side_ in range(2):
                rest = r_buf.at[side_, tail]
                rest[...] = jnp.zeros(rest.shape, rest.dtype)
        for tile in range(2):
            q_there[0, tile], q_there[1, tile] = -1, 0
        fetch_queries(g)
        fetch_recent(g, side)
        queries.clear_padding(slot_ref, o_any, o_buf.at[0, 0], sems.at[1, 0])

    there = chunks_of(chunks_ref, g)
    if plan.piece:
        pl.when(there > 0)(lambda: start_chunk(0, 0))
    queries.arrive(q_tiles, q_tokens, q_there, sems.at[3])
    pl.when(tokens_of(count_ref, g) > 0)(lambda: recent.wait(*recent_rows(side)))
    more = i + 1 < per
    pl.when(more)(lambda: fetch_recent(g + 1, 1 - side))

    @pl.when(tokens_of(count_ref, g) > 0)
    def _():
        queries.take_in(first_ref[g], q_tokens, q_ref, turns_ref, norm=norm)
        k_RH = r_buf[side].reshape(-1, H)

        def seen(query):
            return recent.seen_by(query, before_ref[g], own_ref[g], plan)

        accumulate(k_RH, seen, first=True)

    pl.when(more)(lambda: fetch_queries(g + 1))

    def chunk(j, _):
        side_ = jax.lax.rem(j, 2)
        pl.when(j + 1 < there)(lambda: start_chunk(j + 1, 1 - side_))
        chunks.wait(e_buf.at[side_], sems.at[2, side_])
        k_SH = chunks.rows_of(e_buf, side_)
        col_1S = jax.lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1) + j * plan.tile

        def seen(query):
            if not plan.chosen:
                return col_1S < limit_ref[g * Q + query]
            here = pl.ds(pl.multiple_of(j * plan.tile, LANES), plan.tile)
            return (members_ref[0, :, here] & (1 << query)) != 0

        accumulate(k_SH, seen)
        return _

    if plan.piece:
        jax.lax.fori_loop(0, there, chunk, 0)

    @pl.when(i >= 2)
    def _():
        outputs(g - 2, side, lambda copy: copy.wait())

    @pl.when(tokens_of(count_ref, g) > 0)
    def _():
        queries.give_out(acc_ref, l_ref, o_buf.at[side], turns_ref)

    outputs(g, side, lambda copy: copy.start())

    @pl.when(i == per - 1)
    def _():
        if per > 1:
            outputs(g - 1, 1 - side, lambda copy: copy.wait())
        outputs(g, side, lambda copy: copy.wait())


def tokens_of(count_ref, group):
    """Tokens of a group."""
    return count_ref[group]


def chunks_of(chunks_ref, group):
    """Chunks of entries that a group reads."""
    return chunks_ref[group]
