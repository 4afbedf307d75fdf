"""Rows on their way into a GPU's shared memory, for `mosaic_gpu_kernel`.

A block of threads reads chunks of rows, recent ones first, then entries, into a ring of
two. Rows that lie together come by TMA: entries in pieces as long as they lie, recent
ones by eights, since those are read out of a slot's ring, which wraps between any two
eights. Chosen entries come through registers, all of a chunk at once, since Hopper's
TMA gathers nothing; they go to a buffer [rows, width] and from there into tiles as the
matrix units want them. Each warpgroup fetches one half of the width of rows that lie
together, and one half of the rows that were chosen.

What no query sees may be no number, and zero times that is none either: it becomes zero
where it lies, in first and last chunks.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_attention.mosaic_gpu_queries import COLUMN

SIDES = 2  # of the ring
HALVES = 2
TILE_ROWS, SWIZZLED = 8, 64  # of a tile of the matrix units: rows, columns at most


def arrivals(tile: int) -> int:
    """Of copies of one warpgroup until a chunk is there."""
    return tile // TILE_ROWS


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one query reads, and where it goes.

    Attributes:
      plan: see `plan`.
      ring: rows of a slot among `recent_ref`'s.
      token: the integers of `mosaic_gpu_lists.per_token`.
      begin, end: chunks of this block of threads.
      recent_ref: [rows, H] of all slots.
      table_ref, pieces_ref: entries, see `plan`.
      k_buf: [2, 2, tile, H / 2] the ring of chunks.
      rows_buf, names_buf: of chosen entries: rows of a chunk, places of all.
      filled, emptied: barriers of each chunk.
    """

    plan: Any
    ring: int
    token: Any
    begin: Any
    end: Any
    recent_ref: Any
    table_ref: Any
    pieces_ref: Any
    k_buf: Any
    rows_buf: Any
    names_buf: Any
    filled: Any
    emptied: Any

    @property
    def me(self):
        """Which warpgroup this is."""
        return jax.lax.axis_index("warpgroup")

    @property
    def my_rows(self):
        """The half of a chunk's rows that is this warpgroup's."""
        half = self.k_buf.shape[2] // HALVES
        return pl.ds(pl.multiple_of(self.me * half, half), half)

    @property
    def my_columns(self):
        """The half of the width that is this warpgroup's."""
        width = self.k_buf.shape[3]
        return pl.ds(pl.multiple_of(self.me * width, width), width)

    def is_recent(self, j):
        """Whether a chunk is one of recent rows that are read here."""
        return j < jnp.minimum(self.token[2], self.end)

    def is_entries(self, j):
        """Whether it is one of entries."""
        return (j >= self.token[2]) & (j < self.end)

    def fetch(self, j):
        """Asks for a chunk; returns the rows of it that come through registers."""
        side, tile = jax.lax.rem(j, SIDES), self.k_buf.shape[2]
        pl.when((j >= self.begin + SIDES) & (j < self.end))(
            lambda: plgpu.barrier_wait(self.emptied.at[side])
        )

        def copy(source, place, at, size):
            """Starts the copy of a piece, one half of its width."""
            lines = pl.ds(pl.multiple_of(place, TILE_ROWS), size)
            target = self.k_buf.at[side, self.me, pl.ds(at, size)]
            source = source.at[lines, self.my_columns]
            plgpu.copy_gmem_to_smem(source, target, self.filled.at[side])

        @pl.when(self.is_recent(j))
        def _():
            first, newest = self.token[1], self.token[5]
            place = jax.lax.rem(first, self.ring)
            last = jax.lax.div(newest - 1, TILE_ROWS) * TILE_ROWS
            for at in range(0, tile, TILE_ROWS):
                row = jnp.minimum(j * tile + at, last)  # nothing behind the newest
                row = first - place + jax.lax.rem(place + row, self.ring)
                copy(self.recent_ref, row, at, TILE_ROWS)

        piece = self.plan.piece
        if piece > 1:

            @pl.when(self.is_entries(j))
            def _():
                slot, before = self.token[0], self.token[2]
                for at in range(0, tile, piece):
                    name = ((j - before) * tile + at) // piece
                    copy(self.table_ref, self.pieces_ref[slot, name], at, piece)
                for _ in range(arrivals(tile) - tile // piece):
                    plgpu.barrier_arrive(self.filled.at[side])

        if not self.plan.chosen:
            return []
        return self._chosen(j)

    def _chosen(self, j):
        half, width = self.k_buf.shape[2] // HALVES, self.table_ref.shape[1]
        layout = plgpu.Layout.WG_STRIDED((width,), width // 128)

        def gather():
            names = [
                self.names_buf[j - self.token[2], self.me * half + r]
                for r in range(half)
            ]
            rows = [self.table_ref.at[jnp.maximum(name, ~name)] for name in names]
            return [plgpu.load(row, layout=layout, optimized=False) for row in rows]

        def nothing():
            row = jnp.zeros(width, self.table_ref.dtype)
            return [plgpu.layout_cast(row, layout)] * half

        return jax.lax.cond(self.is_entries(j), gather, nothing)

    def put(self, j, rows):
        """Puts rows that came through registers where they belong."""
        if not self.plan.chosen:
            return
        side, (tile, width) = jax.lax.rem(j, SIDES), self.k_buf.shape[2:]
        layout = self._layout(tile // HALVES)

        @pl.when(self.is_entries(j))
        def _():
            for r, row in enumerate(rows):
                self.rows_buf[self.me, r] = row
            for c in range(HALVES):
                part = self.rows_buf.at[self.me, :, pl.ds(c * width, width)]
                part_SH = plgpu.load(part, layout=layout, optimized=False)
                self.k_buf[side, c, self.my_rows] = part_SH
            plgpu.commit_smem()
            for _ in range(arrivals(tile)):
                plgpu.barrier_arrive(self.filled.at[side])

    def clear(self, j, meet):
        """Zeros to a chunk's rows that the query does not see, once they are there."""
        side, (tile, width) = jax.lax.rem(j, SIDES), self.k_buf.shape[2:]
        step = TILE_ROWS * 4 // math.gcd(4, width // SWIZZLED)  # a tile to each warp
        low, high = self._seen(j)
        some = (low > 0) | (high < tile)
        if self.plan.chosen:
            some &= self.is_recent(j)

        @pl.when(some)
        def _():
            @pl.loop(0, tile // step)
            def _(i):
                start = pl.multiple_of(i * step, step)

                @pl.when((start < low) | (start + step > high))
                def _():
                    rows = self.k_buf.at[side, self.me, pl.ds(start, step)]
                    layout = self._layout(step)
                    row_SH = plgpu.load(rows, layout=layout, optimized=False)
                    at_SH = start + plgpu.broadcasted_iota(
                        jnp.int32, row_SH.shape, 0, layout=layout
                    )
                    seen_SH = (at_SH >= low) & (at_SH < high)
                    rows[...] = jnp.where(seen_SH, row_SH, jnp.zeros_like(row_SH))

            plgpu.commit_smem()
            meet()

    def seen(self, j, shape):
        """Which of a chunk's rows, of this warpgroup's half, the query sees."""
        col_NS = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        col_NS += self.me * (self.k_buf.shape[2] // HALVES)
        low, high = self._seen(j)
        seen_NS = (col_NS >= low) & (col_NS < high)
        if not self.plan.chosen:
            return seen_NS
        before = self.token[2]
        names = self.names_buf.at[jnp.maximum(j - before, 0), self.my_rows]
        name_S = plgpu.load(names, layout=COLUMN, optimized=False)
        name_S = jnp.maximum(name_S, jnp.where(j < before, 0, -1))
        return seen_NS & jax.lax.broadcast_in_dim(name_S >= 0, shape, [1])

    def _seen(self, j):
        """Of a chunk's rows it sees those from .. to - 1."""
        _, _, recent, _, oldest, newest, limit, _ = self.token
        start = j * self.k_buf.shape[2]
        low = jnp.where(j < recent, oldest, 0) - start
        return low, jnp.where(j < recent, newest, limit) - start

    def _layout(self, rows):
        """In which so many rows go between shared memory and registers."""
        tile, width = self.k_buf.shape[2:]
        swizzle = min(tile, SWIZZLED) * self.k_buf.dtype.itemsize
        return plgpu.Layout.SMEM_GMEM_COPY((rows, width), self.k_buf.dtype, swizzle)
