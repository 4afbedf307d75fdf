"""Attention over recent rows, compressed entries and a sink, on Hopper GPUs.

Moved: per query and 64 of its heads, the query, its recent rows, and the entries that
it sees, once. Computed: two products per chunk of rows, with an online softmax between
them, so no scores leave the chip.

A block of threads serves 64 heads of one query (see `mosaic_gpu_kernel`): as many rows
as the smallest product has, and as many sums as the registers of two warpgroups hold.
So a query reads what it chose, not the union of its neighbours' choices as on TPUs;
what neighbours of a slot share, they find in the cache of the second level, since their
blocks run side by side. XLA plans the reading (see `plan`, with groups of one query).
Recent rows are read out of their ring.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.dispatch import no_hopper
from pallas_kernels.indexer_topk.ref import choices_of
from pallas_kernels.indexer_topk.union import alone
from pallas_kernels.precision import narrow
from pallas_kernels.ragged import LANES, Ragged
from pallas_kernels.rings import Lookback
from pallas_kernels.rotary import Rotary, right_angles
from pallas_kernels.sparse_attention import mosaic_gpu_kernel
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.gradients import gradients_of
from pallas_kernels.sparse_attention.mosaic_gpu_backward import backward
from pallas_kernels.sparse_attention.mosaic_gpu_kernel import HEADS
from pallas_kernels.sparse_attention.mosaic_gpu_lists import (
    most_chunks,
    named,
    parts_of,
    per_token,
    recent,
)
from pallas_kernels.sparse_attention.mosaic_gpu_queries import TURNING
from pallas_kernels.sparse_attention.mosaic_gpu_rows import (
    HALVES,
    SIDES,
    SWIZZLED,
    TILE_ROWS,
    arrivals,
)
from pallas_kernels.sparse_attention.plan import Plan

# Rows of a chunk: chosen ones, which pass through registers, and others.
TILES = 32, 64
_WIDEST = 512
_MOST_CHOSEN = 8192


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
    tables = [] if entries is None else [entries.table.rows_LBCH]
    if reason := no_hopper(q_TNH, keys_TH, before, *tables):
        return reason
    for rows in tables:
        if not entries.some and rows.shape[2] % TILE_ROWS:
            return (
                f"reads entries by {TILE_ROWS}, got {rows.shape[2]} to a slot or page"
            )
        if entries.picks > _MOST_CHOSEN:
            return f"takes {_MOST_CHOSEN} chosen entries at most, got {entries.picks}"
    if heads % HEADS or width % LANES or width > _WIDEST:
        return (
            f"needs heads in multiples of {HEADS} that are a multiple of {LANES} wide "
            f"and {_WIDEST} at most, got {heads} x {width}"
        )
    if rotary is not None and 2 * rotary.cos_Th.shape[1] > TURNING:
        return f"turns {TURNING} channels at most, got {2 * rotary.cos_Th.shape[1]}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "causal", "query_norm"))
def sparse_attention_mosaic_gpu(
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
    """See `api.sparse_attention`; see `mosaic_gpu_backward` for gradients."""
    operands = (q_TNH, keys_TH, before, sinks_N, ragged, entries, rotary)
    return _saving(*operands, scale, causal, query_norm)[0]


def _saving(*operands_and_options):
    *operands, scale, causal, query_norm = operands_and_options
    with jax.enable_x64(False):
        *rest, ragged, entries, rotary = narrow(operands)
        if entries is not None and entries.some:
            chosen_TX = choices_of(entries, ragged)
            entries = Entries(entries.table, chosen_TX=chosen_TX)
        operands = *rest, ragged, entries, rotary
        o_TNH, lse_TN = forward(*operands, scale, causal, query_norm)
    return o_TNH, (operands, o_TNH, lse_TN)


def _backward(scale, causal, query_norm, saved, do_TNH):
    operands, o_TNH, lse_TN = saved
    options = scale, causal, query_norm
    return gradients_of(
        operands, lambda ordered: backward(ordered, o_TNH, lse_TN, do_TNH, *options)
    )


sparse_attention_mosaic_gpu.defvjp(_saving, _backward)


def forward(
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
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """The output and, to the base 2, logarithms of what weights were divided by.

    Entries are below a limit, or named.
    """
    lookback, union = before.shape[1], None
    if entries is not None and entries.chosen_TX is not None:
        union = alone(ragged.grouped(entries.chosen_TX, -1, 1)[:, 0])
    plan = Plan.of(
        ragged, entries, lookback, causal, 1, union=union, queries=1, tiles=TILES
    )
    chosen = plan.chosen
    tile = TILES[0] if chosen else TILES[1]
    recent_RH, ring, first_B, origin_B = recent(before, keys_TH, ragged)
    T, N, H = q_TNH.shape
    dtype, width = q_TNH.dtype, H // HALVES
    operands = [
        per_token(plan, ragged, tile, ring, first_B, origin_B),
        q_TNH,
        recent_RH,
        mosaic_gpu_kernel.LOG2E * sinks_N.astype(jnp.float32),
    ]
    buffers, turning = [], []
    if rotary is not None:
        operands += [rotary.lanes(TURNING), right_angles(TURNING).astype(dtype)]
    if plan.piece:
        pieces = plan.pieces[:, 0]
        if chosen:
            pieces = named(plan.pieces, plan.members, tile)
            buffers = [
                plgpu.SMEM((HALVES, tile // HALVES, H), dtype),
                plgpu.SMEM(pieces.shape[1:], jnp.int32),
            ]
        operands += [plan.table.reshape(-1, H), pieces]

    def tiled(columns, *shape):
        transforms = (
            plgpu.TilingTransform((TILE_ROWS, columns)),
            plgpu.SwizzleTransform(columns * dtype.itemsize),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    if rotary is not None:
        turning = [tiled(min(tile, SWIZZLED), TURNING, TURNING)]
    blocks = T * N // HEADS
    parts = parts_of(blocks, most_chunks(plan, tile), tile)
    static = {"plan": plan.static(), "scale": scale, "parts": parts, "ring": ring}
    static |= {"norm": query_norm, "turns": rotary is not None}
    o_PTNH, lse_PTN = plgpu.kernel(
        functools.partial(mosaic_gpu_kernel.attend, **static),
        out_type=[
            jax.ShapeDtypeStruct((parts, T, N, H), dtype),
            jax.ShapeDtypeStruct((parts, T, N), jnp.float32),
        ],
        scratch_types=[
            tiled(min(tile, SWIZZLED), HALVES, HEADS, width),
            tiled(min(tile, SWIZZLED), SIDES, HALVES, tile, width),
            tiled(tile // HALVES, HALVES, HEADS, tile // HALVES),
            plgpu.SMEM((HALVES, HEADS), jnp.float32),
            *buffers,
            *turning,
            plgpu.Barrier(num_arrivals=HALVES + chosen + len(turning)),
            plgpu.Barrier(num_arrivals=HALVES * arrivals(tile), num_barriers=SIDES),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=SIDES),
            plgpu.Barrier(num_arrivals=HALVES),
            plgpu.Barrier(num_arrivals=HALVES),
        ],
        cost_estimate=plan.cost(q_TNH, arrays=1 + parts),
        grid=(parts, blocks),
        grid_names=("part", "block"),
        num_threads=HALVES,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="sparse_attention",
    )(*operands)
    if parts == 1:
        return o_PTNH[0], lse_PTN[0]
    whole_TN = jax.nn.logsumexp(lse_PTN / mosaic_gpu_kernel.LOG2E, axis=0)
    whole_TN *= mosaic_gpu_kernel.LOG2E
    o_TNH = jnp.einsum(
        "PTN,PTNH->TNH",
        jnp.exp2(lse_PTN - whole_TN),
        o_PTNH,
        preferred_element_type=jnp.float32,
    )
    return o_TNH.astype(dtype), whole_TN
