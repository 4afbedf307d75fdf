"""The kernel of `mosaic_gpu`: a block of threads scores 1,024 keys of a slot.

They are scored for up to 8 of its queries. Each of two warpgroups has half of the keys,
in eight steps of 64, the next ones on their way by TMA while these are worked on. The
keys of a step are the rows of a product and the heads its columns, so what a key's
heads add lies in the registers of four threads.

Where the best of every eight neighbours is wanted too, the rows of step i are the i-th
of 64 neighbours' eights: so a thread finds the scores of an eight one by one. They wait
in shared memory, and are written in the end, 32 bytes together; then their maxima cost
two exchanges between threads.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Keys of a warpgroup's step, the rows of the smallest product; steps.
KEYS, STEPS, WARPGROUPS = 64, 8, 2
TILE = KEYS * STEPS * WARPGROUPS
_ROW, _ROW_OF_HEADS = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))


def copies(piece: int, stride: int) -> int:
    """Of a step's keys, which lie in pieces of so many."""
    return KEYS // math.gcd(piece // stride, KEYS)


def score(
    groups_ref, limits_ref, q_ref, weights_ref, keys_ref, pieces_ref, *refs, piece
):
    """1,024 keys of a group; see the top of the file.

    Args:
      groups_ref: [G, 4] first token, tokens, keys that any of them sees, slot.
      limits_ref: [T] keys that each sees.
      q_ref: [T, N, H].
      weights_ref: [T, N].
      keys_ref: [places / w, w, H]; w is 8, or 1 where no maxima are wanted.
      pieces_ref: [B, n] where the pieces of a slot's keys begin.
      *refs: scores [T, C / w, w]; of w 8, their maxima [T, C / 8]; buffers of queries,
        keys, and scores by eights; barriers.
      piece: keys of a piece.
    """
    *outputs_ref, q_buf, k_buf, eights_buf, loaded, filled = refs
    g, me = jax.lax.axis_index("group"), jax.lax.axis_index("warpgroup")
    first, count, visible, slot = (groups_ref[g, k] for k in range(4))
    begin = jax.lax.axis_index("part") * TILE
    mine = begin + me * (KEYS * STEPS)
    stride, (queries, heads, _) = keys_ref.shape[1], q_buf.shape
    tokens = [jnp.minimum(first + q, len(q_ref) - 1) for q in range(queries)]
    together = KEYS // copies(piece, stride)

    def fetch(j):
        """The keys of a step, neighbours or every eighth one."""
        side, last = jax.lax.rem(j, 2), pieces_ref.shape[1] - 1
        key, place_in_eight = (mine, j) if stride > 1 else (mine + j * KEYS, 0)
        for at in range(0, KEYS, together):
            here = key + at * stride
            name = pieces_ref[slot, jnp.minimum(here // piece, last)]
            row = jax.lax.div(name + jax.lax.rem(here, piece), stride)
            row = pl.multiple_of(row, 8)
            plgpu.copy_gmem_to_smem(
                keys_ref.at[pl.ds(row, together), place_in_eight],
                k_buf.at[side, me, pl.ds(at, together)],
                filled.at[side * WARPGROUPS + me],
            )

    def scores(j, query, t):
        """Of a step's keys for one query."""

        def product(acc_ref):
            q_HN = q_buf.at[query].transpose((1, 0))
            plgpu.wgmma(acc_ref, k_buf.at[jax.lax.rem(j, 2), me], q_HN)
            return acc_ref[...]

        dots_SN = pl.run_scoped(product, plgpu.ACC((KEYS, heads), jnp.float32))
        weight_N = plgpu.load(weights_ref.at[t], layout=_ROW_OF_HEADS, optimized=False)
        weight_SN = jax.lax.broadcast_in_dim(weight_N, dots_SN.shape, [1])
        return (jnp.maximum(dots_SN, 0.0) * weight_SN).sum(1)

    def step(j):
        pl.when(j + 1 < STEPS)(lambda: fetch(j + 1))
        plgpu.barrier_wait(filled.at[jax.lax.rem(j, 2) * WARPGROUPS + me])
        here = pl.ds(pl.multiple_of(mine + j * KEYS, KEYS), KEYS)
        for query, t in enumerate(tokens):
            score_S = scores(j, query, t)
            if stride > 1:
                plgpu.store(eights_buf.at[me, query, j], score_S, optimized=False)
            else:
                store = _storing(outputs_ref[0].at[t, here, 0], score_S)
                pl.when(query < count)(store)

    @pl.when(begin < visible)
    def _():
        @pl.when(me == 0)
        def _():
            for query, t in enumerate(tokens):
                plgpu.copy_gmem_to_smem(q_ref.at[t], q_buf.at[query], loaded)

        fetch(0)
        plgpu.barrier_wait(loaded)
        pl.loop(0, STEPS)(step)
        if stride == 1:
            return
        plgpu.commit_smem()
        here = pl.ds(pl.multiple_of(jax.lax.div(mine, 8), KEYS), KEYS)
        for query, t in enumerate(tokens):
            score_Se = jnp.zeros((KEYS, 8), jnp.float32)
            for e in range(8):
                score_S = plgpu.load(
                    eights_buf.at[me, query, e], layout=_ROW, optimized=False
                )
                score_S8 = jax.lax.broadcast_in_dim(score_S, (KEYS, 8), [0])
                score_Se = jnp.where(_places(1) == e, score_S8, score_Se)
            seen_Se = mine + _places(0) * 8 + _places(1) < limits_ref[t]
            best_S = jnp.where(seen_Se, score_Se, -jnp.inf).max(1)
            for ref, x in zip(outputs_ref, (score_Se, best_S)):
                pl.when(query < count)(_storing(ref.at[t, here], x))


def _places(axis):
    """Of scores by eights: which eight, and where in it."""
    layout = plgpu.Layout.WGMMA
    return plgpu.broadcasted_iota(jnp.int32, (KEYS, 8), axis, layout=layout)


def _storing(ref, x):
    return lambda: plgpu.store(ref, x, optimized=False)
