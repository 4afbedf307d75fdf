"""Stop strings, found wherever they end.

A text arrives in pieces, cut anywhere. The stop that counts is the one whose last
character comes first; of several that end there, the one named first. What could still
become a stop is held back, so nothing behind a stop, and nothing of it, is ever passed
on. The rule looks at characters only, so the pieces' borders cannot matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stop in a text.

    Attributes:
      stop: the string.
      start: characters before it.
      end: characters up to its last one.
    """

    stop: str
    start: int
    end: int


class StopFinder:
    """Passes a text on up to the first of some strings.

    Attributes:
      found: the stop, once there is one; nothing is passed on after it.
      held: characters of the text that are held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        """Looks for `stops`.

        Args:
          stops: none may be empty.
          include: whether the stop that is found is passed on too.
        """
        if not all(stops):
            raise ValueError(f"a stop string is empty: {list(stops)!r}")
        self.found: Found | None = None
        self._stops, self._include = tuple(stops), include
        self._longest = max(map(len, self._stops), default=0)
        # What was passed on last, which a stop that was let pass may reach into; and
        # what is held back.
        self._held = ""
        self._passed = 0

    @property
    def held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def push(self, piece: str, *, armed: bool = True) -> str:
        """What becomes certain with more text.

        Args:
          piece: the text that follows.
          armed: whether a stop that ends in this piece counts; one that does not is
            text like any other.
        """
        if self.found is not None or not piece:
            return ""
        text = self._held + piece
        if armed:
            found = self._first(text, len(self._held))
            if found is not None:
                self.found = found
                end = found.end if self._include else found.start
                self._held = ""
                return text[: end - self._passed]
        keep = self._unfinished(text)
        self._held = text[len(text) - keep :]
        self._passed += len(text) - keep
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        self._passed += len(text)
        return text

    def _first(self, text: str, known: int) -> Found | None:
        """The stop that ends first behind the first `known` characters."""
        best: tuple[int, int] | None = None
        for order, stop in enumerate(self._stops):
            at = text.find(stop, max(0, known - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = at + len(stop), order
        if best is None:
            return None
        stop = self._stops[best[1]]
        end = self._passed + best[0]
        return Found(stop=stop, start=end - len(stop), end=end)

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(len(tail) < len(s) and s.startswith(tail) for s in self._stops):
                return len(tail)
        return 0
