"""`indexer_topk` on TPUs: index keys come in, the union of what a group chose goes out.

Moved: per group of up to 8 queries of a slot, their index queries, and the slot's keys
below their limits, each once, piece by piece out of all layers' table, the next chunk
while one is scored. Scores stay in VMEM, a row for each query, from the first key to
the last choice. Computed: a product per chunk and query, whose rows (heads) are summed
up in registers, then the best of each row, see `selection`.

The product keeps the matrix units busy; all of the selection takes half as long, on
vector units. The next group's first keys arrive during it. A TPU of two cores gives
each half of the groups.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.block_sizes import block_sizes, shape
from pallas_kernels.groups import group_block
from pallas_kernels.indexer_topk import selection
from pallas_kernels.indexer_topk.index import Index
from pallas_kernels.indexer_topk.union import Union
from pallas_kernels.precision import in_32_bits, product
from pallas_kernels.ragged import LANES, Ragged
from pallas_kernels.sparse_attention import mosaic_tpu_chunks
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.plan import ROWS, Plan

_CORES = 2
# Keys of a chunk.
TILE = 2048
# The scores of so many keys fit into VMEM, and so many choices into a step's blocks.
_MOST_KEYS = 2**18
_MOST_PICKS = 2048


def supports(index: Index, limits_T, ragged: Ragged) -> str | None:
    """Why the kernel cannot choose by these; None if it can."""
    rows, (_, heads, width) = index.keys.rows_LBCH, index.q_TNH.shape
    if rows.dtype not in (jnp.float32, jnp.bfloat16) or rows.dtype != index.q_TNH.dtype:
        return (
            "scores in float32 or bfloat16, not queries in "
            f"{index.q_TNH.dtype} by keys in {rows.dtype}"
        )
    if rows.ndim != 4 or width % LANES or heads % ROWS:
        return (
            f"needs heads in multiples of {ROWS} that are a multiple of {LANES} wide, "
            f"got {heads} x {width}"
        )
    if rows.shape[2] % ROWS:
        return f"reads keys by {ROWS}, got {rows.shape[2]} to a slot or page"
    if index.keys.length > _MOST_KEYS:
        return f"takes {_MOST_KEYS} keys at most, got {index.keys.length}"
    if index.picks > _MOST_PICKS:
        return f"chooses {_MOST_PICKS} entries at most, not {index.picks}"
    return None


@in_32_bits
def indexer_topk_mosaic_tpu(
    index: Index, limits_T: Int[Array, " T"], ragged: Ragged
) -> Union:
    """See `api.indexer_topk`."""
    keys = Entries(index.keys, limits_T=limits_T)
    of = shape(index.q_TNH.dtype, Q=ragged.rows, C=index.keys.length)
    [tile] = block_sizes("indexer_topk", of, keys=TILE)
    plan = Plan.of(ragged, keys, 0, True, _CORES, tiles=(tile, tile))
    q_GQNH = ragged.grouped(index.q_TNH, 0)
    w_GNQ = ragged.grouped(index.weights_TN.astype(jnp.float32), 0).swapaxes(1, 2)
    G, Q, N, H = q_GQNH.shape
    per, places = plan.groups // _CORES, plan.pieces.shape[-1]
    chunks = -(-index.keys.length // plan.tile)
    size = min(selection.PART, registers := chunks * plan.tile // LANES)
    registers = -(-registers // size) * size
    n = -(-Q * min(index.picks, index.keys.length) // LANES) * LANES

    of_group = functools.partial(group_block, per=per, groups=G)
    blocks = G // len(plan.pieces)
    names = functools.partial(
        of_group, (1, 1, places), together=blocks, memory_space=pltpu.SMEM
    )
    _, _, _, _, chunks_G, limits_GQ, *_ = plan.scalars
    # Those that make up full cores write nothing that matters.
    written = functools.partial(of_group, groups=plan.groups)
    united = jax.ShapeDtypeStruct((plan.groups, 1, n), jnp.int32)
    rows, members, used = pl.pallas_call(
        functools.partial(_step, plan=plan.static(), per=per, picks=index.picks),
        out_shape=(
            united,
            united,
            jax.ShapeDtypeStruct((plan.groups, 1, 1), jnp.int32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(_CORES, per),
            in_specs=[
                of_group((1, Q, N, H)),
                of_group((1, N, Q)),
                pl.BlockSpec(memory_space=pl.ANY),
                names(),
                names(ahead=1),
            ],
            out_specs=(
                *[written((1, 1, n))] * 2,
                written((1, 1, 1), memory_space=pltpu.SMEM),
            ),
            scratch_shapes=[
                pltpu.VMEM((2, plan.tile, H), q_GQNH.dtype),
                pltpu.VMEM((registers, ROWS, LANES), jnp.float32),
                pltpu.VMEM((registers, ROWS, LANES), jnp.int32),
                *[pltpu.VMEM((registers, LANES), jnp.float32)] * 4,
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=2**24 + 4 * LANES * registers * (2 * ROWS + 4),
        ),
        cost_estimate=_cost(plan, index, limits_GQ.size),
        name="indexer_topk",
    )(chunks_G, limits_GQ, q_GQNH, w_GNQ, plan.table, plan.pieces, plan.pieces)
    return Union(rows[:G], members[:G], used[:G, 0, 0])


def _step(
    chunks_ref,
    limit_ref,
    q_ref,
    w_ref,
    keys_any,
    names_ref,
    next_ref,
    *refs,
    plan,
    per,
    picks,
):
    """One group: scores all its keys, then chooses."""
    *outputs, keys_buf, score_ref = refs[:5]
    scratch, sem = selection.Scratch(*refs[5:-1]), refs[-1]
    i = pl.program_id(1)
    g = pl.program_id(0) * per + i
    Q, registers = q_ref.shape[1], plan.tile // LANES
    there = chunks_of(chunks_ref, g)

    def start(j, side, names_ref):
        buffer = keys_buf.at[side]
        mosaic_tpu_chunks.start(j, buffer, keys_any, names_ref, sem.at[side], plan=plan)

    pl.when((i == 0) & (there > 0))(lambda: start(0, 0, names_ref))

    def chunk(j, _):
        side = jax.lax.rem(j, 2)
        pl.when(j + 1 < there)(lambda: start(j + 1, 1 - side, names_ref))
        mosaic_tpu_chunks.wait(keys_buf.at[side], sem.at[side])
        keys_SH = keys_buf[side]
        for query in range(Q):
            dots_NS = product(q_ref[0, query], keys_SH, (1, 1))
            weight_N1 = w_ref[0, :, query : query + 1]
            score_NS = jnp.maximum(dots_NS, 0) * weight_N1
            score_1S = jnp.sum(score_NS, axis=0, keepdims=True)
            for n in range(registers):
                lanes = score_1S[:, n * LANES : (n + 1) * LANES]
                score_ref[j * registers + n, query : query + 1] = lanes
        return _

    jax.lax.fori_loop(0, there, chunk, 0)
    ahead = jnp.minimum(g + 1, len(chunks_ref) - 1)
    more = (i + 1 < per) & (chunks_of(chunks_ref, ahead) > 0)
    pl.when(more)(lambda: start(0, 0, next_ref))
    selection.select(
        score_ref,
        scratch,
        outputs,
        limits=[limit_ref[g * plan.queries + query] for query in range(Q)],
        picks=picks,
        registers=there * registers,
        together=math.gcd(registers, selection.TOGETHER),
    )


def chunks_of(chunks_ref, group):
    """Chunks of keys that a group scores."""
    return chunks_ref[group]


def _cost(plan: Plan, index: Index, queries: int) -> pl.CostEstimate:
    """What is read and computed at most."""
    heads, width = index.q_TNH.shape[1:]
    keys = plan.pieces.shape[-1] * plan.piece
    read = index.q_TNH.size + plan.groups_real * keys * width
    return pl.CostEstimate(
        flops=2 * queries * heads * width * keys,
        transcendentals=0,
        bytes_accessed=read * index.q_TNH.dtype.itemsize
        + 8 * plan.groups_real * plan.queries * index.picks,
    )
