"""Who waits, and who has which slot and pages: what a host decides for a batch."""

import zlib
from collections import deque
from collections.abc import Collection, Sequence

from jaxspark.generation.slot_pages import SlotPages
from jaxspark.generation.slots import Running


class Seats:
    """The requests of a batch.

    Attributes:
      waiting: those without a slot, the next one first.
      running: the others, by slot.
      preemptions: times that one gave its slot up.
    """

    def __init__(
        self, slots: int, *, per_shard: int, block: int, pages: SlotPages | None
    ):
        """All slots are free.

        Args:
          slots: that there are.
          per_shard: slots of a shard.
          block: most drafts of a round.
          pages: hands out pages; None where every slot has rows of its own.
        """
        self.waiting: deque[Running] = deque()
        self.running: dict[int, Running] = {}
        self.preemptions = 0
        self._slots, self._per_shard, self._block = slots, per_shard, block
        self._pages = pages
        self._turns = 0

    @property
    def free(self) -> list[int]:
        """Slots without a request, of shards in turn: so all have as much to do."""
        free = [slot for slot in range(self._slots) if slot not in self.running]
        return sorted(free, key=lambda slot: slot % self._per_shard)

    @property
    def reading(self) -> dict[int, Running]:
        """Requests whose prompts are not read to their ends."""
        return {slot: each for slot, each in self.running.items() if each.unread > 0}

    @property
    def checksum(self) -> int:
        """Of what was decided: who is where, with which pages."""
        running = [
            (
                slot,
                each.request.index,
                each.processed,
                len(each.tokens),
                each.tokens[-1:],
            )
            for slot, each in sorted(self.running.items())
        ]
        waiting = [each.request.index for each in self.waiting]
        pages = 0 if self._pages is None else self._pages.checksum
        return zlib.crc32(repr((running, waiting, pages)).encode())

    def seat(self, count: int) -> dict[int, Running]:
        """Slots for those who wait longest; fewer than `count` if pages are few."""
        arrived: dict[int, Running] = {}
        while len(arrived) < count:
            each = self.waiting[0]
            place = self._place(each)
            if place is None:
                break
            slot, processed = place
            each.begin(processed)
            arrived[slot] = self.running[slot] = self.waiting.popleft()
        return arrived

    def readers(self, lanes: int) -> dict[int, Running]:
        """Requests whose prompts are read on now, by slot.

        Lanes go by turns to the request that came first and to the one that has least
        left: so short prompts pass long ones, and no long one is left behind.

        Args:
          lanes: prompts of a shard that can be read at once.
        """
        chosen: dict[int, Running] = {}
        reading = self.reading.items()
        self._turns += 1
        for first in range(0, self._slots, self._per_shard):
            shard = range(first, first + self._per_shard)
            left = [each for each in reading if each[0] in shard]
            for lane in range(self._turns, self._turns + min(lanes, len(left))):
                slot, each = min(left, key=_came_first if lane % 2 else _has_least_left)
                left.remove((slot, each))
                chosen[slot] = each
        return chosen

    def make_room(self, rounds: int) -> tuple[int, list[int]]:
        """Pages for the next rounds, which are fewer where pages are.

        Where they do not suffice for one, the youngest request that has some of those
        that are too few gives its own up, waits again, and will go on from what it has
        said.

        Returns:
          Rounds, and slots that were given up.
        """
        vacated: list[int] = []
        if self._pages is None:
            return rounds, vacated
        while short := self._pages.reserve(
            {slot: self._positions(each, rounds) for slot, each in self.running.items()}
        ):
            if rounds > 1:
                rounds //= 2
                continue
            slot = max(short, key=lambda slot: self.running[slot].request.index)
            self.waiting.appendleft(self.vacate([slot])[slot])
            self.preemptions += 1
            vacated.append(slot)
        return rounds, vacated

    def vacate(self, slots: Sequence[int]) -> dict[int, Running]:
        """Takes requests out of their slots; who was there."""
        left = {slot: self.running.pop(slot) for slot in slots}
        if self._pages is not None:
            for slot, each in left.items():
                read = each.processed if each.unread > 0 else each.length - 1
                self._pages.release(slot, read)
        return left

    def withdraw(self, indices: Collection[int]) -> tuple[list[Running], list[int]]:
        """Takes requests out of the queue; who they were, and slots of the others."""
        gone = [each for each in self.waiting if each.request.index in indices]
        self.waiting = deque(
            each for each in self.waiting if each.request.index not in indices
        )
        slots = [
            slot for slot, each in self.running.items() if each.request.index in indices
        ]
        return gone, slots

    def _place(self, each: Running) -> tuple[int, int] | None:
        """A free slot for a request, and tokens whose rows are there already."""
        free = self.free
        if self._pages is None:
            return free[0], 0
        return self._pages.admit(
            free,
            each.request.ids + each.tokens,
            self._positions(each, rounds=1),
            each.salt,
            share=not each.wants_prompt,
        )

    def _positions(self, each: Running, rounds: int) -> int:
        """Positions that a request writes to in so many rounds."""
        most = each.length + rounds * (self._block + 1)
        return min(most, each.request.limit) + self._block


def _came_first(item: tuple[int, Running]) -> tuple[int, ...]:
    return (item[1].request.index,)


def _has_least_left(item: tuple[int, Running]) -> tuple[int, ...]:
    return (item[1].unread, item[1].request.index)
