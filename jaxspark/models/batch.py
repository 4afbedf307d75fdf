"""Flat tokens: one ragged batch shape for prefill, decode, verification, training.

A pass of the target sees T tokens on one axis. Each knows its id, its absolute position
and its slot (-1: padding). Products, experts and the head run on T rows; only attention
looks at slots.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspark.settings import standard_settings
from pallas_kernels.ragged import Ragged


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FlatTokens(Ragged):
    """T tokens of B slots.

    Attributes:
      ids_T: token ids, any value where padded.
      positions_T: absolute position of each token in its slot.
      limits_T: how many cached positions each token sees. `positions_T + 1` is causal
        attention; a draft block sees all of itself with `anchor + block_length`.
      pages_BP: where the slots' cache rows lie, see `jaxspark.models.pages`; None for
        caches in which a slot's rows lie together.
    """

    ids_T: Int[Array, " T"]
    positions_T: Int[Array, " T"]
    limits_T: Int[Array, " T"]
    pages_BP: Int[Array, "B P"] | None = None

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
        pages_BP: Int[Array, "B P"] | None = None,
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
        offsets_B = ends_B - counts_B
        row_T = jnp.clip(place_T - offsets_B[safe_T], 0, rows - 1)
        positions_T = starts_B[safe_T] + row_T
        return cls(
            ids_T=ids_BQ[safe_T, row_T],
            positions_T=positions_T,
            limits_T=positions_T + 1 if limits_B is None else limits_B[safe_T],
            slots_T=jnp.where(real_T, safe_T, -1),
            starts_B=starts_B,
            offsets_B=offsets_B,
            counts_B=counts_B,
            pages_BP=pages_BP,
            rows=rows,
        )
