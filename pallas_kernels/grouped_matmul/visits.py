"""Rows in tiles of one group each, so that a group's matrix meets all its rows at once.

Rows come sorted by group, groups start anywhere. A tile holds rows of one group, from
the group's start on; the last tile of a group is filled with any. So tiles follow the
rows and the groups that have some: there are at most (A + N (t - 1)) / t of t rows, of
which N = min(E, A) groups have any.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """Tiles of rows, V at most.

    Attributes:
      groups_V: group of each tile; anything from `count` on.
      count: tiles that hold rows.
      rows_P: row that lies at each place of the V t there are; A where none does.
      places_A: place of each row; V t for rows of no group.
      tile: t.
    """

    groups_V: Int[Array, " V"]
    count: Int[Array, ""]
    rows_P: Int[Array, " P"]
    places_A: Int[Array, " A"]
    tile: int = field(metadata={"static": True})

    @classmethod
    def of(cls, rows: int, group_sizes_E: Int[Array, " E"], tile: int) -> "Visits":
        """The tiles of so many rows."""
        ends_E = jnp.cumsum(group_sizes_E)
        tiles_E = jnp.cumsum(-(-group_sizes_E // tile))
        starts_E, before_E = ends_E - group_sizes_E, tiles_E - -(-group_sizes_E // tile)
        last = len(group_sizes_E) - 1
        hit = min(rows, len(group_sizes_E))
        most = (rows + hit * (tile - 1)) // tile

        def group_of(ends_E, index):
            found = jnp.searchsorted(ends_E, index, side="right", method="compare_all")
            return jnp.minimum(found, last)

        visit_V = jnp.arange(most)
        groups_V = group_of(tiles_E, visit_V)
        first_V = starts_E[groups_V] + (visit_V - before_E[groups_V]) * tile
        rows_Vt = first_V[:, None] + jnp.arange(tile)
        there_Vt = (rows_Vt < ends_E[groups_V][:, None]) & (visit_V < tiles_E[-1])[
            :, None
        ]
        row_A = jnp.arange(rows)
        group_A = group_of(ends_E, row_A)
        places_A = before_E[group_A] * tile + row_A - starts_E[group_A]
        return cls(
            groups_V,
            tiles_E[-1],
            jnp.where(there_Vt, rows_Vt, rows).ravel(),
            jnp.where(row_A < ends_E[-1], places_A, most * tile),
            tile,
        )

    def tiled(self, x_AI: Float[Array, "A I"]) -> Float[Array, "P I"]:
        """Rows in tiles, any of them between."""
        return x_AI.at[self.rows_P].get(mode="clip")

    def flat(self, y_PO: Float[Array, "P O"]) -> Float[Array, "A O"]:
        """Rows as they came; zeros for those of no group."""
        return y_PO.at[self.places_A].get(mode="fill", fill_value=0)
