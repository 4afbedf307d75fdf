"""The kernel of `mosaic_tpu`: one step of its grid serves a group of queries.

Moved: the group's queries and recent rows, asked for a step ahead; its entries, a chunk
ahead, the first of them while the recent rows are computed; outputs, which have two
steps to leave. Computed per chunk: scores [queries x heads, rows], an online softmax,
their product with the same rows.

Absent queries compute whatever their memory holds, and are not written.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged import LANES
from pallas_kernels.sparse_attention import mosaic_tpu_chunks as chunks
from pallas_kernels.sparse_attention import mosaic_tpu_queries as queries
from pallas_kernels.sparse_attention import mosaic_tpu_recent as recent
from pallas_kernels.sparse_attention.mosaic_tpu_softmax import Softmax


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
    softmax = Softmax(q_ref, sinks_ref, m_ref, l_ref, acc_ref, M // Q, scale)

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

        softmax.take_in(k_RH, seen, first=True)

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

        softmax.take_in(k_SH, seen)
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
