"""What is fixed when the decode loop is compiled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.costs import bucket_ladder, check_buckets
from jaxspark.decoding.couplings import COUPLINGS, Coupling
from jaxspark.decoding.estimator import Estimator
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.drafters import Drafter


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How rounds draft, schedule and verify. What is None here, `resolve` fills in.

    Attributes:
      block_length: most drafts proposed per round and slot; None takes the drafter's
        most.
      coupling: "rejection" (accepts most) or "gumbel" (the same tokens as plain
        sampling with the same seeds), see `couplings`.
      schedule: chooses how much is drafted and what is verified. One that weighs costs
        needs some, see `jaxspark.calibration.measure_costs`.
      calibration: of the drafter's confidences; None takes them as they are.
      estimator: learns from every round how to read them; None does not. For drafters
        that have no head or no calibration, and for texts that change.
      buckets: token counts the target is compiled for, ascending; None takes what
        suits drafter and schedule. A schedule that knows costs brings its own.
    """

    block_length: int | None = None
    coupling: Coupling = "rejection"
    schedule: Scheduler = Fixed()
    calibration: Calibration | None = None
    estimator: Estimator | None = None
    buckets: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise ValueError(
                f"unknown coupling {self.coupling!r}; expected one of {COUPLINGS}"
            )
        if self.coupling not in self.schedule.couplings:
            raise ValueError(
                f"the schedule {type(self.schedule).__name__} lets a draft decide "
                "whether it is verified itself, which changes the distribution of the "
                f"output under coupling {self.coupling!r}; use one of "
                f"{self.schedule.couplings}, or the schedule Lagged"
            )
        if self.schedule.costs is not None and self.buckets is not None:
            raise ValueError(
                "the schedule knows the costs of token buckets of its own, leave out "
                f"buckets {self.buckets}"
            )
        if self.calibration is not None:
            length = 0 if self.block_length is None else self.block_length
            self.calibration.check(length, self.coupling)

    def resolve(self, drafter: Drafter, slots: int) -> "DecodeOptions":
        """These options for `slots` slots of a drafter, with every default filled in.

        Raises:
          ValueError: the drafter cannot draft such blocks, the calibration is not for
            them, or the buckets cannot hold one token per slot.
        """
        block_length = check_block_length(drafter, self.block_length)
        options = replace(self, block_length=block_length)
        if options.buckets is None and options.schedule.costs is None:
            buckets = default_buckets(drafter, slots, block_length, self.schedule)
            options = replace(options, buckets=buckets)
        options.check(slots)
        return options

    def check(self, slots: int) -> None:
        """Raises `ValueError` if they do not do for so many slots."""
        self.branches(slots)

    @property
    def block(self) -> int:
        """The block length.

        Raises:
          ValueError: it was left open, and nobody called `resolve`.
        """
        if self.block_length is None:
            raise ValueError(
                "these options leave the block length open; decode with "
                "options.resolve(drafter, slots)"
            )
        return self.block_length

    @property
    def draft_lengths(self) -> tuple[int, ...]:
        """Numbers of drafts that rounds are compiled for, ascending.

        Raises:
          ValueError: the schedule knows the costs of other blocks.
        """
        lengths = self.schedule.draft_lengths(self.block)
        if self.schedule.costs is not None and lengths[-1] != self.block:
            raise ValueError(
                f"the schedule knows the costs of draft lengths {lengths}, blocks have "
                f"{self.block} drafts"
            )
        return lengths

    def sizes(self, slots: int, draft_length: int | None = None) -> tuple[int, ...]:
        """The token buckets for rounds of `slots` slots that draft so much.

        Whole blocks by default.

        Raises:
          ValueError: they are not ascending, or cannot hold one token per slot.
        """
        draft_length = self.block if draft_length is None else draft_length
        costs = self.schedule.costs
        full = slots * (draft_length + 1)
        if costs is not None:
            sizes = costs.curve_for(draft_length).sizes
        elif self.buckets is None or not draft_length:
            sizes = (full,)
        else:
            sizes = self.buckets
        check_buckets(sizes)
        if sizes[-1] < slots:
            raise ValueError(
                f"the largest token bucket {sizes[-1]} cannot hold one token of each "
                f"of {slots} slots"
            )
        return sizes

    def all_sizes(self, slots: int, draft_lengths: Sequence[int]) -> tuple[int, ...]:
        """The token buckets for rounds that draft any of some numbers of tokens.

        Raises:
          ValueError: see `sizes`.
        """
        sizes = (self.sizes(slots, length) for length in draft_lengths)
        return tuple(sorted(set().union(*sizes)))

    def branches(self, slots: int) -> list[tuple[int, int]]:
        """Draft lengths and token buckets of `slots` slots that a loop has code for.

        Raises:
          ValueError: see `sizes`.
        """
        return [
            (length, size)
            for length in self.draft_lengths
            for size in self.sizes(slots, length)
        ]

    def max_min_drafts(self, slots: int) -> int:
        """The most drafts that a round can verify of every slot, whatever survives."""
        room = self.sizes(slots)[-1] // slots - 1
        return min(room, self.draft_lengths[-1])


def default_buckets(
    drafter: Drafter, slots: int, block_length: int, schedule: Scheduler = Fixed()
) -> tuple[int, ...]:
    """Token buckets that suit a drafter and a schedule without costs.

    One that holds every draft; for a drafter that may propose nothing another with one
    token per slot; for a schedule that chooses, a ladder.
    """
    if not isinstance(schedule, Fixed):
        return bucket_ladder(slots, block_length)
    if schedule.length is not None:
        block_length = min(schedule.length, block_length)
    if drafter.may_skip and block_length:
        return (slots, slots * (block_length + 1))
    return (slots * (block_length + 1),)


def check_block_length(drafter: Drafter, block_length: int | None) -> int:
    """The block length to use; None takes the drafter's most.

    Raises:
      ValueError: it is not one that the drafter can propose.
    """
    most = drafter.block_length
    if block_length is None:
        return most
    if not 0 <= block_length <= most or (most and not block_length):
        raise ValueError(
            f"block length {block_length} is not one this drafter can propose; "
            f"expected {min(1, most)}..{most}"
        )
    return block_length
