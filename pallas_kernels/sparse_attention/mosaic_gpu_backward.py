"""Gradients of sparse attention on Hopper GPUs, by two kernels.

    s = scale q k    p = exp(s - lse)    ds = p (do k - do o)
    dq = sum ds k    dk = sum ds q + p do

Of the forward pass are kept its output and the normalisers lse. One kernel gathers what
each query sees, for dq; the other goes over the queries for each 64 rows, for dk (see
there). Neither writes scores, nor gathered rows, and no two blocks of threads add to
the same memory, so gradients are the same every time.

Both read one array [B S, H] of every slot's recent rows and entries, which XLA lays
side by side, and whose gradients it hands back to where the rows came from. Queries are
not normed but scores are, by head: so kernels read queries as they are, but for the
last channels, which XLA turns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.precision import upcast
from pallas_kernels.sparse_attention.mosaic_gpu_backward_lists import (
    blocks_of,
    names_of,
    tokens_of,
    words_of,
)
from pallas_kernels.sparse_attention.mosaic_gpu_backward_queries import (
    CHUNK,
    differentiate_queries,
)
from pallas_kernels.sparse_attention.mosaic_gpu_backward_rows import (
    BLOCK,
    TOGETHER,
    differentiate_rows,
)
from pallas_kernels.sparse_attention.mosaic_gpu_backward_weights import (
    copies_of,
)
from pallas_kernels.sparse_attention.mosaic_gpu_kernel import HEADS, LOG2E
from pallas_kernels.sparse_attention.mosaic_gpu_lists import CORES
from pallas_kernels.sparse_attention.mosaic_gpu_queries import TURNING
from pallas_kernels.sparse_attention.mosaic_gpu_rows import HALVES, SIDES, TILE_ROWS
from pallas_kernels.sparse_attention.ref import recent_rows

# Blocks of threads to each core, so that few are left without work.
_WAVES = 2


def backward(operands, o_TNH, lse_TN, do_TNH, scale, causal, query_norm):
    """Gradients of queries, keys, rows before them, sinks and entries (or None).

    Args:
      operands: of the op; entries are below a limit, or named.
      o_TNH: its output.
      lse_TN: logarithms, to the base 2, of what weights were divided by.
      do_TNH: gradients of the output.
      scale: the op's.
      causal: the op's.
      query_norm: the op's.
    """
    q_TNH, keys_TH, before_BWH, sinks_N, ragged, entries, rotary = operands
    T, N, H = q_TNH.shape
    dtype, lookback = q_TNH.dtype, before_BWH.shape[1]
    recent = -(-(lookback + ragged.rows + CHUNK) // BLOCK) * BLOCK
    rows_BSH, back = jax.vjp(
        functools.partial(_rows, ragged=ragged, entries=entries, recent=recent),
        *(keys_TH, before_BWH, None if entries is None else entries.table.rows_LBCH),
    )
    slots, length, _ = rows_BSH.shape
    chosen = entries is not None and entries.chosen_TX is not None
    real_T1 = ragged.slots_T[:, None] >= 0
    mean_TN = (upcast(do_TNH) * upcast(o_TNH)).sum(-1)
    norm_TN = jnp.ones((T, N), jnp.float32)
    if query_norm is not None:
        norm_TN = jax.lax.rsqrt(jnp.square(upcast(q_TNH)).mean(-1) + query_norm)
    factor_TN = scale * norm_TN
    stats = LOG2E * factor_TN, factor_TN, lse_TN, mean_TN * factor_TN, norm_TN**2 / H
    stats_TKN = jnp.stack(stats, axis=1)
    q_tail_TNL, do_tail_TNL = q_TNH[..., -TURNING:], do_TNH[..., -TURNING:]
    if rotary is not None:  # Turning outputs back has the transpose of turning.
        q_tail_TNL, do_tail_TNL = rotary(q_tail_TNL), rotary(do_tail_TNL)
    tokens_TK = tokens_of(ragged, entries, lookback, causal, recent, length)
    heads = q_TNH, q_tail_TNL, do_TNH, do_tail_TNL, stats_TKN
    rows_SH = rows_BSH.reshape(-1, H)
    width = H // HALVES

    def tiled(*shape):
        transforms = (
            plgpu.TilingTransform((TILE_ROWS, CHUNK)),
            plgpu.SwizzleTransform(CHUNK * dtype.itemsize),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    call = functools.partial(
        plgpu.kernel,
        num_threads=HALVES,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    names, words, buffers = [], [], []
    if chosen:
        names_TCX = names_of(ragged, entries.chosen_TX, recent, length)
        names, words = [names_TCX], [words_of(entries.chosen_TX, length - recent)]
        buffers = [
            plgpu.SMEM((HALVES, TILE_ROWS, H), dtype),
            plgpu.SMEM(names_TCX.shape[1:], jnp.int32),
        ]
    static = {"entries": recent, "chosen": chosen}
    gathered = names_TCX.size if chosen else len(rows_SH)
    seen = lookback + 1 + (names_TCX[0].size if chosen else length - recent)
    dq_TNH = call(
        functools.partial(differentiate_queries, **static, norm=query_norm is not None),
        out_type=jax.ShapeDtypeStruct((T, N, H), dtype),
        scratch_types=[
            tiled(HALVES, HALVES, HEADS, width),
            tiled(SIDES, HALVES, CHUNK, width),
            tiled(HALVES, HEADS, CHUNK),
            plgpu.SMEM((HALVES, HEADS), jnp.float32),
            *buffers,
            plgpu.Barrier(num_arrivals=HALVES * copies_of(HEADS, width) + chosen),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=SIDES),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=SIDES),
            plgpu.Barrier(num_arrivals=1, num_barriers=HALVES),
            plgpu.Barrier(num_arrivals=HALVES),
        ],
        cost_estimate=_cost(q_TNH, 3, 3, T * seen, gathered * H * dtype.itemsize),
        grid=(T * N // HEADS,),
        grid_names=("block",),
        kernel_name="sparse_attention_backward_queries",
    )(tokens_TK, *heads, rows_SH, *names)
    blocks_K3 = blocks_of(ragged, tokens_TK, *words, recent=recent, length=length)
    parts = -(-_WAVES * CORES // len(blocks_K3))
    met = T * (lookback + BLOCK + length - recent)
    moved = rows_SH.size * (dtype.itemsize + 4 * parts)
    drows_PSH = call(
        functools.partial(differentiate_rows, **static, parts=parts),
        out_type=jax.ShapeDtypeStruct((parts, *rows_SH.shape), jnp.float32),
        scratch_types=[
            tiled(HALVES, BLOCK, width),
            tiled(SIDES, HALVES, HALVES, TOGETHER, width),
            tiled(HALVES, BLOCK, TOGETHER),
            plgpu.Barrier(num_arrivals=HALVES),
            plgpu.Barrier(
                num_arrivals=HALVES * copies_of(TOGETHER, width), num_barriers=SIDES
            ),
            plgpu.Barrier(num_arrivals=HALVES),
            plgpu.Barrier(num_arrivals=1, num_barriers=HALVES),
        ],
        cost_estimate=_cost(q_TNH, 4, 2, met, moved),
        grid=(parts, len(blocks_K3)),
        grid_names=("part", "block"),
        kernel_name="sparse_attention_backward_rows",
    )(blocks_K3, tokens_TK, *heads, rows_SH, *words)
    drows_BSH = drows_PSH.sum(0).astype(dtype).reshape(slots, length, H)
    dkeys_TH, dbefore_BWH, dtable = back(drows_BSH)
    if rotary is not None:
        turned_TNL = rotary.inverse(dq_TNH[..., -TURNING:])
        dq_TNH = dq_TNH.at[..., -TURNING:].set(turned_TNL)
    dsinks_TN = -jnp.exp2(LOG2E * upcast(sinks_N) - lse_TN) * mean_TN
    dsinks_N = jnp.where(real_T1, dsinks_TN, 0).sum(0).astype(sinks_N.dtype)
    return dq_TNH, dkeys_TH, dbefore_BWH, dsinks_N, dtable


def _cost(q_TNH, products, arrays, pairs, moved):
    """Of products over pairs of a token and a row, and of some arrays of queries."""
    _, N, H = q_TNH.shape
    return pl.CostEstimate(
        flops=2 * products * pairs * N * H,
        transcendentals=pairs * N,
        bytes_accessed=arrays * q_TNH.size * q_TNH.dtype.itemsize + moved,
    )


def _rows(keys_TH, before_BWH, rows_LBCH, *, ragged, entries, recent):
    """Recent rows of every slot, then its entries, both in full blocks.

    What no one sees is 0 where a product would meet it.
    """

    def full(rows_BSH, size):
        missing = size - rows_BSH.shape[1]
        return jnp.pad(rows_BSH, ((0, 0), (0, missing), (0, 0)))

    lookback = before_BWH.shape[1]
    first_B11 = lookback - ragged.starts_B[:, None, None]  # row of position 0
    unseen_BW1 = jnp.arange(lookback)[:, None] < first_B11
    before_BWH = jnp.where(unseen_BW1, 0, before_BWH)
    rows_BSH = full(recent_rows(before_BWH, keys_TH, ragged), recent)
    if entries is None:
        return rows_BSH
    entries_BCH = entries.table.having(rows_LBCH).whole()
    if entries.limits_T is not None:
        most_B11 = ragged.padded(entries.limits_T, 0).max(1)[:, None, None]
        row_C1 = jnp.arange(entries.table.length)[:, None]
        entries_BCH = jnp.where(row_C1 < most_B11, entries_BCH, 0)
    size = -(-entries.table.length // BLOCK) * BLOCK
    return jnp.concatenate([rows_BSH, full(entries_BCH, size)], axis=1)
