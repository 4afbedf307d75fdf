"""Tables of rows that the layers of one kind share.

Stacked layers run in one loop, so their caches are one array [L, B, S, H] carried
through it, of which layer l reads and writes its own part in place. What a row belongs
to depends on the table: in a *ring* position p lies at place p mod S, so the newest S
positions are there; in a table of compressed entries place c is entry c.

Nothing is ever undone. A ring is `REWIND` places longer than what a query may look back
at: positions written past a slot's length and then rejected have overwritten only what
no query looks at any more.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.models.batch import FlatTokens, SlotView

# Most positions by which a slot may be set back: drafts of a round.
REWIND = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Rows of width H, S for each of B slots and L layers."""

    rows_LBSH: Float[Array, "L B S H"]

    @classmethod
    def zeros(cls, layers: int, slots: int, length: int, width: int, dtype) -> "Rows":
        """An empty table."""
        return cls(jnp.zeros((layers, slots, length, width), dtype))

    @classmethod
    def ring(
        cls, layers: int, slots: int, length: int, width: int, dtype, *, lookback: int
    ) -> "Rows":
        """An empty ring for up to `length` positions.

        No query reads further back than `lookback` positions before its pass.
        """
        size = min(length, lookback + REWIND)
        # TPUs tile rows by sixteens: another size would be copied for every view.
        return cls.zeros(layers, slots, -(-size // 16) * 16, width, dtype)

    @property
    def length(self) -> int:
        """S."""
        return self.rows_LBSH.shape[2]

    def layer(self, layer: Int[Array, ""]) -> Float[Array, "B S H"]:
        """All rows of one layer."""
        if len(self.rows_LBSH) == 1:  # nothing to choose, nothing to move
            return self.rows_LBSH[0]
        return jax.lax.dynamic_index_in_dim(self.rows_LBSH, layer, keepdims=False)

    def take(
        self, layer: Int[Array, ""], places_BX: Int[Array, "B X"]
    ) -> Float[Array, "B X H"]:
        """Some rows of every slot."""
        return self._table()[
            self._row(layer, jnp.arange(len(places_BX))[:, None], places_BX)
        ]

    def put(
        self,
        layer: Int[Array, ""],
        slots_N: Int[Array, " N"],
        places_N: Int[Array, " N"],
        new_NH: Float[Array, "N H"],
        keep_N: Bool[Array, " N"],
    ) -> "Rows":
        """With new rows where `keep_N`; no two of them at one place."""
        row_N = self._row(layer, slots_N, places_N)
        row_N = jnp.where(keep_N, row_N, self._table().shape[0])
        table = (
            self._table()
            .at[row_N]
            .set(new_NH.astype(self.rows_LBSH.dtype), mode="drop")
        )
        # Without the barrier XLA may fuse the write into readers and copy the table.
        table = jax.lax.optimization_barrier(table)
        return Rows(table.reshape(self.rows_LBSH.shape))

    def before(
        self, layer: Int[Array, ""], starts_B: Int[Array, " B"], count: int
    ) -> Float[Array, "B count H"]:
        """Of a ring, the rows of the `count` positions before `starts_B`.

        Those of positions below 0 are anything.
        """
        positions_BX = starts_B[:, None] + jnp.arange(-count, 0)
        return self.take(layer, positions_BX % self.length)

    def advance(
        self,
        layer: Int[Array, ""],
        count: int,
        new_TH: Float[Array, "T H"],
        tokens: FlatTokens,
        view: SlotView,
    ) -> tuple[Float[Array, "B count H"], "Rows"]:
        """Of a ring, the rows before this pass, and the ring with the pass's own.

        The barrier has them read before anything is written: else XLA copies the table.
        """
        before_BKH = self.before(layer, tokens.starts_B, count)
        before_BKH, table = jax.lax.optimization_barrier((before_BKH, self.rows_LBSH))
        return before_BKH, Rows(table).append(layer, new_TH, tokens, view)

    def append(
        self,
        layer: Int[Array, ""],
        new_TH: Float[Array, "T H"],
        tokens: FlatTokens,
        view: SlotView,
    ) -> "Rows":
        """Of a ring, with the rows of this pass's tokens; padding writes nothing."""
        keep_T = tokens.slots_T >= 0
        if tokens.rows > self.length:
            # The older rows of a long pass would only be overwritten by its newer ones.
            counts_T = view.counts_B[tokens.slots_T]
            keep_T &= view.row_T >= counts_T - self.length
        places_T = tokens.positions_T % self.length
        return self.put(layer, tokens.slots_T, places_T, new_TH, keep_T)

    def at_slots(self, slots_N: Int[Array, " N"]) -> "Rows":
        """The rows of N slots; numbers past the last slot read the last."""
        return Rows(self.rows_LBSH.at[:, slots_N].get(mode="clip"))

    def with_slots(self, slots_N: Int[Array, " N"], rows: "Rows") -> "Rows":
        """With the rows of N slots replaced; numbers past the last are skipped."""
        return Rows(self.rows_LBSH.at[:, slots_N].set(rows.rows_LBSH, mode="drop"))

    def _table(self):
        """All rows on one axis: a scatter over it is done in place everywhere."""
        return self.rows_LBSH.reshape(-1, self.rows_LBSH.shape[-1])

    def _row(self, layer, slots, places):
        _, B, S, _ = self.rows_LBSH.shape
        return (layer * B + slots) * S + places
