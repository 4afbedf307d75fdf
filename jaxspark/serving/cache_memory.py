"""How many pages an engine's caches have, and the context that they can hold."""

from jaxspark.drafters import Drafter
from jaxspark.generation.slot_pages import SlotPages
from jaxspark.models.pages import PAGE, pages_for
from jaxspark.parallel.mesh import slot_shards


def most_context(cache_pages: int, block: int) -> int:
    """Most tokens of a prompt and its output that fit the pages of a shard of slots.

    Args:
      cache_pages: of all shards.
      block: most drafts of a round, which need positions too.
    """
    return cache_pages // slot_shards() * PAGE - block


def check_context(context: int, block: int, cache_pages: int) -> None:
    """That an output may fill the context.

    Raises:
      ValueError: pages that shards cannot have equally many of, or too few.
    """
    shards, most = slot_shards(), most_context(cache_pages, block)
    if cache_pages % shards:
        raise ValueError(
            f"cache_pages is {cache_pages}; the mesh has {shards} shards of slots, "
            "which have equally many"
        )
    if context > most:
        needed = shards * pages_for(context + block)
        raise ValueError(
            f"cache_pages is {cache_pages}, which hold outputs of {most} tokens with "
            f"their prompts; a context of {context} takes {needed} pages of {PAGE} "
            f"positions with a block of {block}: give as many, or a smaller context"
        )


def slot_pages(
    drafter: Drafter,
    *,
    slots: int,
    capacity: int,
    chunk: int,
    prefix_cache: bool,
    cache_pages: int | None,
    snapshot_bytes: int | None,
) -> SlotPages | None:
    """Who hands out pages; None where every slot has rows of its own."""
    if not prefix_cache and cache_pages is None:
        return None
    if cache_pages is None:
        cache_pages = slots * pages_for(capacity)
    shards = slot_shards()
    return SlotPages(
        slots=slots,
        capacity=capacity,
        pages=cache_pages // shards + 1,  # page 0 is nobody's
        chunk=chunk,
        shards=shards,
        lookahead=drafter.lookahead,
        prefix_cache=prefix_cache,
        snapshot_bytes=snapshot_bytes,
    )
