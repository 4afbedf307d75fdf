"""Gradients of sparse attention on TPUs; nothing of the forward pass is kept for them.

A kernel differentiates group by group (`mosaic_tpu_backward_kernel`); here its operands
are laid out, and what it gives is handed back to where rows came from. No two pieces of
a group are the same, and the groups of a core follow each other, so the gradients of
entries add up without conflict; each core has its own, which XLA adds. So memory holds
queries' gradients and a float32 copy of entries, no scores, and no gathered entries.

Queries are normed and turned in the kernel, so XLA writes none that are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.groups import group_block
from pallas_kernels.sparse_attention.mosaic_tpu_backward_kernel import differentiate
from pallas_kernels.sparse_attention.mosaic_tpu_entries import (
    entry_operands,
    entry_specs,
)
from pallas_kernels.sparse_attention.mosaic_tpu_queries import turns_of
from pallas_kernels.sparse_attention.mosaic_tpu_softmax import LOG2E
from pallas_kernels.sparse_attention.plan import Plan

_VMEM = 40 << 20


def backward(operands, union, do_TNH, scale, causal, query_norm, cores):
    """Gradients of queries, keys, rows before them, sinks and entries (or None)."""
    q_TNH, keys_TH, before_BWH, sinks_N, ragged, entries, rotary = operands
    lookback = before_BWH.shape[1]
    plan = Plan.of(ragged, entries, lookback, causal, cores, union=union)
    recent_BRH = plan.recent_rows(before_BWH, keys_TH, ragged)
    recent_RH = recent_BRH.reshape(-1, recent_BRH.shape[2])
    N, H = q_TNH.shape[1:]
    M, Q, dtype = plan.queries * N, plan.queries, q_TNH.dtype
    sinks_M1 = jnp.tile(LOG2E * sinks_N.astype(jnp.float32), Q)[:, None]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    per = plan.groups // cores
    inputs = [sinks_M1, q_TNH, do_TNH, recent_RH]
    in_specs = [pl.BlockSpec((M, 1), lambda c, i, *_: (0, 0)), whole, whole, whole]
    if rotary is not None:
        turns_G2QL = turns_of(rotary, ragged)
        inputs += [turns_G2QL]
        block = (1, *turns_G2QL.shape[1:])
        in_specs += [group_block(block, per=per, groups=plan.groups_real)]
    sums = [jnp.zeros((cores, *recent_RH.shape), jnp.float32)]
    scratch = [(Q, N, H), (Q, N, H), (plan.recent_columns, H)]
    scratch = [pltpu.VMEM(shape, dtype) for shape in scratch]
    added = [(plan.recent, H)]
    if plan.table is not None:
        inputs += entry_operands(plan)
        in_specs += entry_specs(plan, cores)
        sums += [jnp.zeros((cores, *plan.table.shape), jnp.float32)]
        chunk = (plan.tile, *plan.table.shape[1:])
        scratch += [pltpu.VMEM((1, *chunk), dtype)]
        added += [chunk]
    scratch += [pltpu.VMEM(shape, jnp.float32) for shape in added]
    scratch += [pltpu.VMEM((M, 1), jnp.float32)] * (3 + (query_norm is not None))
    scratch += [pltpu.VMEM((M, H), jnp.float32), pltpu.SemaphoreType.DMA]
    first = len(plan.scalars) + len(inputs)
    shapes = [
        jax.ShapeDtypeStruct(q_TNH.shape, dtype),
        jax.ShapeDtypeStruct((cores, M, 1), jnp.float32),
        *[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in sums],
    ]
    static = {"plan": plan.static(), "scale": scale, "per": per}
    static |= {"norm": query_norm, "turned": rotary is not None}
    dq_TNH, dsinks_cM1, drecent_cRH, *dtable = pl.pallas_call(
        functools.partial(differentiate, **static),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan.scalars),
            grid=(cores, per),
            in_specs=in_specs + [whole] * len(sums),
            out_specs=[
                whole,
                pl.BlockSpec((1, M, 1), lambda c, i, *_: (c, 0, 0)),
                *[whole] * len(sums),
            ],
            scratch_shapes=scratch,
        ),
        input_output_aliases={first + k: 2 + k for k in range(len(sums))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM,
        ),
        cost_estimate=plan.cost(q_TNH, products=7, arrays=3),
        name="sparse_attention_backward",
    )(*plan.scalars, *inputs, *sums)
    real_T = ragged.slots_T >= 0
    drecent_BRH = drecent_cRH.sum(0).reshape(recent_BRH.shape)
    dkeys_TH = ragged.flat(drecent_BRH[:, lookback : lookback + ragged.rows])
    dkeys_TH = jnp.where(real_T[:, None], dkeys_TH, 0).astype(keys_TH.dtype)
    dsinks_N = dsinks_cM1.reshape(-1, N).sum(0).astype(sinks_N.dtype)
    drows = None
    if entries is not None:
        rows = entries.table.rows_LBCH
        drows = dtable[0].sum(0).reshape(rows.shape).astype(rows.dtype)
    return (
        dq_TNH,
        dkeys_TH,
        drecent_BRH[:, :lookback].astype(before_BWH.dtype),
        dsinks_N,
        drows,
    )
