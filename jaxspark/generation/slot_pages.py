"""The pages of all slots, over all shards of them.

A mesh shares out slots over its axes `data` and `expert`, and caches with them: a slot
has pages of its own shard, out of that shard's pool, and a prefix that one shard has
read is there for the slots of this shard alone. So every shard has a pool and a tree
(see `shard_pages`), and a request goes to the shard that has most of its text. Without
a mesh there is one shard.
"""

import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxspark.decoding import DecodeState
from jaxspark.decoding.snapshots import Snapshot, put_rings, take_rings
from jaxspark.generation.shard_pages import ShardPages
from jaxspark.models.pages import pages_for, rings


class SlotPages:
    """Hands pages out to slots, on the host, between two calls of the loop.

    Attributes:
      pages: of the caches, per shard of slots, page 0 among them.
      shards: of slots.
      chunk: tokens by which prompts are read.
      lookahead: tokens behind a position that rows in pages depend on.
      queried: tokens of prompts that were looked up.
      hits: those whose rows were there.
      hit_requests: prompts of which some were.
    """

    def __init__(
        self,
        *,
        slots: int,
        capacity: int,
        pages: int,
        chunk: int,
        shards: int = 1,
        lookahead: int = 0,
        prefix_cache: bool = True,
        snapshot_bytes: int | None = None,
    ):
        """Nobody has a page yet.

        Args:
          slots: B, on all shards.
          capacity: positions of a slot.
          pages: of the caches, per shard, page 0 among them.
          chunk: tokens by which prompts are read.
          shards: that have equally many of the slots, in order.
          lookahead: tokens behind a position that rows in pages depend on.
          prefix_cache: whether pages are shared by prefix.
          snapshot_bytes: most that snapshots of rings take on all shards together; None
            takes as many as all pages have.
        """
        self.pages, self.shards, self.chunk = pages, shards, chunk
        self.lookahead = lookahead
        self.queried = self.hits = self.hit_requests = 0
        self._per_shard = slots // shards
        self._table_BP = np.zeros((slots, pages_for(capacity)), np.int32)
        self._shards = [
            ShardPages(
                part_BP,
                pages=pages,
                chunk=chunk,
                lookahead=lookahead,
                prefix_cache=prefix_cache,
            )
            for part_BP in np.split(self._table_BP, shards)
        ]
        self._prefix_cache, self._snapshot_bytes = prefix_cache, snapshot_bytes
        self._keeps = 0
        # Each stands for the memory of a snapshot that was not taken yet.
        self._spare: list[list[Snapshot]] = [[] for _ in range(shards)]
        self._blank: Any = None
        self._to_put: dict[int, Snapshot] = {}

    @property
    def unit(self) -> int:
        """Positions at whose multiples a hit can begin."""
        return self._shards[0].unit

    @property
    def has_rings(self) -> bool:
        """Whether the models have some, so that hits begin at snapshots."""
        return self._shards[0].has_rings

    @property
    def size(self) -> int:
        """Pages that slots can have, of all shards."""
        return self.shards * (self.pages - 1)

    @property
    def used(self) -> int:
        """Pages that slots have."""
        return sum(shard.used for shard in self._shards)

    @property
    def cached(self) -> int:
        """Pages that trees keep."""
        return sum(shard.cached for shard in self._shards)

    @property
    def checksum(self) -> int:
        """Of all that was handed out."""
        return zlib.crc32(self._table_BP.tobytes())

    def attach(self, state: DecodeState) -> DecodeState:
        """Looks at a state that was made, and prepares for its rings.

        Compiles what is needed, and allocates what snapshots will take: a device that
        has too little memory for them has so now, rather than after hours.
        """
        caches = state.target_cache, state.draft_cache
        if not rings(caches):
            return state
        # Of a slot of every shard, like the sums of bytes that it is compared with.
        self._blank = take_rings(state, 0)
        self._keeps = count = self._snapshots(_bytes(caches) - _bytes(rings(caches)))
        for number, shard in enumerate(self._shards):
            shard.keep_rings(count)
            # And one that is taken before another is dropped for it.
            self._spare[number] = [
                Snapshot.of(take_rings(state, 0), number)
                for _ in range(count + 1 if count else 0)
            ]
        return put_rings(state, 0, Snapshot.of(self._blank, 0).whole(self._blank))

    def _snapshots(self, of_pages: int) -> int:
        """Snapshots that a shard keeps, where all pages have so many bytes."""
        if not self._prefix_cache:
            return 0
        one, most = _bytes(self._blank), self.pages - 1  # A page ends with one.
        if self._snapshot_bytes is not None:
            return min(self._snapshot_bytes // one, most)
        return min(max(self._per_shard, of_pages // one), most)

    def admit(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: int,
        salt: str | None,
        *,
        share: bool = True,
    ) -> tuple[int, int] | None:
        """Gives one of some empty slots the pages of a text that begins in it.

        It is on the shard that has most of the text, if this has pages for the rest.

        Args:
          slots: empty ones; of those whose shards have equally much the first is taken.
          tokens: that are known.
          positions: that it needs now, at least those of the tokens.
          salt: prefixes are shared only where it is the same.
          share: whether it may take rows of earlier ones; otherwise it reads all.

        Returns:
          The slot, and how many tokens' rows are there already; None if there are too
          few pages.
        """
        free: dict[int, int] = {}
        for slot in slots:
            free.setdefault(slot // self._per_shard, slot)
        known = {
            number: self._shards[number].known(tokens, salt, share=share)
            for number in free
        }
        for number in sorted(free, key=lambda n: known[n].reach, reverse=True):
            shard, slot, own = self._shards[number], free[number], known[number]
            if shard.admit(slot % self._per_shard, tokens, positions, salt, own):
                snapshot = shard.snapshot(own)
                if snapshot is not None:
                    self._to_put[slot] = snapshot
                self.queried += len(tokens)
                self.hits += own.start
                self.hit_requests += own.start > 0
                return slot, own.start
        return None

    def will_know(
        self,
        tokens: Sequence[int],
        salt: str | None,
        *,
        reading: Collection[int],
        free: Collection[int],
        arriving: Iterable[Sequence[int]] = (),
    ) -> bool:
        """Whether a text that waits a little has less to read.

        It has where all shards with a free slot are reading its beginning, or another
        text with this is about to get a slot.

        Args:
          tokens: of the text.
          salt: of its prefix.
          reading: slots whose prompts are not read yet.
          free: empty ones.
          arriving: texts with the same salt that are about to get slots.
        """
        first, *_ = self._shards
        if any(first.would_know(tokens, salt, others) for others in arriving):
            return True
        places = [divmod(slot, self._per_shard) for slot in reading]
        knowing = {
            number
            for number, own in places
            if self._shards[number].will_know(own, tokens, salt)
        }
        return {slot // self._per_shard for slot in free} <= knowing

    def reserve(self, positions: Mapping[int, int]) -> list[int]:
        """Gives slots pages for so many positions each, or nobody any if too few.

        Returns:
          Those of the slots whose shards have too few.
        """
        by_shard: defaultdict[int, dict[int, int]] = defaultdict(dict)
        for slot, count in positions.items():
            number, own = divmod(slot, self._per_shard)
            by_shard[number][own] = count
        short = {
            number
            for number, counts in by_shard.items()
            if not self._shards[number].has_room(counts)
        }
        if not short:
            for number, counts in by_shard.items():
                self._shards[number].extend(counts)
        return [slot for slot in positions if slot // self._per_shard in short]

    def progress(self, state: DecodeState, slot: int, processed: int) -> None:
        """A slot has read so many tokens of what it was admitted with."""
        number, own = divmod(slot, self._per_shard)
        shard, snapshot = self._shards[number], None
        if self._keeps and shard.is_due(own, processed):
            if self._spare[number]:
                self._spare[number].pop()
            snapshot = Snapshot.of(take_rings(state, slot), number)
        shard.progress(own, processed, snapshot)

    def release(self, slot: int, processed: int) -> None:
        """A slot is empty again, after so many tokens."""
        number, own = divmod(slot, self._per_shard)
        self._shards[number].release(own, processed)
        self._to_put.pop(slot, None)

    def placed(self, state: DecodeState) -> DecodeState:
        """The state with all that was handed out; before anything runs on it."""
        if any(shard.moved for shard in self._shards):
            state = state.with_pages(self._table_BP)
            for shard in self._shards:
                shard.moved = False
        for slot, snapshot in self._to_put.items():
            state = put_rings(state, slot, snapshot.whole(self._blank))
        self._to_put.clear()
        return state

    def forget(self) -> None:
        """Empties the prefix cache."""
        for shard in self._shards:
            shard.forget()

    def leaks(self) -> list[str]:
        """Without a request in any slot: pages whose holders are wrong, in words."""
        return [
            f"shard {number}: {wrong}"
            for number, shard in enumerate(self._shards)
            for wrong in shard.leaks()
        ]


def _bytes(tree: Any) -> int:
    """Of all its arrays, on all shards."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
