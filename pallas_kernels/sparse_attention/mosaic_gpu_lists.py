"""What XLA tells each block of threads of a GPU kernel to read."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.ragged import Ragged
from pallas_kernels.sparse_attention.mosaic_gpu_kernel import HEADS, TILE_ROWS
from pallas_kernels.sparse_attention.plan import Plan
from pallas_kernels.sparse_attention.ref import recent_spans

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


def per_token(plan: Plan, ragged: Ragged, tile: int) -> Int[Array, "T 8"]:
    """Integers that a block of threads reads; padding has no chunks.

    The token's slot; its first recent row, where a tile begins; chunks of recent rows,
    and of all. Of the rows of recent chunks, it sees those from .. to - 1; of all rows
    from the first recent one on, entries up to a limit. Last, its group.
    """
    real_T, slot_T = ragged.slots_T >= 0, jnp.maximum(ragged.slots_T, 0)
    spans_BQ2 = recent_spans(ragged, plan.lookback, causal=plan.causal)
    oldest_T, newest_T = jnp.moveaxis(ragged.flat(spans_BQ2), -1, 0)
    first_T = oldest_T // TILE_ROWS * TILE_ROWS
    recent_T = -(-(newest_T - first_T) // tile)
    group_T = slot_T * plan.blocks + ragged.rows_T
    _, _, _, _, chunks_G, limits_G, *_ = plan.scalars
    limit_T = 2**30 if plan.chosen else limits_G[group_T] + recent_T * tile
    columns = (
        *(slot_T, first_T),
        *(recent_T, jnp.where(real_T, recent_T + chunks_G[group_T], 0)),
        *(oldest_T - first_T, newest_T - first_T, limit_T, group_T),
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
