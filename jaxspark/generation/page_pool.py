"""Who holds which page of the caches: reference counts, on the host.

A page has as many holders as slots read or write it, and one more if the prefix tree
keeps it. Page 0 is nobody's: it stands for "no page" in tables (see
`jaxspark.models.pages`).
"""

from collections.abc import Iterable


class PagePool:
    """Pages 1 to `pages` - 1; those without a holder are free."""

    def __init__(self, pages: int):
        """As many as the caches have, page 0 among them.

        Raises:
          ValueError: there is no page to give.
        """
        if pages < 2:
            raise ValueError(f"a pool needs at least 2 pages, page 0 too; got {pages}")
        self._holders = [0] * pages
        # The last is handed out next: low numbers first.
        self._free = list(range(pages - 1, 0, -1))

    @property
    def size(self) -> int:
        """Pages that can be held."""
        return len(self._holders) - 1

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """So many free pages; whoever asks is their first holder.

        Raises:
          ValueError: there are fewer.
        """
        if count > self.free:
            raise ValueError(f"{count} pages are asked for, {self.free} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder of each, which have one already."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less of each; those without any are free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free already"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
