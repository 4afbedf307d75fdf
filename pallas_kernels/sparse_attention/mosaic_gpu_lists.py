"""What XLA tells each block of threads of a GPU kernel to read."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged import Ragged
from pallas_kernels.rings import Lookback, in_order
from pallas_kernels.sparse_attention.mosaic_gpu_kernel import HEADS
from pallas_kernels.sparse_attention.mosaic_gpu_rows import TILE_ROWS
from pallas_kernels.sparse_attention.plan import Plan
from pallas_kernels.sparse_attention.ref import recent_rows, recent_spans

CORES = 132  # of an H100 or H200


def named(
    pieces_G1n: Int[Array, "G 1 n"], members_G1n: Int[Array, "G 1 n"], tile: int
) -> Int[Array, "G c t"]:
    """Places that a query named; instead of what it did not, ~ one that it did.

    So nothing is read that the query does not see.
    """
    named_G1n = members_G1n != 0
    first_G11 = jnp.argmax(named_G1n, axis=2, keepdims=True)
    first_G11 = jnp.take_along_axis(pieces_G1n, first_G11, axis=2)
    places_G1n = jnp.where(named_G1n, pieces_G1n, ~first_G11)
    return places_G1n.reshape(len(places_G1n), -1, tile)


def recent(
    before: Float[Array, "B W H"] | Lookback,
    keys_TH: Float[Array, "T H"],
    ragged: Ragged,
) -> tuple[Float[Array, "R H"], int, Int[Array, " B"], Int[Array, " B"]]:
    """Recent rows of all slots, R / B for each or more, where they lie.

    Returns:
      The rows; how many are a slot's, where they wrap; where each slot's begin; what is
      to be added to a row's number, as `recent_spans` has them, before it wraps.
    """
    if isinstance(before, Lookback) and before.ring.length % TILE_ROWS == 0:
        ring, origin_B = before.ring, ragged.starts_B - before.count
        first_B = ring.places(jnp.zeros(ragged.slots, jnp.int32))
        rows_RH = ring.rows_LBCH.reshape(-1, keys_TH.shape[1])
        return rows_RH, ring.length, first_B, origin_B
    rows_BRH = recent_rows(in_order(before, ragged), keys_TH, ragged)
    missing = -rows_BRH.shape[1] % TILE_ROWS
    rows_BRH = jnp.pad(rows_BRH, ((0, 0), (0, missing), (0, 0)))
    slots, size, width = rows_BRH.shape
    first_B = size * jnp.arange(slots)
    return rows_BRH.reshape(-1, width), size, first_B, jnp.zeros_like(first_B)


def per_token(
    plan: Plan,
    ragged: Ragged,
    tile: int,
    size: int,
    first_B: Int[Array, " B"],
    origin_B: Int[Array, " B"],
) -> Int[Array, "T 8"]:
    """Integers that a block of threads reads; padding has no chunks.

    The token's slot; its first recent row, where a tile begins; chunks of recent rows,
    and of all. Of the rows of recent chunks, it sees those from .. to - 1; of all rows
    from the first recent one on, entries up to a limit. Last, its group.

    The last three operands are as `recent` returns them.
    """
    real_T, slot_T = ragged.slots_T >= 0, jnp.maximum(ragged.slots_T, 0)
    spans_BQ2 = recent_spans(ragged, plan.lookback, causal=plan.causal)
    spans_BQ2 += origin_B[:, None, None]
    oldest_T, newest_T = jnp.moveaxis(ragged.flat(spans_BQ2), -1, 0)
    aligned_T = oldest_T // TILE_ROWS * TILE_ROWS
    recent_T = -(-(newest_T - aligned_T) // tile)
    first_T = first_B[slot_T] + aligned_T % size
    group_T = slot_T * plan.blocks + ragged.rows_T
    _, _, _, _, chunks_G, limits_G, *_ = plan.scalars
    limit_T = 2**30 if plan.chosen else limits_G[group_T] + recent_T * tile
    columns = (
        *(slot_T, first_T),
        *(recent_T, jnp.where(real_T, recent_T + chunks_G[group_T], 0)),
        *(oldest_T - aligned_T, newest_T - aligned_T, limit_T, group_T),
    )
    full = [jnp.broadcast_to(each, slot_T.shape) for each in columns]
    return jnp.stack(full, axis=1).astype(jnp.int32)


def most_chunks(plan: Plan, tile: int) -> int:
    """That a token can have."""
    recent = -(-(plan.recent + TILE_ROWS) // tile)
    return recent + (plan.pieces.shape[-1] * plan.piece // tile if plan.piece else 0)


def parts_of(blocks: int, chunks: int, tile: int) -> int:
    """How many blocks of threads should share the chunks of one, each a part.

    One runs on a core at a time. They all take as long as the fullest core: its turns
    of a part's chunks, and of a part's output, as large as a chunk of 64 rows, which is
    written and read again. Of what differs by less than a tenth, the fewest parts.
    """

    def turns(parts):
        extra = 2 * HEADS / tile if parts > 1 else 0
        return -(-blocks * parts // CORES) * (-(-chunks // parts) + extra)

    takes = {parts: turns(parts) for parts in range(1, max(chunks // 4, 1) + 1)}
    return min(p for p, each in takes.items() if each <= 1.1 * min(takes.values()))
