"""The pages of slots: handed out, shared by prefix, taken back.

A prompt that begins like earlier ones takes their pages, read-only, and begins to read
behind them. *Nothing changes by that*, to the last bit: the tree keeps rows alone that
a cold start would have computed the same way, those of whole chunks of prompts, and a
hit begins at a multiple of the chunk, so that it reads on in the very chunks of a cold
start. Rows that rounds wrote are other rows by rounding, and are not kept.

Where models have rings, a hit begins where a snapshot of them is: at the end of what an
earlier prompt read in whole chunks, every `STRIDE` positions before, and, from the
second prompt on that does so, where prompts part. Pages behind the snapshot are shared
all the same; what is read again is not written to them.
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import DecodeState, put_rings, take_rings
from jaxspark.generation.page_pool import PagePool
from jaxspark.generation.prefix_tree import PrefixTree
from jaxspark.models.pages import PAGE, pages_for, rings

# Positions between snapshots of long prompts.
STRIDE = 2048


@dataclass
class Held:
    """What a slot has.

    Attributes:
      tokens: that it was admitted with.
      salt: of its prefix.
      pages: by position; the first of them may be shared.
      whole: tokens that are read in whole chunks.
      kept: pages that are in the tree.
      due: positions at which snapshots are wanted.
      snapshots: taken, and not in the tree yet, by position.
    """

    tokens: Sequence[int]
    salt: str | None
    pages: list[int]
    whole: int
    kept: int
    due: set[int]
    snapshots: dict[int, Any] = field(default_factory=dict)


class SlotPages:
    """Hands pages out to slots, on the host, between two calls of the loop.

    Attributes:
      pages: of the caches, page 0 among them.
      chunk: tokens by which prompts are read.
      unit: positions at whose multiples a hit can begin.
      lookahead: tokens behind a position that rows in pages depend on.
      has_rings: whether the models have some, so that hits begin at snapshots.
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
        lookahead: int = 0,
        prefix_cache: bool = True,
    ):
        """Nobody has a page yet.

        Args:
          slots: B.
          capacity: positions of a slot.
          pages: of the caches, page 0 among them.
          chunk: tokens by which prompts are read.
          lookahead: tokens behind a position that rows in pages depend on.
          prefix_cache: whether pages are shared by prefix.
        """
        self.pages, self.chunk = pages, chunk
        self.queried = self.hits = self.hit_requests = 0
        self.unit = math.lcm(PAGE, chunk)
        self.lookahead, self._prefix_cache = lookahead, prefix_cache
        self._pool = PagePool(pages)
        self._tree = PrefixTree(self._pool, lookahead=lookahead)
        self._table_BP = np.zeros((slots, pages_for(capacity)), np.int32)
        self._moved = True
        self._held: dict[int, Held] = {}
        self._users: Counter[int] = Counter()
        self.has_rings = False
        self._to_put: dict[int, Any] = {}

    @property
    def used(self) -> int:
        """Pages that slots have."""
        return len(self._users)

    @property
    def cached(self) -> int:
        """Pages that the tree keeps."""
        return self._tree.size

    @property
    def checksum(self) -> int:
        """Of all that was handed out."""
        return zlib.crc32(self._table_BP.tobytes())

    def attach(self, state: DecodeState) -> DecodeState:
        """Looks at a state that was made, and compiles what is needed for its rings.

        As many snapshots are kept as have the bytes of all pages.
        """
        caches = state.target_cache, state.draft_cache
        self.has_rings = bool(rings(caches))
        if not self.has_rings:
            return state
        slot_N = jnp.zeros((1,), jnp.int32)
        snapshot = take_rings(state, slot_N)
        everything = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
        of_rings = sum(leaf.nbytes for leaf in jax.tree.leaves(rings(caches)))
        one = sum(leaf.nbytes for leaf in jax.tree.leaves(snapshot))
        most = max(len(self._table_BP), (everything - of_rings) // one)
        self._tree = PrefixTree(
            self._pool, lookahead=self.lookahead, snapshots=int(most)
        )
        return put_rings(state, slot_N, snapshot)

    def admit(
        self,
        slot: int,
        tokens: Sequence[int],
        positions: int,
        salt: str | None,
        *,
        share: bool = True,
    ) -> int | None:
        """Gives an empty slot the pages of a text that begins in it.

        Args:
          slot: which is empty.
          tokens: that are known.
          positions: that it needs now, at least those of the tokens.
          salt: prefixes are shared only where it is the same.
          share: whether it may take rows of earlier ones; otherwise it reads all.

        Returns:
          How many tokens' rows are there already; None if there are too few pages.
        """
        assert slot not in self._held, f"slot {slot} has pages"
        # The last token is a round's to read.
        whole = (len(tokens) - 1) // self.unit * self.unit
        path = []
        if self._prefix_cache and share:
            path = self._tree.match(salt, tokens, whole // PAGE)
            path = path[: len(path) * PAGE // self.unit * self.unit // PAGE]
        found = start = len(path) * PAGE
        if self.has_rings:
            start = max(
                (node.end for node in path if node.snapshot is not None), default=0
            )
        shared = [node.page for node in path]
        self._pool.hold(shared)
        missing = pages_for(positions) - len(shared)
        if not self._free(missing):
            self._pool.drop(shared)
            return None
        due = set()
        if self.has_rings and self._prefix_cache:
            stride = math.lcm(STRIDE, self.unit)
            due = {found, whole, *range(stride, whole, stride)}
            due = {each for each in due if each > start}
        pages = shared + self._pool.take(missing)
        self._held[slot] = Held(tokens, salt, pages, whole, len(shared), due)
        self._users.update(pages)
        self._table_BP[slot, : len(pages)] = pages
        self._table_BP[slot, : len(shared)] *= -1
        self._moved = True
        if self.has_rings and start:
            node = path[start // PAGE - 1]
            self._to_put[slot] = self._tree.use_snapshot(node)
        self.queried += len(tokens)
        self.hits += start
        self.hit_requests += start > 0
        return start

    def reserve(self, positions: Mapping[int, int]) -> bool:
        """Gives slots pages for so many positions each, or nobody any if too few."""
        missing = {
            slot: pages_for(count) - len(self._held[slot].pages)
            for slot, count in positions.items()
        }
        missing = {slot: count for slot, count in missing.items() if count > 0}
        if not self._free(sum(missing.values())):
            return False
        for slot, count in missing.items():
            pages, new = self._held[slot].pages, self._pool.take(count)
            self._table_BP[slot, len(pages) : len(pages) + count] = new
            pages += new
            self._users.update(new)
            self._moved = True
        return True

    def progress(self, state: DecodeState, slot: int, processed: int) -> None:
        """A slot has read so many tokens of what it was admitted with."""
        held = self._held[slot]
        if processed in held.due:
            held.due.remove(processed)
            rows = take_rings(state, jnp.array([slot], jnp.int32))
            held.snapshots[processed] = rows
        self._keep(slot, processed)

    def release(self, slot: int, processed: int) -> None:
        """A slot is empty again, after so many tokens."""
        self._keep(slot, processed)
        held = self._held.pop(slot)
        self._pool.drop(held.pages)
        self._users.subtract(held.pages)
        self._users += Counter()  # without those that have none
        self._table_BP[slot] = 0
        self._moved = True
        self._to_put.pop(slot, None)

    def placed(self, state: DecodeState) -> DecodeState:
        """The state with all that was handed out; before anything runs on it."""
        if self._moved:
            state = state.with_pages(self._table_BP)
            self._moved = False
        for slot, rows in self._to_put.items():
            state = put_rings(state, jnp.array([slot], jnp.int32), rows)
        self._to_put.clear()
        return state

    def forget(self) -> None:
        """Empties the prefix cache."""
        self._tree.clear()

    def leaks(self) -> list[str]:
        """Without a request in any slot: pages whose holders are wrong, in words."""
        kept = {node.page for node in self._tree.nodes()}
        wrong = [
            f"page {page} has {self._pool.holders(page)} holders, "
            f"{'the tree keeps it' if page in kept else 'nobody keeps it'}"
            for page in range(1, self.pages)
            if self._pool.holders(page) != (page in kept)
        ]
        if len(kept) != self._tree.size or self._held or self._users:
            wrong.append(f"{len(self._held)} slots and {self.used} pages are in use")
        if self._table_BP.any():
            wrong.append(f"tables still name pages: {self._table_BP.tolist()}")
        return wrong

    def _free(self, count: int) -> bool:
        """Whether so many pages are free, once others were given back."""
        if count > self._pool.free:
            self._tree.evict(count - self._pool.free)
        return count <= self._pool.free

    def _keep(self, slot: int, processed: int) -> None:
        """Lets the tree have the pages that are complete, from where others read on."""
        held = self._held[slot]
        ready = min(processed - self.lookahead, held.whole) // PAGE
        taken = [end for end in held.snapshots if end <= ready * PAGE]
        if not self._prefix_cache or (ready <= held.kept and not taken):
            return
        path = self._tree.insert(held.salt, held.tokens, held.pages[:ready])
        for index in range(held.kept, ready):
            if path[index].page == held.pages[index]:
                self._table_BP[slot, index] *= -1
                self._moved = True
        for end in taken:
            rows, node = held.snapshots.pop(end), path[end // PAGE - 1]
            if node.snapshot is None:
                self._tree.keep_snapshot(node, rows)
        held.kept = max(held.kept, ready)
