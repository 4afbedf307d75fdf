"""Attention over recent rows, compressed entries and a sink, on TPUs.

Moved: per group of up to 8 queries of one slot, the queries, their recent rows, and its
entries, each once for all of them and all heads, piece by piece by DMAs out of all
layers' table (see `plan`: a chosen entry is a piece of its own, entries below a limit
come in long ones or in pages). Computed: two products per chunk of entries, with an
online softmax between them, so no scores leave the chip.

All queries of a group times all heads are the rows of one product (6 x 64 = 384 for
verification): a row of entries meets them all, so the matrix units are busy rather than
the memory. Entries are gathered for the group's union of choices; as many chunks are
visited as it fills, and a query that did not choose a row masks it. The next chunk is
on its way while one is computed, the first while the recent rows are, and the next
group's queries meanwhile. A TPU of two cores gives each half of the groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.block_sizes import block_sizes, shape
from pallas_kernels.dispatch import best_for
from pallas_kernels.groups import group_block
from pallas_kernels.indexer_topk import api as indexers
from pallas_kernels.indexer_topk.ref import choices_of
from pallas_kernels.indexer_topk.union import MOST_ENTRIES, Union, union
from pallas_kernels.precision import narrow
from pallas_kernels.ragged import LANES, Ragged
from pallas_kernels.rings import Lookback
from pallas_kernels.rotary import Rotary
from pallas_kernels.sparse_attention import mosaic_tpu_kernel
from pallas_kernels.sparse_attention import mosaic_tpu_recent as recent
from pallas_kernels.sparse_attention import plan as plans
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.gradients import gradients_of
from pallas_kernels.sparse_attention.mosaic_tpu_backward import backward
from pallas_kernels.sparse_attention.mosaic_tpu_entries import (
    entry_operands,
    entry_specs,
)
from pallas_kernels.sparse_attention.mosaic_tpu_queries import (
    by_piece,
    head_grid,
    in_tiles,
    turns_of,
)
from pallas_kernels.sparse_attention.mosaic_tpu_softmax import LOG2E
from pallas_kernels.sparse_attention.plan import ROWS, Plan

_VMEM = 32 << 20
_CORES = 2
# A block of a few queries sees all its slot's rows at once.
_MOST_ROWS = 64
# Tokens of all slots, padded: a few words of each lie in scalar memory.
_MOST_TOKENS = 1 << 16


def supports(
    q_TNH,
    keys_TH,
    before,
    sinks_N,
    ragged,
    entries,
    rotary,
    *,
    scale,
    causal,
    query_norm,
) -> str | None:
    """Why the kernel cannot attend over these; None if it can."""
    _, heads, width = q_TNH.shape
    dtype = q_TNH.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 or bfloat16, not {dtype}"
    if width % LANES or heads % ROWS:
        return (
            f"needs heads in multiples of {ROWS} that are a multiple of {LANES} wide, "
            f"got {heads} x {width}"
        )
    if not causal and ragged.rows > _MOST_ROWS:
        return f"takes blocks of {_MOST_ROWS} tokens at most, got {ragged.rows}"
    if ragged.slots * ragged.rows > _MOST_TOKENS:
        return (
            f"takes {_MOST_TOKENS} tokens at most, padded, got {ragged.slots} slots of "
            f"{ragged.rows}"
        )
    if rotary is not None and 2 * rotary.cos_Th.shape[1] > LANES:
        return f"turns {LANES} channels at most, got {2 * rotary.cos_Th.shape[1]}"
    given = [keys_TH.dtype, before.dtype]
    if entries is not None:
        rows = entries.table.rows_LBCH
        given += [rows.dtype]
        if entries.some and (rows.ndim == 4 or rows.shape[3] % 2):
            return (
                "fetches single entries, which must lie by `split_lanes` and be a "
                f"multiple of {2 * LANES} wide, got {rows.shape}"
            )
        if rows.ndim == 4 and rows.shape[2] % ROWS:
            return f"reads entries by {ROWS}, got {rows.shape[2]} to a slot or page"
        if entries.table.length > MOST_ENTRIES:
            return f"names {MOST_ENTRIES} entries at most, got {entries.table.length}"
    if any(each != dtype for each in given):
        return f"wants one type for all, got {dtype} and {sorted(map(str, given))}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "causal", "query_norm"))
def sparse_attention_mosaic_tpu(
    q_TNH: Float[Array, "T N H"],
    keys_TH: Float[Array, "T H"],
    before: Float[Array, "B W H"] | Lookback,
    sinks_N: Float[Array, " N"],
    ragged: Ragged,
    entries: Entries | None,
    rotary: Rotary | None,
    scale: float,
    causal: bool,
    query_norm: float | None,
) -> Float[Array, "T N H"]:
    """See `api.sparse_attention`; see `mosaic_tpu_backward` for gradients."""
    operands = (q_TNH, keys_TH, before, sinks_N, ragged, entries, rotary)
    return _saving(*operands, scale, causal, query_norm)[0]


def _saving(*operands_and_options):
    *operands, scale, causal, query_norm = operands_and_options
    with jax.enable_x64(False):
        operands = narrow(operands)
        *_, ragged, entries, _ = operands
        united = _united(entries, ragged)
        options = scale, causal, query_norm
        return forward(*operands, united, *options), (operands, united)


def _united(entries: Entries | None, ragged: Ragged) -> Union | None:
    """What each group reads, where it chooses."""
    if entries is None or not entries.some:
        return None
    if entries.index is None:
        return union(ragged.grouped(choices_of(entries, ragged), -1))
    assert entries.limits_T is not None
    operands = (entries.index, entries.limits_T, ragged)
    name = best_for("tpu", "indexer_topk", indexers.IMPLEMENTATIONS, *operands)
    return indexers.indexer_topk(*operands, implementation=name)


def _backward(scale, causal, query_norm, saved, do_TNH):
    operands, united = saved
    options = scale, causal, query_norm, _CORES
    return gradients_of(
        operands, lambda ordered: backward(ordered, united, do_TNH, *options)
    )


sparse_attention_mosaic_tpu.defvjp(_saving, _backward)


def forward(
    q_TNH: Float[Array, "T N H"],
    keys_TH: Float[Array, "T H"],
    before: Float[Array, "B W H"] | Lookback,
    sinks_N: Float[Array, " N"],
    ragged: Ragged,
    entries: Entries | None,
    rotary: Rotary | None,
    united: Union | None,
    scale: float,
    causal: bool,
    query_norm: float | None,
) -> Float[Array, "T N H"]:
    """See `api.sparse_attention`; `united` is what groups choose, if they do."""
    T, N, H = q_TNH.shape
    seen, tile = ("all", plans.TILE) if united is None else ("some", plans.CHOSEN_TILE)
    of = f"{seen} {shape(q_TNH.dtype, Q=ragged.group, N=N, H=H)}"
    [tile] = block_sizes("sparse_attention", of, entries=tile)
    lookback, ring = before.shape[1], recent.ring_of(before, causal=causal)
    plan = Plan.of(
        *(ragged, entries, lookback, causal, _CORES),
        union=united,
        ring=ring,
        tiles=(tile, tile),
    )
    recent_RH = recent.operand(plan, before, keys_TH, ragged)
    M, dtype = plan.queries * N, q_TNH.dtype
    o_SX = (rows := head_grid(N)[0], N * H // rows)
    q_txL = in_tiles(q_TNH)
    sinks_N = by_piece(LOG2E * sinks_N.astype(jnp.float32))
    sinks_M1 = jnp.tile(sinks_N, plan.queries)[:, None]
    per, whole = plan.groups // _CORES, pl.BlockSpec(memory_space=pl.ANY)
    operands = [sinks_M1, q_txL, recent_RH]
    in_specs = [pl.BlockSpec((M, 1), lambda c, i, *_: (0, 0)), whole, whole]
    if rotary is not None:
        turns_G2QL = turns_of(rotary, ragged)
        operands += [turns_G2QL]
        block = (1, *turns_G2QL.shape[1:])
        in_specs += [group_block(block, per=per, groups=plan.groups_real)]
    chunk_shape = (2, 8, H)
    if plan.table is not None:
        operands += entry_operands(plan)
        in_specs += entry_specs(plan, _CORES)
        chunk_shape = (2, plan.tile, *plan.table.shape[1:])
    static = {"plan": plan.static(), "scale": scale, "per": per, "norm": query_norm}
    o_TSX = pl.pallas_call(
        functools.partial(mosaic_tpu_kernel.attend, **static, turns=rotary is not None),
        out_shape=jax.ShapeDtypeStruct((T, *o_SX), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan.scalars),
            grid=(_CORES, per),
            in_specs=in_specs,
            out_specs=whole,
            scratch_shapes=[
                pltpu.VMEM((2, *q_txL.shape[1:]), dtype),
                pltpu.VMEM((2, 8, N, H), dtype),
                pltpu.SMEM((2, 2), jnp.int32),
                pltpu.VMEM((M, H), dtype),
                pltpu.VMEM((2, plan.recent_columns, H), dtype),
                pltpu.VMEM(chunk_shape, dtype),
                pltpu.VMEM((2, plan.queries, *o_SX), dtype),
                pltpu.VMEM((M, 1), jnp.float32),
                pltpu.VMEM((M, 1), jnp.float32),
                pltpu.VMEM((M, H), jnp.float32),
                pltpu.SemaphoreType.DMA((4, 2)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM,
        ),
        cost_estimate=plan.cost(q_TNH),
        name="sparse_attention",
    )(*plan.scalars, *operands)
    return o_TSX.reshape(T, N, H)
