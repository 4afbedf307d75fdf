"""Flat tokens: one ragged batch shape for prefill, decode, verification, training.

A pass of the target sees T tokens on one axis. Each knows its id, its absolute position
and its slot (-1: padding). Products, experts and the head run on T columns; only
attention looks at slots, through the padded view [B, Q] in which row r of slot b is the
slot's r-th token of this pass.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxspark.settings import standard_settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatTokens:
    """T tokens of B slots; each slot's tokens hold consecutive positions.

    Attributes:
      ids_T: token ids, any value where padded.
      positions_T: absolute position of each token in its slot.
      slots_T: slot of each token, -1 for padding.
      starts_B: position of each slot's first token of this pass (any value if none).
      limits_T: how many cached positions each token sees. `positions_T + 1` is causal
        attention; a draft block sees all of itself with `anchor + block_length`.
      rows: Q, the most tokens one slot has in this pass (static).
    """

    ids_T: Int[Array, " T"]
    positions_T: Int[Array, " T"]
    slots_T: Int[Array, " T"]
    starts_B: Int[Array, " B"]
    limits_T: Int[Array, " T"]
    rows: int = field(metadata={"static": True})

    @classmethod
    @standard_settings()
    def from_rows(
        cls,
        ids_BQ: Int[Array, "B Q"],
        starts_B: Int[Array, " B"],
        counts_B: Int[Array, " B"],
        *,
        capacity: int | None = None,
        limits_B: Int[Array, " B"] | None = None,
    ) -> "FlatTokens":
        """Packs the first `counts_B` tokens of each row into `capacity` flat places.

        Tokens of slot b take positions starts_B[b], starts_B[b]+1, ... `capacity`
        defaults to B*Q; counts beyond it are the caller's error (they would be lost).
        """
        slots, rows = ids_BQ.shape
        capacity = slots * rows if capacity is None else capacity
        ends_B = jnp.cumsum(counts_B)
        place_T = jnp.arange(capacity)
        # The slot of a place is the number of slots that end at or before it.
        slot_T = jnp.searchsorted(ends_B, place_T, side="right", method="compare_all")
        real_T = place_T < ends_B[-1]
        safe_T = jnp.minimum(slot_T, slots - 1)
        row_T = jnp.clip(place_T - (ends_B - counts_B)[safe_T], 0, rows - 1)
        positions_T = starts_B[safe_T] + row_T
        return cls(
            ids_T=ids_BQ[safe_T, row_T],
            positions_T=positions_T,
            slots_T=jnp.where(real_T, safe_T, -1),
            starts_B=starts_B,
            limits_T=positions_T + 1 if limits_B is None else limits_B[safe_T],
            rows=rows,
        )

    @property
    def slots(self) -> int:
        """B, the number of slots."""
        return self.starts_B.shape[0]

    def view(self) -> "SlotView":
        """The padded [B, Q] view of these tokens; compute it once per pass."""
        real_T = self.slots_T >= 0
        slot_T = jnp.where(real_T, self.slots_T, self.slots)
        row_T = self.positions_T - self.starts_B[jnp.minimum(slot_T, self.slots - 1)]
        padding = self.slots_T.shape[0]
        index_BQ = jnp.full((self.slots, self.rows), padding, jnp.int32)
        place_T = jnp.arange(padding, dtype=jnp.int32)
        index_BQ = index_BQ.at[slot_T, row_T].set(place_T, mode="drop")
        return SlotView(index_BQ, slot_T, row_T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotView:
    """Two-way map between flat places and (slot, row).

    Attributes:
      index_BQ: flat place of each (slot, row), T where there is none.
      slot_T: slot of each place, B for padding (scatters with mode="drop" skip it).
      row_T: row of each place in its slot.
    """

    index_BQ: Int[Array, "B Q"]
    slot_T: Int[Array, " T"]
    row_T: Int[Array, " T"]

    @property
    def counts_B(self) -> Int[Array, " B"]:
        """Tokens of each slot."""
        return jnp.sum(self.index_BQ < len(self.slot_T), axis=1)

    def spread(self, x_T: Shaped[Array, "T ..."], fill) -> Shaped[Array, "B Q ..."]:
        """Flat to padded; absent rows read `fill`."""
        return x_T.at[self.index_BQ].get(mode="fill", fill_value=fill)

    def collect(self, x_BQ: Shaped[Array, "B Q ..."]) -> Shaped[Array, "T ..."]:
        """Padded to flat; padding reads some row (its value must not matter)."""
        return x_BQ[jnp.minimum(self.slot_T, x_BQ.shape[0] - 1), self.row_T]
