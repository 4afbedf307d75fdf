"""`index_scores` on Hopper GPUs: the scores of single heads stay in registers.

Moved: per group of up to 8 queries of a slot and 1,024 of its keys, the queries of all
heads once, then keys, out of all layers' table, piece by piece (see the plan of
`sparse_attention`). Written: a score per query and key, and the best of every eight,
among which the choice begins, so that it need not read the scores. Computed: see
`mosaic_gpu_kernel`.

XLA writes the scores of all heads before it adds them up, 64 times as much.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import no_hopper
from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.index_scores import mosaic_gpu_kernel
from pallas_kernels.index_scores.mosaic_gpu_kernel import (
    KEYS,
    TILE,
    WARPGROUPS,
    copies,
)
from pallas_kernels.index_scores.ref import EIGHT, best_of_eights, index_scores_xla
from pallas_kernels.ragged import Ragged, Table
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.plan import Plan

_TILE_ROWS, _SWIZZLED = 8, 64  # of a tile of the matrix units
_MOST_HEADS, _WIDEST = 64, 128


def supports(
    q_TNH, keys: Table, weights_TN, ragged: Ragged, limits_T, *, best
) -> str | None:
    """Why the kernel cannot score these; None if it can."""
    _, heads, width = q_TNH.shape
    rows = keys.rows_LBCH
    if reason := no_hopper(q_TNH, rows):
        return reason
    if heads % 8 or heads > _MOST_HEADS or width % _SWIZZLED or width > _WIDEST:
        return (
            f"needs heads in multiples of 8, {_MOST_HEADS} at most, that are a "
            f"multiple of {_SWIZZLED} wide, {_WIDEST} at most, got {heads} x {width}"
        )
    if rows.ndim != 4 or rows.shape[2] % _TILE_ROWS:
        return f"reads keys by {_TILE_ROWS}, got {rows.shape[2]} to a slot or page"
    return None


def _counted(q_TNH, keys, weights_TN, ragged, limits_T, *, best):
    """The reference, of which scores at or past the limits do not count."""
    operands = (q_TNH, keys, weights_TN, ragged, limits_T)
    scores_TC, *others = index_scores_xla(*operands, best=True)
    if limits_T is not None:
        seen_TC = jnp.arange(keys.length) < limits_T[:, None]
        scores_TC = jnp.where(seen_TC, scores_TC, 0)
    return (scores_TC, *others) if best else scores_TC


@with_gradients_of(_counted)
def index_scores_mosaic_gpu(
    q_TNH: Float[Array, "T N H"],
    keys: Table,
    weights_TN: Float[Array, "T N"],
    ragged: Ragged,
    limits_T: Int[Array, " T"] | None,
    *,
    best: bool,
) -> Float[Array, "T C"] | tuple[Float[Array, "T C"], Float[Array, "T c"]]:
    """See `api.index_scores`; gradients are the reference's."""
    given_T = limits_T
    if limits_T is None:
        limits_T = jnp.full(len(q_TNH), keys.length)
    entries = Entries(keys, limits_T=limits_T)
    plan = Plan.of(ragged, entries, 0, True, 1, tiles=(TILE, TILE))
    T, N, H = q_TNH.shape
    first_G, count_G, _, _, chunks_G, *_ = plan.scalars
    slot_G = jnp.arange(plan.groups) // plan.blocks
    groups_G4 = jnp.stack([first_G, count_G, chunks_G * plan.tile, slot_G], axis=1)
    parts = -(-keys.length // TILE)
    # Of eights whose i-th are fetched together, those of a tile of the matrix units.
    stride = EIGHT if best and plan.piece % (EIGHT * _TILE_ROWS) == 0 else 1
    dtype, C = q_TNH.dtype, parts * TILE
    out = [jax.ShapeDtypeStruct((T, C // stride, stride), jnp.float32)]
    if stride > 1:
        out += [jax.ShapeDtypeStruct((T, C // stride), jnp.float32)]

    def tiled(*shape):
        transforms = (
            plgpu.TilingTransform((_TILE_ROWS, _SWIZZLED)),
            plgpu.SwizzleTransform(_SWIZZLED * dtype.itemsize),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    scores, *maxima = plgpu.kernel(
        functools.partial(mosaic_gpu_kernel.score, piece=plan.piece),
        out_type=out,
        scratch_types=[
            tiled(plan.queries, N, H),
            tiled(2, WARPGROUPS, KEYS, H),
            plgpu.SMEM((WARPGROUPS, plan.queries, stride, KEYS), jnp.float32),
            plgpu.Barrier(num_arrivals=plan.queries),
            plgpu.Barrier(
                num_arrivals=copies(plan.piece, stride), num_barriers=2 * WARPGROUPS
            ),
        ],
        cost_estimate=pl.CostEstimate(
            flops=2 * q_TNH.size * C,
            transcendentals=0,
            bytes_accessed=(q_TNH.size + plan.groups * C * H) * dtype.itemsize
            + sum(4 * each.size for each in out),
        ),
        grid=(parts, plan.groups),
        grid_names=("part", "group"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="index_scores",
    )(
        groups_G4.astype(jnp.int32),
        limits_T,
        q_TNH,
        weights_TN.astype(jnp.float32),
        plan.table.reshape(-1, stride, H),
        plan.pieces[:, 0],
    )
    scores_TC = scores.reshape(T, C)[:, : keys.length]
    if not best:
        return scores_TC
    if maxima:
        return scores_TC, maxima[0][:, : -(-keys.length // EIGHT)]
    return scores_TC, best_of_eights(scores_TC, given_T)
