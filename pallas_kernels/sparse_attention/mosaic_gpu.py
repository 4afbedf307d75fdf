"""Attention over recent rows, compressed entries and a sink, on Hopper GPUs.

XLA plans what is read (see `plan`, with groups of one query) and puts recent rows in
order; a block of threads then serves 64 heads of a query, see `mosaic_gpu_kernel`.
Those of a slot run side by side, so what several of them read comes out of the cache of
the second level.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.ragged import LANES, Ragged
from pallas_kernels.sparse_attention import mosaic_gpu_kernel
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.mosaic_gpu_kernel import (
    HALVES,
    HEADS,
    SIDES,
    TILE_ROWS,
)
from pallas_kernels.sparse_attention.plan import Plan
from pallas_kernels.sparse_attention.ref import recent_rows, recent_spans

# Rows of a chunk: chosen ones, which pass through a buffer as large, and others.
TILES = 32, 64


def forward(
    q_TNH: Float[Array, "T N H"],
    keys_TH: Float[Array, "T H"],
    before_BWH: Float[Array, "B W H"],
    sinks_N: Float[Array, " N"],
    ragged: Ragged,
    entries: Entries | None,
    scale: float,
    causal: bool,
) -> Float[Array, "T N H"]:
    """See `api.sparse_attention`."""
    chosen = entries is not None and entries.chosen_TX is not None
    tile = TILES[0] if chosen else TILES[1]
    lookback = before_BWH.shape[1]
    plan = Plan.of(ragged, entries, lookback, causal, 1, queries=1, tiles=TILES)
    recent_BRH = recent_rows(before_BWH, keys_TH, ragged)
    missing = -recent_BRH.shape[1] % TILE_ROWS

    T, N, H = q_TNH.shape
    dtype, width = q_TNH.dtype, H // HALVES
    operands = [
        _per_token(plan, ragged, tile),
        q_TNH,
        jnp.pad(recent_BRH, ((0, 0), (0, missing), (0, 0))),
        mosaic_gpu_kernel.LOG2E * sinks_N.astype(jnp.float32),
    ]
    buffers = []
    if plan.piece:
        pieces = plan.pieces[:, 0]
        if chosen:
            pieces = _named(pieces, plan.members)
            buffers = [
                plgpu.SMEM((HALVES, tile // HALVES, H), dtype),
                plgpu.SMEM(pieces.shape[1:], jnp.int32),
            ]
        operands += [plan.table.reshape(-1, H), pieces]
    arrivals = HALVES * (tile // plan.piece if plan.piece > 1 else 1)
    columns = min(tile, 64)

    def tiled(*shape, columns=columns):
        transforms = (
            plgpu.TilingTransform((8, columns)),
            plgpu.SwizzleTransform(columns * dtype.itemsize),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return plgpu.kernel(
        functools.partial(mosaic_gpu_kernel.attend, plan=plan.static(), scale=scale),
        out_type=jax.ShapeDtypeStruct(q_TNH.shape, dtype),
        scratch_types=[
            tiled(HALVES, HEADS, width),
            tiled(SIDES, HALVES, tile, width),
            tiled(HALVES, HEADS, tile // HALVES, columns=tile // HALVES),
            plgpu.SMEM((HALVES, HEADS), jnp.float32),
            *buffers,
            plgpu.Barrier(num_arrivals=HALVES + chosen),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=SIDES),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=SIDES),
            plgpu.Barrier(num_arrivals=HALVES),
            plgpu.Barrier(num_arrivals=HALVES),
        ],
        cost_estimate=plan.cost(q_TNH),
        grid=(T * N // HEADS,),
        grid_names=("block",),
        num_threads=HALVES,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="sparse_attention",
    )(*operands)


def _named(pieces_Gn, members_Gct):
    """Places that a query named; instead of what it did not, ~ one that it did.

    So that only what a query sees is ever read.
    """
    pieces_Gct, named_Gct = pieces_Gn.reshape(members_Gct.shape), members_Gct != 0
    first_G1 = jnp.argmax(named_Gct.reshape(pieces_Gn.shape), axis=1, keepdims=True)
    first_G11 = jnp.take_along_axis(pieces_Gn, first_G1, axis=1)[..., None]
    return jnp.where(named_Gct, pieces_Gct, ~first_G11)


def _per_token(plan: Plan, ragged: Ragged, tile: int):
    """[T, 8] integers that a block of threads reads; padding has no chunks.

    Its slot, its first recent row; of the rows of all its chunks, recent ones first,
    it sees those from .. to - 1, and entries up to a limit; chunks of recent rows, of
    all; its group.
    """
    real_T, slot_T = ragged.slots_T >= 0, jnp.maximum(ragged.slots_T, 0)
    spans_BQ2 = recent_spans(ragged, plan.lookback, causal=plan.causal)
    oldest_T, newest_T = jnp.moveaxis(ragged.flat(spans_BQ2), -1, 0)
    first_T = oldest_T // TILE_ROWS * TILE_ROWS
    recent_T = -(-(newest_T - first_T) // tile)
    group_T = slot_T * plan.blocks + ragged.rows_T
    limit_T = 2**30 if plan.chosen else plan.scalars[5][group_T] + recent_T * tile
    chunks_T = jnp.where(real_T, recent_T + plan.scalars[4][group_T], 0)
    columns = (
        *(slot_T, first_T, oldest_T - first_T, newest_T - first_T),
        *(limit_T, recent_T, chunks_T, group_T),
    )
    columns = [jnp.broadcast_to(each, slot_T.shape) for each in columns]
    return jnp.stack(columns, axis=1).astype(jnp.int32)
