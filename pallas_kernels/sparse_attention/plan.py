"""What a kernel of `sparse_attention` reads for whom, planned by XLA.

Queries go in *groups*, up to 8 consecutive ones of a slot, that read every entry once.
A group's entries come in *pieces* of rows that lie together in memory, a chunk of some
hundred rows at a time:

    chosen           the union of the group's choices, sorted; pieces of one row
    below a limit    the slot's entries from 0 on; pieces as long as its rows or pages
                     allow

A piece is named by its first row in the table of all layers, slots and pages. The last
chunk is filled up with pieces that nobody sees. Every platform's kernels read by such a
plan; how many queries make a group, and how many rows a chunk, is theirs to say.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.indexer_topk.union import Union
from pallas_kernels.ragged import LANES, QUERIES, Ragged, Table
from pallas_kernels.sparse_attention.entries import Entries

ROWS = 8  # of a tile
# Rows of a chunk: chosen ones cost a DMA each; others want long products.
CHOSEN_TILE, TILE = 512, 1024


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Groups and their pieces.

    Attributes:
      queries: Q, most queries of a group.
      blocks: groups of a slot.
      groups_real, groups: G, without and with those that make up full cores.
      lookback: W.
      recent, recent_columns: recent rows that a group reads, and with padding.
      ring: rows of a slot's ring, if they are read out of rings, by `ROWS`.
      piece: rows of a piece; 0 without entries.
      tile: rows of a chunk.
      chosen: whether queries name their entries.
      scalars: [G] first token, tokens, recent rows before position 0, tokens of the
        slot, chunks; [G Q] limits; [G] pieces that are not filling; [T] slots; [G]
        place of the first recent row that is read, among those of all slots.
      table: rows of all layers, [places, H] or [places, H / 128, 128].
      pieces: [G or B, 1, n] their places.
      members: [G, 1, n] bit q: whether query q chose the row.
    """

    queries: int
    blocks: int
    slots: int
    groups_real: int
    groups: int
    lookback: int
    causal: bool
    recent: int
    recent_columns: int
    ring: int
    piece: int
    tile: int
    chosen: bool
    scalars: Any
    table: Any
    pieces: Any
    members: Any

    @classmethod
    def of(
        cls,
        ragged: Ragged,
        entries: Entries | None,
        lookback: int,
        causal: bool,
        cores: int,
        *,
        union: Union | None = None,
        ring: Table | None = None,
        queries: int = QUERIES,
        tiles: tuple[int, int] | None = None,
    ) -> "Plan":
        """Of the operands; entries that are not all below a limit come as a union.

        Recent rows are read out of `ring`, which holds the pass's own; or as
        `recent_rows` has them. A group has `queries` at most, a chunk as many rows as
        `tiles` says of chosen ones and of others (None: as on TPUs).
        """
        B, Q = ragged.slots, min(ragged.rows, queries)
        chosen_tile, streamed_tile = tiles or (CHOSEN_TILE, TILE)
        blocks = -(-ragged.rows // Q)
        real = B * blocks
        groups = -(-real // cores) * cores

        def per_group(x_B, step):
            x_G = (x_B[:, None] + step * jnp.arange(blocks)).reshape(-1)
            return jnp.pad(x_G.astype(jnp.int32), (0, groups - real))

        counts_G = jnp.clip(per_group(ragged.counts_B, -Q), 0, Q)
        before_G = per_group(lookback - ragged.starts_B, -Q if causal else 0)
        recent = lookback + (Q if causal else blocks * Q)
        recent += 0 if ring is None else ROWS - 1  # rows before the first one's tile
        recent = -(-recent // ROWS) * ROWS
        if ring is None:
            step = Q if causal else 0
            size = (blocks - 1) * step + recent
            recent_G = per_group(size * jnp.arange(B), step)
        else:
            rings_G = per_group(ring.places(jnp.zeros((B,), jnp.int32)), 0)
            recent_G = rings_G + -before_G % ring.length // ROWS * ROWS
        table, pieces, members, piece, tile = None, None, None, 0, 0
        chunks_G = pieces_G = jnp.zeros_like(counts_G)
        limits_GQ = jnp.zeros((groups, Q))
        if entries is not None:
            table = _flat(entries.table)
            if union is not None:
                n = union.rows_G1n.shape[-1]
                tile, piece = min(chosen_tile, n), 1
                rest = ((0, 0), (0, 0), (0, -n % tile))
                rows = jnp.pad(union.rows_G1n, rest)
                pieces = entries.table.places(rows.reshape(B, blocks, -1))
                pieces = pieces.reshape(real, 1, -1)
                members = jnp.pad(union.members_G1n, rest)
                used_G = union.used_G
            else:
                assert entries.limits_T is not None
                limits_GQ = ragged.grouped(entries.limits_T, 0, Q)
                tile = -(-entries.table.length // LANES) * LANES
                tile = min(streamed_tile, tile)
                piece = math.gcd(entries.table.rows_LBCH.shape[2], tile)
                chunks = -(-entries.table.length // tile)
                first = jnp.arange(chunks * tile // piece) * piece
                first = jnp.minimum(first, entries.table.length - piece)
                first = jnp.broadcast_to(first, (B, len(first)))
                pieces = entries.table.places(first)[:, None]
                used_G = limits_GQ.max(-1)
                limits_GQ = jnp.pad(limits_GQ, ((0, groups - real), (0, 0)))
            pieces = pieces.astype(jnp.int32)
            used_G = jnp.pad(used_G, (0, groups - real))
            chunks_G, pieces_G = -(-used_G // tile), -(-used_G // piece)
            chunks_G = jnp.where(counts_G > 0, chunks_G, 0)
        return cls(
            queries=Q,
            blocks=blocks,
            slots=B,
            groups_real=real,
            groups=groups,
            lookback=lookback,
            causal=causal,
            recent=recent,
            recent_columns=-(-recent // LANES) * LANES,
            ring=0 if ring is None else ring.length,
            piece=piece,
            tile=tile,
            chosen=members is not None,
            scalars=(
                per_group(ragged.offsets_B, Q),
                counts_G,
                before_G,
                per_group(ragged.counts_B, 0),
                chunks_G.astype(jnp.int32),
                limits_GQ.astype(jnp.int32).reshape(-1),
                pieces_G.astype(jnp.int32),
                ragged.slots_T.astype(jnp.int32),
                recent_G,
            ),
            table=table,
            pieces=pieces,
            members=members,
        )

    def static(self) -> "Plan":
        """Without arrays."""
        return replace(self, scalars=None, table=None, pieces=None, members=None)

    def recent_rows(
        self,
        before_BWH: Float[Array, "B W H"],
        keys_TH: Float[Array, "T H"],
        ragged: Ragged,
    ) -> Float[Array, "B R H"]:
        """The W rows before each slot's tokens, then its own, enough for all groups."""
        own_BQH = ragged.padded(keys_TH, 0)
        last = (self.blocks - 1) * self.queries if self.causal else 0
        missing = last + self.recent - self.lookback - ragged.rows
        own_BQH = jnp.pad(own_BQH, ((0, 0), (0, missing), (0, 0)))
        return jnp.concatenate([before_BWH, own_BQH], axis=1)

    def cost(self, q_TNH, products: int = 2, arrays: int = 2) -> pl.CostEstimate:
        """What a kernel reads and computes at most, by its products and its queries.

        Groups of one query read the recent rows of a slot side by side, out of a cache,
        from where a tile begins.
        """
        T, N, H = q_TNH.shape
        rows = self.groups_real * self.recent
        if self.queries == 1:
            rows = self.slots * (self.recent + self.blocks + ROWS)
        width = self.recent_columns
        if self.pieces is not None:
            rows += self.pieces.size * self.piece
            width += self.pieces.shape[-1] * self.piece
        return pl.CostEstimate(
            flops=2 * products * T * N * H * width,
            transcendentals=T * N * width,
            bytes_accessed=(arrays * q_TNH.size + rows * H) * q_TNH.dtype.itemsize,
        )


def _flat(table: Table):
    """Rows of all layers and slots on one axis."""
    rows = table.rows_LBCH
    return rows.reshape(-1, *rows.shape[3:])
