"""`cached_attention` on TPUs: positions that some query sees are read, once.

Moved: per group of a slot's queries, the keys and values of all heads below the group's
furthest limit, a chunk of positions at a time, in place: a chunk is one copy out of the
slot's rows, or one for each of its pages. The next chunk, or the next group's first, is
on its way while one is computed (`mosaic_tpu_kernel`). Computed: for each head of keys,
its queries (of the group, times heads that share it) are the rows of two products, with
an online softmax between them.

XLA reads the whole capacity of every slot, writes the scores, and copies pages into
their order first. A TPU of two cores gives each half of the groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sizes import block_sizes, shape
from pallas_kernels.cached_attention.mosaic_tpu_kernel import attend
from pallas_kernels.cached_attention.ref import cached_attention_xla
from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.groups import group_block
from pallas_kernels.ragged import LANES, Ragged

_CORES = 2
_VMEM = 48 << 20
# Positions of a chunk, and bytes of its keys and values at most; rows of a product.
CHUNK = 512
_CHUNK_BYTES = 4 << 20
_ROWS = 256


def supports(
    q_TNH, k_BKSH, v_BKSH, ragged: Ragged, limits_T, pages_BP, *, scale
) -> str | None:
    """Why the kernel cannot attend over these; None if it can."""
    _, _, S, H = k_BKSH.shape
    types = {x.dtype for x in (q_TNH, k_BKSH, v_BKSH)}
    if len(types) > 1 or not types <= {jnp.dtype("float32"), jnp.dtype("bfloat16")}:
        return f"wants one type, float32 or bfloat16, got {sorted(map(str, types))}"
    if H % LANES:
        return f"needs heads that are a multiple of {LANES} wide, got {H}"
    if S % (rows := 16):
        return f"reads positions by {rows}, got {S} of a slot or page"
    return None


@with_gradients_of(cached_attention_xla)
def cached_attention_mosaic_tpu(
    q_TNH: Float[Array, "T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    ragged: Ragged,
    limits_T: Int[Array, " T"],
    pages_BP: Int[Array, "B P"] | None,
    scale: float,
) -> Float[Array, "T N H"]:
    """See `api.cached_attention`; gradients are the reference's."""
    T, N, H = q_TNH.shape
    _, K, S, _ = k_BKSH.shape
    B, shared, dtype = ragged.slots, N // K, q_TNH.dtype
    of = shape(dtype, Q=ragged.rows, K=K, N=N, H=H)
    rows, positions = block_sizes("cached_attention", of, rows=_ROWS, positions=CHUNK)
    size = min(ragged.rows, max(1, rows // shared))
    length, paged = S, pages_BP is not None
    if pages_BP is not None:
        length *= pages_BP.shape[1]
    chunk, pieces = _chunk(S, length, K * H * dtype.itemsize, paged, positions)
    q_GQNH = ragged.grouped(q_TNH, 0, size)
    groups_real, blocks = len(q_GQNH), len(q_GQNH) // B
    groups = -(-groups_real // _CORES) * _CORES
    per = groups // _CORES
    q_GQKgH = q_GQNH.reshape(groups_real, size, K, shared, H)
    rows = -(-size * shared // 8) * 8
    q_GKMH = jnp.moveaxis(q_GQKgH, 2, 1).reshape(groups_real, K, size * shared, H)
    missing = ((0, 0), (0, 0), (0, rows - size * shared), (0, 0))
    q_GKMH = jnp.pad(q_GKMH, missing)
    limits_GQ = ragged.grouped(limits_T.astype(jnp.int32), 0, size)
    limits_GM = jnp.repeat(limits_GQ, shared, axis=1)
    limits_GM1 = jnp.pad(limits_GM, missing[1:3])[..., None]
    chunks_G = -(-limits_GQ.max(1) // chunk)
    chunks_G = jnp.pad(chunks_G, (0, groups - groups_real))
    table = jnp.arange(B) if pages_BP is None else pages_BP
    whole = pl.BlockSpec(memory_space=pl.ANY)

    of_group = functools.partial(group_block, per=per, groups=groups_real)
    static = {
        "per": per,
        "blocks": blocks,
        "slots": B,
        "pieces": pieces,
        "paged": paged,
        "scale": scale,
    }
    visited = limits_GM1.size // rows * 2 * K * H * length
    o_GKMH = pl.pallas_call(
        functools.partial(attend, **static),
        # Groups that make up full cores write nothing that matters.
        out_shape=jax.ShapeDtypeStruct((groups, K, rows, H), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(_CORES, per),
            in_specs=[
                of_group((1, K, rows, H)),
                of_group((1, rows, 1)),
                whole,
                whole,
            ],
            out_specs=of_group((1, K, rows, H), groups=groups),
            scratch_shapes=[
                pltpu.VMEM((2, K, chunk, H), dtype),
                pltpu.VMEM((2, K, chunk, H), dtype),
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, H), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * visited * rows,
            transcendentals=visited // H * rows,
            bytes_accessed=(visited + 2 * q_TNH.size) * dtype.itemsize,
        ),
        name="cached_attention",
    )(chunks_G, table.reshape(-1).astype(jnp.int32), q_GKMH, limits_GM1, k_BKSH, v_BKSH)
    o_GKQgH = o_GKMH[:groups_real, :, : size * shared]
    o_GKQgH = o_GKQgH.reshape(groups_real, K, size, shared, H)
    o_BQNH = jnp.moveaxis(o_GKQgH, 1, 2).reshape(B, -1, N, H)
    return ragged.flat(o_BQNH)


def _chunk(
    S: int, length: int, row_bytes: int, paged: bool, positions: int
) -> tuple[int, int]:
    """Positions of a chunk, and the copies that they are."""
    most = max(min(positions, _CHUNK_BYTES // (2 * row_bytes)), 16)
    if not paged:
        return min(most // 16 * 16, S), 1
    pieces = max(1, min(most, length) // S)
    return pieces * S, pieces
