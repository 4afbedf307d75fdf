"""The prefix cache: a tree of pages by the tokens whose rows they hold.

An edge is one page's tokens (and, for drafters whose rows depend on the token after
them, that token too); a path from a root is a prefix. Every salt has a root of its own.
Leaves that no slot uses go first when pages are needed, the longest unused before
others: a page is never kept without those before it.

A page says nothing of rings. Where models have some, a node may keep a *snapshot*, the
rows of all rings of a slot that had come exactly to the node's end.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxspark.generation.page_pool import PagePool
from jaxspark.models.pages import PAGE

Salt = str | None


@dataclass(eq=False)
class Node:
    """A page in the tree.

    Attributes:
      key: its tokens; of a root, its salt.
      page: 0 of a root.
      parent: None of a root.
      end: positions up to its last.
      children: by key.
      used: when it was last used or inserted, in counts of the tree.
      snapshot: rows of rings at its end, if kept.
    """

    key: Any
    page: int
    parent: "Node | None"
    end: int
    children: dict[Any, "Node"] = field(default_factory=dict)
    used: int = 0
    snapshot: Any = None


class PrefixTree:
    """Pages by prefix. Holds each of its pages once."""

    def __init__(self, pool: PagePool, *, lookahead: int = 0, snapshots: int = 0):
        """An empty tree.

        Args:
          pool: whose pages it keeps.
          lookahead: tokens behind a page that its rows depend on.
          snapshots: most that are kept; beyond, the longest unused are dropped.
        """
        self._pool, self._lookahead = pool, lookahead
        self._most_snapshots = snapshots
        self._roots: dict[Salt, Node] = {}
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        self._clock = 0
        self.size = 0

    def match(self, salt: Salt, tokens: Sequence[int], pages: int) -> list[Node]:
        """The path of a text's longest known prefix, at most so many pages long."""
        path, node = [], self._roots.get(salt)
        while node is not None and node.end < PAGE * pages:
            node = node.children.get(self._key(tokens, node.end))
            path += [node] if node is not None else []
        return path

    def use(self, path: Iterable[Node]) -> None:
        """Others are evicted before these from now on."""
        self._clock += 1
        for node in path:
            node.used = self._clock

    def insert(
        self, salt: Salt, tokens: Sequence[int], pages: Sequence[int]
    ) -> list[Node]:
        """Keeps the pages of a text's beginning; where it has one already, that stays.

        Returns:
          The path, a node for each of the pages.
        """
        path = self.match(salt, tokens, len(pages))
        self.use(path)
        node = path[-1] if path else self._root(salt)
        for page in pages[len(path) :]:
            key = self._key(tokens, node.end)
            self._pool.hold([page])
            child = Node(key, page, node, node.end + PAGE, used=self._clock)
            node.children[key] = node = child
            path.append(node)
            self.size += 1
        return path

    def keep_snapshot(self, node: Node, snapshot: Any) -> None:
        """Keeps the rows of rings at a node's end."""
        node.snapshot = snapshot
        self._snapshots[node] = None
        while len(self._snapshots) > self._most_snapshots:
            oldest, _ = self._snapshots.popitem(last=False)
            oldest.snapshot = None

    def use_snapshot(self, node: Node) -> Any:
        """A node's snapshot, which others are dropped before from now on."""
        self._snapshots.move_to_end(node)
        return node.snapshot

    def evict(self, count: int) -> int:
        """Gives up to so many pages back that no slot uses; how many it gave."""
        leaves = [
            (node.used, index, node)
            for index, node in enumerate(self.nodes())
            if self._may_go(node)
        ]
        heapq.heapify(leaves)
        given = 0
        while leaves and given < count:
            _, index, node = heapq.heappop(leaves)
            self._remove(node)
            given += 1
            parent = node.parent
            if parent is not None and self._may_go(parent):
                heapq.heappush(leaves, (parent.used, index, parent))
        return given

    def nodes(self) -> Iterator[Node]:
        """All but the roots."""
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            if node.parent is not None:
                yield node

    def clear(self) -> None:
        """Gives all pages back."""
        self._pool.drop([node.page for node in self.nodes()])
        self._roots.clear()
        self._snapshots.clear()
        self.size = 0

    def _may_go(self, node: Node) -> bool:
        unused = not node.children and node.parent is not None
        return unused and self._pool.holders(node.page) == 1

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        self._pool.drop([node.page])
        self._snapshots.pop(node, None)
        self.size -= 1
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.key]

    def _root(self, salt: Salt) -> Node:
        return self._roots.setdefault(salt, Node(salt, 0, None, 0))

    def _key(self, tokens: Sequence[int], start: int) -> tuple[int, ...]:
        return tuple(tokens[start : start + PAGE + self._lookahead])
