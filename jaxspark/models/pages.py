"""Pages: cache rows of 128 positions that slots need not have side by side.

A pool of pages is a cache with pages in place of slots, each as long as `PAGE`. A page
table [B, P] names the page of each 128 positions of a slot:

    p > 0    the slot's own page
    0        no page: rows there are not written, and what is read is never seen
    p < 0    page -p, which others share: it is read, never written

so no program can change what a slot does not own. Page 0 belongs to nobody. Tables are
made by the host between two calls of the loop. Only tables that grow with positions are
paged; rings are not. On a mesh every shard of slots has a pool, and numbers in its
slots' tables are those of its own pages.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspark.models.base import is_table

# Positions of a page. Windows of compression must end with it.
PAGE = 128


def pages_for(positions: int) -> int:
    """Pages that so many positions need."""
    return -(-positions // PAGE)


def in_pages[CacheT](cache: CacheT, pages: int) -> CacheT:
    """A cache with pools of so many pages in place of its growing tables, all zeros."""

    def cut(node):
        return node.pool(pages) if is_table(node) and node.grows else node

    return jax.tree.map(cut, cache, is_leaf=is_table)


def rings(cache: Any) -> list[Any]:
    """The tables of a cache that do not grow; with pages, they make up a slot."""
    tables = jax.tree.leaves(cache, is_leaf=is_table)
    return [node for node in tables if is_table(node) and not node.grows]


def with_rings[CacheT](cache: CacheT, new: list[Any]) -> CacheT:
    """The cache with others in the places of its `rings`."""
    left = iter(new)

    def swap(node):
        return next(left) if is_table(node) and not node.grows else node

    return jax.tree.map(swap, cache, is_leaf=is_table)


def readable(pages_BP: Int[Array, "B P"] | None) -> Int[Array, "B P"] | None:
    """Numbers of pages to read from; any page where there is none."""
    return None if pages_BP is None else jnp.abs(pages_BP)
