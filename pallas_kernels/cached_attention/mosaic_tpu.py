"""`cached_attention` on TPUs: positions that some query sees are read, once.

Moved: per group of a slot's queries, the keys and values of all heads below the group's
furthest limit, a chunk of positions at a time, in place: a chunk is one copy out of the
slot's rows, or one for each of its pages. The next chunk, or the next group's first, is
on its way while one is computed. Computed: for each head of keys, its queries (of the
group, times heads that share it) are the rows of two products, with an online softmax
between them.

XLA reads the whole capacity of every slot, writes the scores, and copies pages into
their order first. A TPU of two cores gives each half of the groups.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sizes import block_sizes, shape
from pallas_kernels.cached_attention.ref import cached_attention_xla
from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.groups import group_block
from pallas_kernels.precision import precision
from pallas_kernels.ragged import LANES, Ragged

_CORES = 2
_VMEM = 48 << 20
# Positions of a chunk, and bytes of its keys and values at most; rows of a product.
CHUNK = 512
_CHUNK_BYTES = 4 << 20
_ROWS = 256
_AHEAD = 2
_UNSEEN = -1e30
_LOG2E = math.log2(math.e)


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
        functools.partial(_step, **static),
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


def _step(
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
        s_MS = _dot(q_ref[0, head], k_buf[side, head], 1) * (scale * _LOG2E)
        return jnp.where(seen_MS, s_MS, _UNSEEN)

    def accumulate(head, s_MS, v_SH):
        old_M1 = m_ref[head]
        m_M1 = jnp.maximum(old_M1, s_MS.max(-1, keepdims=True))
        p_MS, keep_M1 = jnp.exp2(s_MS - m_M1), jnp.exp2(old_M1 - m_M1)
        m_ref[head] = m_M1
        l_ref[head] = keep_M1 * l_ref[head] + p_MS.sum(-1, keepdims=True)
        acc_ref[head] = keep_M1 * acc_ref[head] + _dot(p_MS.astype(v_SH.dtype), v_SH, 0)

    jax.lax.fori_loop(0, there, visit, 0)
    side = jax.lax.rem(begin + there, 2)
    side_ref[0] = side
    pl.when((there == 0) & more)(lambda: start(following, 0, side))
    weight_KM1 = jnp.maximum(l_ref[...], 1e-30)
    o_ref[0] = (acc_ref[...] / weight_KM1).astype(o_ref.dtype)


def chunks_of(chunks_ref, group):
    """Chunks of positions that a group reads."""
    return chunks_ref[group]


def _dot(x, rows, contracted):
    return jax.lax.dot_general(
        x,
        rows,
        (((1,), (contracted,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
