"""One group of queries over all positions that they see, in chunks, on a TPU.

Moved: a chunk's keys and values of all heads into one side of two buffers, while the
other side is computed; a group leaves the next one its first chunk on the way.
Computed: per head scores, an online softmax and sums, so that scores of one head are
made by the matrix units while the softmax of another keeps the vector units busy.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import product

# Heads whose scores are made before the first one's softmax.
_AHEAD = 2
_UNSEEN = -1e30
_LOG2E = math.log2(math.e)


def attend(
    chunks_ref,
    table_ref,
    q_ref,
    limits_ref,
    k_any,
    v_any,
    o_ref,
    k_buf,
    v_buf,
    m_ref,
    l_ref,
    acc_ref,
    side_ref,
    sem,
    *,
    per,
    blocks,
    slots,
    pieces,
    paged,
    scale,
):
    """A group of queries over all that they see."""
    i = pl.program_id(1)
    g = pl.program_id(0) * per + i
    K, _, H = q_ref.shape[1:]
    chunk = k_buf.shape[2]
    size = chunk // pieces
    pages = len(table_ref) // slots
    there = chunks_of(chunks_ref, g)
    following = jnp.minimum(g + 1, len(chunks_ref) - 1)
    more = (i + 1 < per) & (chunks_of(chunks_ref, following) > 0)

    def first(j):
        """The position that a chunk begins at: the last ends where the slot does."""
        if paged:
            return j * chunk
        return pl.multiple_of(jnp.minimum(j * chunk, k_any.shape[2] - chunk), 16)

    def start(group, j, side):
        slot = jnp.minimum(group // blocks, slots - 1)
        for piece in range(pieces):
            if paged:
                page = jnp.minimum(j * pieces + piece, pages - 1)
                rows = (table_ref[slot * pages + page],)
            else:
                rows = (slot, slice(None), pl.ds(first(j), chunk))
            here = (side, slice(None), pl.ds(piece * size, size))
            for source, target in ((k_any, k_buf), (v_any, v_buf)):
                copy = (source.at[rows], target.at[here], sem.at[side])
                pltpu.make_async_copy(*copy).start()

    def wait(side):
        for buffer in (k_buf, v_buf):
            whole = buffer.at[side]
            pltpu.make_async_copy(whole, whole, sem.at[side]).wait()

    @pl.when(i == 0)
    def _():
        side_ref[0] = 0
        pl.when(there > 0)(lambda: start(g, 0, 0))

    begin = side_ref[0]
    m_ref[...] = jnp.full(m_ref.shape, _UNSEEN, jnp.float32)
    l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def visit(j, _):
        side = jax.lax.rem(begin + j, 2)
        pl.when(j + 1 < there)(lambda: start(g, j + 1, 1 - side))
        pl.when((j + 1 == there) & more)(lambda: start(following, 0, 1 - side))
        wait(side)
        position_1S = first(j) + jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
        # What the chunk before has seen is not seen again.
        seen_MS = (position_1S < limits_ref[0]) & (position_1S >= j * chunk)
        # Scores of some heads are made while others' softmax is computed.
        ahead = [scores(head, side, seen_MS) for head in range(min(K, _AHEAD))]
        for head in range(K):
            s_MS = ahead.pop(0)
            if head + _AHEAD < K:
                ahead.append(scores(head + _AHEAD, side, seen_MS))
            accumulate(head, s_MS, v_buf[side, head])
        return _

    def scores(head, side, seen_MS):
        s_MS = product(q_ref[0, head], k_buf[side, head], (1, 1)) * (scale * _LOG2E)
        return jnp.where(seen_MS, s_MS, _UNSEEN)

    def accumulate(head, s_MS, v_SH):
        old_M1 = m_ref[head]
        m_M1 = jnp.maximum(old_M1, s_MS.max(-1, keepdims=True))
        p_MS, keep_M1 = jnp.exp2(s_MS - m_M1), jnp.exp2(old_M1 - m_M1)
        m_ref[head] = m_M1
        l_ref[head] = keep_M1 * l_ref[head] + p_MS.sum(-1, keepdims=True)
        acc_ref[head] = keep_M1 * acc_ref[head] + product(
            p_MS.astype(v_SH.dtype), v_SH, (1, 0)
        )

    jax.lax.fori_loop(0, there, visit, 0)
    side = jax.lax.rem(begin + there, 2)
    side_ref[0] = side
    pl.when((there == 0) & more)(lambda: start(following, 0, side))
    weight_KM1 = jnp.maximum(l_ref[...], 1e-30)
    o_ref[0] = (acc_ref[...] / weight_KM1).astype(o_ref.dtype)


def chunks_of(chunks_ref, group):
    """Chunks of positions that a group reads."""
    return chunks_ref[group]
