"""A group's recent rows in a TPU's kernel: where they lie, and which a query sees.

They lie in order, those before the pass and then its own, as XLA has put them; or in
their slot's ring, in which position p is at place p mod S and the pass's own are
remembered already. Out of a ring come whole tiles, past its end from its beginning on.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.ragged import Ragged, Table
from pallas_kernels.rings import Lookback, in_order
from pallas_kernels.sparse_attention.plan import ROWS, Plan


def ring_of(before: Array | Lookback, *, causal: bool) -> Table | None:
    """The ring that recent rows can be read out of; None if they must be put in order.

    As for a block in which all see all: its own rows are in no ring.
    """
    if not causal or not isinstance(before, Lookback) or before.ring.length % ROWS:
        return None
    return before.ring


def operand(
    plan: Plan,
    before: Float[Array, "B W H"] | Lookback,
    keys_TH: Float[Array, "T H"],
    ragged: Ragged,
) -> Float[Array, "R H"]:
    """Recent rows of all slots, or the rings of all layers where they lie."""
    if not plan.ring:
        rows_BRH = plan.recent_rows(in_order(before, ragged), keys_TH, ragged)
        return rows_BRH.reshape(-1, rows_BRH.shape[2])
    assert isinstance(before, Lookback)
    rows_LBSH = before.ring.rows_LBCH
    rows_RH = rows_LBSH.reshape(-1, rows_LBSH.shape[3])
    return pltpu.with_memory_space_constraint(rows_RH, pltpu.HBM)


def start(first, rows_any, buffer, sem, plan: Plan):
    """Starts copies of a group's recent rows, out of a ring tile by tile.

    Args:
      first: place of the first one, see `Plan`.
      rows_any: see `operand`.
      buffer: [R, H], where they go in order.
      sem: counts what has arrived.
      plan: the group's.
    """
    piece = ROWS if plan.ring else plan.recent
    slot = first // plan.ring * plan.ring if plan.ring else 0

    @pl.loop(0, plan.recent // piece)
    def _(k):
        place = first + k * piece
        if plan.ring:
            place -= jnp.where(place - slot >= plan.ring, plan.ring, 0)
        pltpu.make_async_copy(
            rows_any.at[pl.ds(pl.multiple_of(place, ROWS), piece)],
            buffer.at[pl.ds(pl.multiple_of(k * piece, ROWS), piece)],
            sem,
        ).start()


def wait(buffer, sem):
    """Waits until all are there."""
    pltpu.make_async_copy(buffer, buffer, sem).wait()


def seen_by(query, before, own, plan: Plan):
    """Which of a group's recent rows, and of the padding behind, a query sees: [1, R].

    Args:
      query: which of the group's queries.
      before: W less the position of the group's first query, or of the block's first
        where all see the same.
      own: tokens of the slot.
      plan: the group's.
    """
    row_1R = jax.lax.broadcasted_iota(jnp.int32, (1, plan.recent_columns), 1)
    if not plan.causal:
        return (row_1R >= before) & (row_1R < plan.lookback + own)
    # Out of a ring, rows begin with a tile's first, at a multiple of ROWS.
    row_1R -= -before % ROWS if plan.ring else 0
    oldest = jnp.maximum(before, query)
    return (row_1R >= oldest) & (row_1R <= plan.lookback + query)
