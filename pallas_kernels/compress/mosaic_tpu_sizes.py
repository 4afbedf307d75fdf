"""Static sizes of `compress` on a TPU: windows on their way, and in work."""

from dataclasses import dataclass

# Windows of a turn, if they are small; turns on their way and in work, of others too.
TOGETHER, SMALL = 8, 128 << 10
FEW, MANY = 2, 8
# Rows around an entry that are written together.
TILE = 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Static sizes.

    Attributes:
      ratio, series, width: m; series of a row; H.
      slots, slots_per_core: B; slots of a core, those that fill up the last included.
      windows: most that end of a slot.
      length: S, rows of the ring.
      piece: positions that lie together in the ring wherever a window begins.
      shared: whether an entry is written with the rows around it.
      eps: of the norm.
    """

    ratio: int
    series: int
    width: int
    slots: int
    slots_per_core: int
    windows: int
    length: int
    piece: int
    shared: bool
    eps: float

    @property
    def span(self) -> int:
        """Rows of a window, of all series."""
        return self.series * self.ratio

    @property
    def together(self) -> int:
        """Windows of a turn."""
        return TOGETHER if 8 * self.span * self.width <= SMALL else 1

    @property
    def depth(self) -> int:
        """Turns on their way and in work."""
        return FEW if self.together > 1 else MANY
