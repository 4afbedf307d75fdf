"""The pages of one shard's slots: handed out, shared by prefix, taken back.

A prompt that begins like earlier ones takes their pages, read-only, and begins to read
behind them. *Nothing changes by that*, to the last bit: the tree keeps rows alone that
a cold start would have computed the same way, those of whole chunks of prompts, and a
hit begins at a multiple of the chunk, so that it reads on in the very chunks of a cold
start. Rows that rounds wrote are other rows by rounding, and are not kept.

Where models have rings, a hit begins where a snapshot of them is: at the end of what an
earlier prompt read in whole chunks, every `STRIDE` positions before, and, from the
second prompt on that does so, where prompts part. Pages behind the snapshot are shared
all the same; what is read again is not written to them.

Slots and pages have numbers of their own on every shard.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxspark.generation.page_pool import PagePool
from jaxspark.generation.prefix_tree import Node, PrefixTree
from jaxspark.models.pages import PAGE, pages_for

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


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a shard's tree has of a text.

    Attributes:
      start: tokens behind which it can be read on.
      path: pages that it can share; those behind `start` are read again.
    """

    start: int
    path: Sequence[Node]

    @property
    def reach(self) -> tuple[int, int]:
        """By which shards are compared: the more, the less is to be done there."""
        return self.start, len(self.path)


class ShardPages:
    """Hands pages out to the slots of a shard, on the host.

    Attributes:
      table_BP: the page table of these slots, see `jaxspark.models.pages`.
      moved: whether it has changed since someone set this to False.
      has_rings: whether the models have some, so that hits begin at snapshots.
      unit: positions at whose multiples a hit can begin.
    """

    def __init__(
        self,
        table_BP: Int[np.ndarray, "B P"],
        *,
        pages: int,
        chunk: int,
        lookahead: int = 0,
        prefix_cache: bool = True,
    ):
        """Nobody has a page yet; `table_BP` is written to, the rest see `SlotPages`."""
        self.table_BP, self.moved = table_BP, True
        self.unit = math.lcm(PAGE, chunk)
        self.has_rings = False
        self._lookahead, self._prefix_cache = lookahead, prefix_cache
        self._pool = PagePool(pages)
        self._tree = PrefixTree(self._pool, lookahead=lookahead)
        self._held: dict[int, Held] = {}
        self._users: Counter[int] = Counter()

    @property
    def used(self) -> int:
        """Pages that slots have."""
        return len(self._users)

    @property
    def cached(self) -> int:
        """Pages that the tree keeps."""
        return self._tree.size

    def keep_rings(self, snapshots: int) -> None:
        """There are rings; so many snapshots of them may be kept.

        Without any no text can begin behind another, and none is kept.
        """
        self.has_rings = True
        self._prefix_cache = self._prefix_cache and snapshots > 0
        self._tree = PrefixTree(
            self._pool, lookahead=self._lookahead, snapshots=snapshots
        )

    def known(self, tokens: Sequence[int], salt: str | None, *, share: bool) -> Known:
        """What is here of a text; nothing if it may not share."""
        if not (self._prefix_cache and share):
            return Known(start=0, path=())
        path = self._tree.match(salt, tokens, self._whole(tokens) // PAGE)
        path = path[: len(path) * PAGE // self.unit * self.unit // PAGE]
        start = len(path) * PAGE
        if self.has_rings:
            ends = (node.end for node in path if node.snapshot is not None)
            start = max(ends, default=0)
        return Known(start=start, path=path)

    def will_know(self, slot: int, tokens: Sequence[int], salt: str | None) -> bool:
        """Whether more of a text is known once a slot has read what it is reading."""
        held = self._held[slot]
        if held.salt != salt:
            return False
        return self.would_know(tokens, salt, held.tokens, held.due)

    def would_know(
        self,
        tokens: Sequence[int],
        salt: str | None,
        others: Sequence[int],
        due: Collection[int] | None = None,
    ) -> bool:
        """Whether more of a text were known if another with its salt had been read.

        Args:
          tokens: of the text.
          salt: of its prefix.
          others: tokens of the other one.
          due: where snapshots will be taken of it; None for a text without a slot.
        """
        if not self._prefix_cache:
            return False
        end = self._common(tokens, others)
        if self.has_rings:
            due = self._due(self._whole(others)) if due is None else due
            end = max((each for each in due if each <= end), default=0)
        return end > 0 and end > self.known(tokens, salt, share=True).start

    def admit(
        self,
        slot: int,
        tokens: Sequence[int],
        positions: int,
        salt: str | None,
        known: Known,
    ) -> bool:
        """Gives an empty slot the pages of a text; whether there are enough.

        Args:
          slot: which is empty.
          tokens: that are known.
          positions: that it needs now, at least those of the tokens.
          salt: prefixes are shared only where it is the same.
          known: what is here of the text.
        """
        assert slot not in self._held, f"slot {slot} has pages"
        shared = [node.page for node in known.path]
        self._pool.hold(shared)
        missing = pages_for(positions) - len(shared)
        if not self._free(missing):
            self._pool.drop(shared)
            return False
        self._tree.use(known.path)
        whole, due = self._whole(tokens), set()
        if self.has_rings and self._prefix_cache:
            due = {len(shared) * PAGE, *self._due(whole)}
            due = {each for each in due if each > known.start}
        pages = shared + self._pool.take(missing)
        self._held[slot] = Held(tokens, salt, pages, whole, len(shared), due)
        self._users.update(pages)
        self.table_BP[slot, : len(pages)] = pages
        self.table_BP[slot, : len(shared)] *= -1
        self.moved = True
        return True

    def snapshot(self, known: Known) -> Any:
        """The rings with which a text begins that was admitted; None to begin with."""
        if not (self.has_rings and known.start):
            return None
        return self._tree.use_snapshot(known.path[known.start // PAGE - 1])

    def has_room(self, positions: Mapping[int, int]) -> bool:
        """Whether there are pages for so many positions of slots."""
        return self._free(sum(self._missing(positions).values()))

    def extend(self, positions: Mapping[int, int]) -> None:
        """Gives slots pages for so many positions each, which there are."""
        for slot, count in self._missing(positions).items():
            pages, new = self._held[slot].pages, self._pool.take(count)
            self.table_BP[slot, len(pages) : len(pages) + count] = new
            pages += new
            self._users.update(new)
            self.moved = True

    def is_due(self, slot: int, processed: int) -> bool:
        """Whether a snapshot is wanted of a slot that has read so many tokens."""
        return processed in self._held[slot].due

    def progress(self, slot: int, processed: int, snapshot: Any = None) -> None:
        """A slot has read so many tokens of what it was admitted with.

        Args:
          slot: which has.
          processed: the tokens.
          snapshot: of its rings now, if one is due.
        """
        held = self._held[slot]
        if snapshot is not None:
            held.due.remove(processed)
            held.snapshots[processed] = snapshot
        self._keep(slot, processed)

    def release(self, slot: int, processed: int) -> None:
        """A slot is empty again, after so many tokens."""
        self._keep(slot, processed)
        held = self._held.pop(slot)
        self._pool.drop(held.pages)
        self._users.subtract(held.pages)
        self._users += Counter()  # without those that have none
        self.table_BP[slot] = 0
        self.moved = True

    def forget(self) -> None:
        """Empties the prefix cache."""
        self._tree.clear()

    def leaks(self) -> list[str]:
        """Without a request in any slot: pages whose holders are wrong, in words."""
        kept = {node.page for node in self._tree.nodes()}
        wrong = [
            f"page {page} has {self._pool.holders(page)} holders, "
            f"{'the tree keeps it' if page in kept else 'nobody keeps it'}"
            for page in range(1, self._pool.size + 1)
            if self._pool.holders(page) != (page in kept)
        ]
        if len(kept) != self._tree.size or self._held or self._users:
            wrong.append(f"{len(self._held)} slots and {self.used} pages are in use")
        if self.table_BP.any():
            wrong.append(f"tables still name pages: {self.table_BP.tolist()}")
        return wrong

    def _due(self, whole: int) -> set[int]:
        """Where snapshots are taken of any text of so many whole chunks' tokens."""
        stride = math.lcm(STRIDE, self.unit)
        return {whole, *range(stride, whole, stride)}

    def _common(self, tokens: Sequence[int], others: Sequence[int]) -> int:
        """Positions of two texts that begin alike which one can have of the other."""
        end, most = 0, min(self._whole(tokens), self._whole(others))
        while end < most:
            after = end + self.unit + self._lookahead
            if tokens[end:after] != others[end:after]:
                break
            end += self.unit
        return end

    def _whole(self, tokens: Sequence[int]) -> int:
        """Tokens that are read in whole chunks; the last is a round's to read."""
        return (len(tokens) - 1) // self.unit * self.unit

    def _missing(self, positions: Mapping[int, int]) -> dict[int, int]:
        missing = {
            slot: pages_for(count) - len(self._held[slot].pages)
            for slot, count in positions.items()
        }
        return {slot: count for slot, count in missing.items() if count > 0}

    def _free(self, count: int) -> bool:
        """Whether so many pages are free, once others were given back."""
        if count > self._pool.free:
            self._tree.evict(count - self._pool.free)
        return count <= self._pool.free

    def _keep(self, slot: int, processed: int) -> None:
        """Lets the tree have the pages that are complete, from where others read on."""
        held = self._held[slot]
        ready = min(processed - self._lookahead, held.whole) // PAGE
        taken = [end for end in held.snapshots if end <= ready * PAGE]
        if not self._prefix_cache or (ready <= held.kept and not taken):
            return
        path = self._tree.insert(held.salt, held.tokens, held.pages[:ready])
        for index in range(held.kept, ready):
            if path[index].page == held.pages[index]:
                self.table_BP[slot, index] *= -1
                self.moved = True
        for end in taken:
            rows, node = held.snapshots.pop(end), path[end // PAGE - 1]
            if node.snapshot is None:
                self._tree.keep_snapshot(node, rows)
        held.kept = max(held.kept, ready)
