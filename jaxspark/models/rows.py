"""Tables of rows that the layers of one kind share.

Stacked layers run in one loop, so their caches are one array [L, B, S, H] carried
through it, of which layer l reads and writes its own part in place. What a row belongs
to depends on the table: in a *ring* position p lies at place p mod S, so the newest S
positions are there; in a table of compressed entries place c is entry c.

Nothing is ever undone. A ring is `REWIND` places longer than what a query may look back
at: positions written past a slot's length and then rejected have overwritten only what
no query looks at any more.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.models.batch import FlatTokens
from jaxspark.models.pages import PAGE, readable
from pallas_kernels import Table, rings
from pallas_kernels.ragged import LANES, split_lanes
from pallas_kernels.rings import Lookback

# Most positions by which a slot may be set back: drafts of a round.
REWIND = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRows:
    """Rows of width H, S for each of B slots and L layers.

    With pages, B are pages and S rows of a page. H is two axes where rows lie by
    themselves, see `zeros`.

    Attributes:
      rows_LBSH: the rows.
      positions: positions that a row stands for.
    """

    rows_LBSH: Float[Array, "L B S *H"]
    positions: int = field(default=1, metadata={"static": True})
    grows: ClassVar[bool] = True

    @classmethod
    def zeros(
        cls,
        layers: int,
        slots: int,
        length: int,
        width: int,
        dtype,
        *,
        apart: bool = False,
        positions: int = 1,
    ) -> Self:
        """An empty table.

        A TPU's memory holds rows in tiles, out of which no single row can be fetched:
        those that are read one by one should lie `apart`, in whole words of lanes.
        """
        rows_LBSH = jnp.zeros((layers, slots, length, width), dtype)
        apart = apart and width % (2 * LANES) == 0
        return cls(split_lanes(rows_LBSH) if apart else rows_LBSH, positions)

    @property
    def length(self) -> int:
        """S."""
        return self.rows_LBSH.shape[2]

    def pool(self, pages: int) -> Self:
        """Empty pages.

        Raises:
          ValueError: a row stands for positions of two pages.
        """
        if PAGE % self.positions:
            raise ValueError(
                f"pages of {PAGE} positions cannot hold rows that stand for "
                f"{self.positions} each"
            )
        layers, _, _, *H = self.rows_LBSH.shape
        return type(self).zeros(
            layers,
            pages,
            PAGE // self.positions,
            math.prod(H),
            self.rows_LBSH.dtype,
            # A page's only row is read by itself.
            apart=len(H) > 1 or self.positions == PAGE,
            positions=self.positions,
        )

    def table(
        self, layer: Int[Array, ""], pages_BP: Int[Array, "B P"] | None = None
    ) -> Table:
        """One layer's rows, to be read in place; `pages_BP` as in `FlatTokens`."""
        return Table(self.rows_LBSH, layer, readable(pages_BP))

    def put(
        self,
        layer: Int[Array, ""],
        slots_N: Int[Array, " N"],
        places_N: Int[Array, " N"],
        new_NH: Float[Array, "N H"],
        keep_N: Bool[Array, " N"],
        pages_BP: Int[Array, "B P"] | None = None,
    ) -> Self:
        """With new rows where `keep_N`; no two of them at one place.

        Those of places past the table's end, and of pages that a slot does not own, are
        left out; `pages_BP` as in `FlatTokens`.
        """
        table = Table(self.rows_LBSH, layer, pages_BP)
        table = table.put(slots_N, places_N, new_NH, keep_N)
        return replace(self, rows_LBSH=table.rows_LBCH)

    def at_slots(self, slots_N: Int[Array, " N"]) -> Self:
        """The rows of N slots; numbers past the last slot read the last."""
        rows = self.rows_LBSH.at[:, slots_N].get(mode="clip")
        return replace(self, rows_LBSH=rows)

    def with_slots(self, slots_N: Int[Array, " N"], rows: Self) -> Self:
        """With the rows of N slots replaced; numbers past the last are skipped."""
        new = self.rows_LBSH.at[:, slots_N].set(rows.rows_LBSH, mode="drop")
        return replace(self, rows_LBSH=new)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring(LayerRows):
    """Rows of the newest S positions of each slot."""

    grows: ClassVar[bool] = False

    @classmethod
    def empty(
        cls, layers: int, slots: int, length: int, width: int, dtype, *, lookback: int
    ) -> Self:
        """A ring for up to `length` positions.

        No query reads further back than `lookback` positions before its pass.
        """
        size = min(length, lookback + REWIND)
        # TPUs tile rows by sixteens: another size would be copied for every view.
        return cls.zeros(layers, slots, -(-size // 16) * 16, width, dtype)

    def before(
        self, layer: Int[Array, ""], starts_B: Int[Array, " B"], count: int
    ) -> Float[Array, "B count H"]:
        """The rows of the `count` positions before `starts_B`.

        Those of positions below 0 are anything.
        """
        return rings.before(self.table(layer), starts_B, count)

    def append(
        self, layer: Int[Array, ""], new_TH: Float[Array, "T H"], tokens: FlatTokens
    ) -> Self:
        """With the rows of this pass's tokens; padding writes nothing."""
        ring = self.table(layer)
        ring = rings.append(ring, tokens.positions_T, new_TH, tokens)
        return replace(self, rows_LBSH=ring.rows_LBCH)

    def advance(
        self,
        layer: Int[Array, ""],
        count: int,
        new_TH: Float[Array, "T H"],
        tokens: FlatTokens,
    ) -> tuple[Float[Array, "B count H"], Self]:
        """The rows before this pass, and the ring with the pass's own."""
        ring, positions_T = self.table(layer), tokens.positions_T
        before_BKH, ring = rings.advance(ring, count, positions_T, new_TH, tokens)
        return before_BKH, replace(self, rows_LBSH=ring.rows_LBCH)

    def advance_in_place(
        self,
        layer: Int[Array, ""],
        count: int,
        new_TH: Float[Array, "T H"],
        tokens: FlatTokens,
    ) -> tuple[Float[Array, "B count H"] | Lookback, Self]:
        """The same; rows stay in the ring if it has room for the pass beside them."""
        if not rings.kept_whole(self.table(layer), tokens, count):
            return self.advance(layer, count, new_TH, tokens)
        ring = self.append(layer, new_TH, tokens)
        return Lookback(ring.table(layer), count), ring
