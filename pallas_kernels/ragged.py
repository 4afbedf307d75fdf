"""What ops take in place of padded batches: flat tokens of many slots, and page tables.

Models run on T flat tokens; only attention looks at slots. Padding to [B, Q] is what
references do with them, a kernel need not.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Shaped

LANES = 128
# Kernels serve up to so many consecutive queries of a slot at once.
QUERIES = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Where the tokens of B slots lie among T flat ones.

    The tokens of a slot lie together and hold consecutive positions. What lies between
    and behind the slots is padding.

    Attributes:
      slots_T: slot of each token, -1 for padding.
      starts_B: absolute position of each slot's first token (any value if none).
      offsets_B: flat place of each slot's first token.
      counts_B: tokens of each slot.
      rows: Q, the most tokens that a slot may have (static).
    """

    slots_T: Int[Array, " T"]
    starts_B: Int[Array, " B"]
    offsets_B: Int[Array, " B"]
    counts_B: Int[Array, " B"]
    rows: int = field(metadata={"static": True})

    @property
    def slots(self) -> int:
        """B, the number of slots."""
        return self.starts_B.shape[0]

    @property
    def rows_T(self) -> Int[Array, " T"]:
        """Row of each token in its slot; 0 for padding."""
        row_T = jnp.arange(len(self.slots_T)) - self.offsets_B[self.slots_T]
        return jnp.where(self.slots_T < 0, 0, row_T)

    @property
    def places_BQ(self) -> Int[Array, "B Q"]:
        """Flat place of each slot's rows; T where there is none."""
        row_Q = jnp.arange(self.rows)
        place_BQ = self.offsets_B[:, None] + row_Q
        return jnp.where(row_Q < self.counts_B[:, None], place_BQ, len(self.slots_T))

    def padded(self, x_T: Shaped[Array, "T ..."], fill) -> Shaped[Array, "B Q ..."]:
        """Flat to padded; absent rows read `fill`."""
        x_T = jnp.asarray(x_T)
        return x_T.at[self.places_BQ].get(mode="fill", fill_value=fill)

    @property
    def group(self) -> int:
        """Rows of a group: consecutive ones of a slot, as many as a kernel serves."""
        return min(self.rows, QUERIES)

    def grouped(
        self, x_T: Shaped[Array, "T ..."], fill, size: int | None = None
    ) -> Shaped[Array, "G q ..."]:
        """Flat to groups of `size` of a slot's rows; absent rows read `fill`."""
        size, x_BQ = size or self.group, self.padded(x_T, fill)
        widths = [(0, 0), (0, -self.rows % size)] + [(0, 0)] * (x_BQ.ndim - 2)
        x_BQ = jnp.pad(x_BQ, widths, constant_values=fill)
        return x_BQ.reshape(-1, size, *x_BQ.shape[2:])

    def flat(self, x_BQ: Shaped[Array, "B Q ..."]) -> Shaped[Array, "T ..."]:
        """Padded to flat; padding reads some row (its value must not matter)."""
        return x_BQ[jnp.maximum(self.slots_T, 0), self.rows_T]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's cached rows, read in place out of all layers' stack.

    Attributes:
      rows_LBCH: the rows, C for each slot; with `pages_BP` those of a page, and pages
        in place of slots. H may be two axes, see `split_lanes`.
      layer: whose are meant.
      pages_BP: the pages that hold a slot's rows, in order; None: they lie together.
    """

    rows_LBCH: Float[Array, "L B C *H"]
    layer: int | Int[Array, ""] = 0
    pages_BP: Int[Array, "B P"] | None = None

    @property
    def length(self) -> int:
        """Rows of a slot."""
        size = self.rows_LBCH.shape[2]
        return size if self.pages_BP is None else size * self.pages_BP.shape[1]

    def whole(self) -> Float[Array, "B C H"]:
        """All rows of every slot."""
        if len(self.rows_LBCH) == 1:  # nothing to choose, nothing to move
            rows_BCH = self.rows_LBCH[0]
        else:
            rows_BCH = jax.lax.dynamic_index_in_dim(
                self.rows_LBCH, self.layer, keepdims=False
            )
        rows_BCH = rows_BCH.reshape(*rows_BCH.shape[:2], -1)
        if self.pages_BP is None:
            return rows_BCH
        rows_BPCH = rows_BCH[self.pages_BP]
        return rows_BPCH.reshape(len(rows_BPCH), -1, rows_BPCH.shape[-1])

    def take(self, rows_BX: Int[Array, "B *X"]) -> Float[Array, "B *X H"]:
        """Some rows of every slot, without a copy of the layer's others."""
        width = self.rows_LBCH.shape[3:]
        place_BX = self.places(rows_BX)
        rows_BXH = self.rows_LBCH.reshape(-1, *width)[place_BX]
        return rows_BXH.reshape(*place_BX.shape, -1)

    def places(self, rows_BX: Int[Array, "B *X"]) -> Int[Array, "B *X"]:
        """Where some rows of every slot lie among all rows."""
        blocks, size = self.rows_LBCH.shape[1:3]
        slot_B = jnp.arange(len(rows_BX)).reshape(-1, *[1] * (rows_BX.ndim - 1))
        block_BX = slot_B
        if self.pages_BP is not None:
            block_BX, rows_BX = self.pages_BP[slot_B, rows_BX // size], rows_BX % size
        return (self.layer * blocks + block_BX) * size + rows_BX

    def having(self, rows_LBCH: Float[Array, "L B C *H"]) -> "Table":
        """With other rows in place of its own."""
        return replace(self, rows_LBCH=rows_LBCH)

    def written(
        self,
        slots_N: Int[Array, " N"],
        rows_N: Int[Array, " N"],
        keep_N: Bool[Array, " N"],
    ) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
        """Where rows that are written lie among all rows, and which may be.

        None may past the table's end, nor in pages that a slot does not own: `pages_BP`
        holds p > 0 for a page of its own, p <= 0 for others.
        """
        blocks, size = self.rows_LBCH.shape[1:3]
        if self.pages_BP is None:
            keep_N &= rows_N < size
        else:
            slots_N, may_N = writable(self.pages_BP, slots_N, rows_N // size)
            keep_N, rows_N = keep_N & may_N, rows_N % size
        return (self.layer * blocks + slots_N) * size + rows_N, keep_N

    def put(
        self,
        slots_N: Int[Array, " N"],
        rows_N: Int[Array, " N"],
        new_NH: Float[Array, "N H"],
        keep_N: Bool[Array, " N"],
    ) -> "Table":
        """With new rows where `keep_N` and `written` says; no two at one place."""
        width = self.rows_LBCH.shape[3:]
        # All rows on one axis: a scatter over it is done in place everywhere.
        table = self.rows_LBCH.reshape(-1, *width)
        place_N, keep_N = self.written(slots_N, rows_N, keep_N)
        place_N = jnp.where(keep_N, place_N, len(table))
        new_NH = new_NH.astype(table.dtype).reshape(-1, *width)
        table = table.at[place_N].set(new_NH, mode="drop")
        # Without the barrier XLA may fuse the write into readers and copy the table.
        table = jax.lax.optimization_barrier(table)
        # Nor may it lie as a GPU's readers like it, to be turned for each write.
        table = with_layout_constraint(
            table, Layout(major_to_minor=tuple(range(table.ndim)))
        )
        return self.having(table.reshape(self.rows_LBCH.shape))


def writable(
    pages_BP: Int[Array, "B P"], slots_N: Int[Array, " N"], index_N: Int[Array, " N"]
) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
    """Pages to write to, by slot and place in the table, and whether one may."""
    page_N = pages_BP.at[slots_N, index_N].get(mode="fill", fill_value=0)
    return page_N, page_N > 0


def split_lanes(x: Shaped[Array, "*X H"]) -> Shaped[Array, "*X h l"]:
    """Rows cut to the 128 lanes of a TPU's memory: there, one lies by itself."""
    return x.reshape(*x.shape[:-1], -1, LANES)
