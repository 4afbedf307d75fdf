"""Rings: tables of a slot's newest rows, in which position p lies at place p mod S."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged import Ragged, Table


def before(
    ring: Table, starts_B: Int[Array, " B"], count: int
) -> Float[Array, "B count H"]:
    """The rows of the `count` positions before `starts_B`.

    Those of positions below 0 are anything.
    """
    positions_BX = starts_B[:, None] + jnp.arange(-count, 0)
    return ring.take(positions_BX % ring.length)


def append(
    ring: Table,
    positions_T: Int[Array, " T"],
    new_TH: Float[Array, "T H"],
    ragged: Ragged,
) -> Table:
    """With the rows of this pass's tokens; padding writes nothing."""
    keep_T = ragged.slots_T >= 0
    if ragged.rows > ring.length:
        # The older rows of a long pass would only be overwritten by its newer ones.
        counts_T = ragged.counts_B[ragged.slots_T]
        keep_T &= ragged.rows_T >= counts_T - ring.length
    return ring.put(ragged.slots_T, positions_T % ring.length, new_TH, keep_T)


def advance(
    ring: Table,
    count: int,
    positions_T: Int[Array, " T"],
    new_TH: Float[Array, "T H"],
    ragged: Ragged,
) -> tuple[Float[Array, "B count H"], Table]:
    """The rows before this pass, and the ring with the pass's own.

    The barrier has them read before anything is written: else XLA copies the table.
    """
    before_BKH = before(ring, ragged.starts_B, count)
    before_BKH, rows = jax.lax.optimization_barrier((before_BKH, ring.rows_LBCH))
    return before_BKH, append(ring.having(rows), positions_T, new_TH, ragged)
