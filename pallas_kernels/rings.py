"""Rings: tables of a slot's newest rows, in which position p lies at place p mod S."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged import Ragged, Table


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookback:
    """The W rows before a pass, where they lie: in a ring that has the pass's own too.

    Attributes:
      ring: long enough for both, see `kept_whole`.
      count: W.
    """

    ring: Table
    count: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the rows in order, [B, W, H]."""
        _, slots, _, *width = self.ring.rows_LBCH.shape
        return slots, self.count, math.prod(width)

    @property
    def dtype(self):
        """Of the rows."""
        return self.ring.rows_LBCH.dtype


def in_order(
    rows: Float[Array, "B W H"] | Lookback, ragged: Ragged
) -> Float[Array, "B W H"]:
    """The rows before a pass, oldest first, out of their ring if they lie in one."""
    if isinstance(rows, Lookback):
        return before(rows.ring, ragged.starts_B, rows.count)
    return rows


def kept_whole(ring: Table, ragged: Ragged, lookback: int) -> bool:
    """Whether a pass overwrites none of the `lookback` rows before it in the ring."""
    return ragged.rows + lookback <= ring.length


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
