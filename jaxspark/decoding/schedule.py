"""Schedulers: how many drafts to propose, and how many of each slot to verify.

A round costs what its token bucket costs, plus the drafter. Its worth is the expected
number of tokens, tau = sum over slots of 1 + a_1 + ... + a_l, with survival a and
verification length l. Schedulers maximize tau / seconds (paper section 3.2.2; slots
that wait meanwhile count as well, see `Forecast.worth`), over draft lengths too: how
many drafts are proposed, perhaps none, is decided before anything is drafted, by
earlier rounds.

Under rejection sampling a draft must not influence whether it is verified itself
(paper appendix A). What may be looked at:

    fixed, threshold   nothing, and the survival up to the draft itself
    causal             drafts that are likelier than it (Algorithm 1, stops early)
    lagged             earlier rounds decide how many, this round which
    free               everything; only for coupling="gumbel", whose output does not
                       depend on what is verified

That holds because requests draw from streams of their own: those decoded together, or
soon after each other, need seeds that differ, as `generate` and `generate_stream` give
them where none are named.

Each scheduler is a pure function of arrays and runs inside the compiled round, so
nothing waits for the host.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.decoding.costs import CostCurve, Costs, draft_ladder
from jaxspark.decoding.couplings import COUPLINGS
from jaxspark.decoding.forecast import Forecast, Verification, smallest_bucket
from jaxspark.parallel.axes import SLOTS, all_of, largest, max_of, total

# The oldest survival that a schedule may begin with, in rounds.
MOST_LAG = 4


@runtime_checkable
class Scheduler(Protocol):
    """Chooses what is verified; hashable, as part of the compiled round."""

    @property
    def couplings(self) -> tuple[str, ...]:
        """Couplings under which it is exact."""

    @property
    def costs(self) -> Costs | None:
        """What it weighs gains against; None if nothing."""

    @property
    def needs_costs(self) -> bool:
        """Whether it has to be given costs before it can choose."""

    @property
    def lag(self) -> int:
        """Age in rounds of the newest survival in `lagged`, 1..MOST_LAG."""

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """Numbers of drafts a round may propose for each slot, ascending."""

    def draft(
        self, lagged: Forecast, rounds_since_BG: Int[Array, "B G"]
    ) -> Int[Array, ""]:
        """Which of them, by index; not asked where there is only one.

        Args:
          lagged: survival of earlier rounds. New requests have that of the request
            before them in the slot, or the prior.
          rounds_since_BG: rounds since so many drafts were last proposed.
        """

    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """What is verified of each slot, and in which token bucket.

        Args:
          current: survival of this round's drafts.
          lagged: survival of as many drafts in earlier rounds.
          sizes: the token buckets of this round, ascending.
        """


class _ConstantLength:
    """Schedules that always propose the same number of drafts, by default a block."""

    couplings: ClassVar = COUPLINGS
    costs: ClassVar = None
    needs_costs: ClassVar = False
    lag: ClassVar = 1

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """The whole block."""
        return (block_length,)

    def draft(
        self, lagged: Forecast, rounds_since_BG: Int[Array, "B G"]
    ) -> Int[Array, ""]:
        """The only one."""
        return jnp.int32(0)


@dataclass(frozen=True)
class Fixed(_ConstantLength):
    """Drafts and verifies `length` tokens of every slot, whole blocks by default.

    With 0 nothing is drafted: plain decoding.
    """

    length: int | None = None

    def __post_init__(self):
        if self.length is not None and self.length < 0:
            raise ValueError(f"a verification length is at least 0, got {self.length}")

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """The one length."""
        if self.length is None:
            return (block_length,)
        return (min(self.length, block_length),)

    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """The same length for every slot."""
        slots, drafted = current.survival_BG.shape
        length = drafted if self.length is None else self.length
        lengths_B = jnp.full((slots,), min(length, drafted), jnp.int32)
        return current.verify(lengths_B, sizes)


@dataclass(frozen=True)
class Threshold(_ConstantLength):
    """Verifies drafts while their survival is at least `min_survival`."""

    min_survival: float

    def __post_init__(self):
        if not 0 <= self.min_survival <= 1:
            raise ValueError(
                f"a survival threshold lies in [0, 1], got {self.min_survival}"
            )

    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """The drafts likely enough to survive."""
        likely_BG = current.survival_BG >= self.min_survival
        return current.verify(jnp.sum(likely_BG, axis=1, dtype=jnp.int32), sizes)


@dataclass(frozen=True, kw_only=True)
class CostAware(ABC):
    """Schedulers that weigh tokens against seconds.

    They draft as many tokens as are expected to gain most per second, or none. Longer
    drafts are probed occasionally, more often when little would be lost.

    Attributes:
      costs: of a round; a schedule without any can be named but not decoded with.
      lag: age in rounds of the newest survival that earlier decisions rest on. They
        take the mean over all rounds remembered, see `ScheduleState`.
      probe_share: time spent on probing each draft length, as a share of all time.
    """

    costs: Costs | None = None
    lag: int = 1
    probe_share: float = 0.002
    couplings: ClassVar = COUPLINGS

    def __post_init__(self):
        if not 1 <= self.lag <= MOST_LAG:
            raise ValueError(f"lag must lie in 1..{MOST_LAG}, got {self.lag}")
        if not 0 < self.probe_share < 1:
            raise ValueError(
                f"probe_share must lie between 0 and 1, got {self.probe_share}"
            )

    @property
    def needs_costs(self) -> bool:
        """Whether it has none."""
        return self.costs is None

    @property
    def known(self) -> Costs:
        """The costs.

        Raises:
          ValueError: there are none.
        """
        if self.costs is None:
            raise ValueError(
                f"the schedule {type(self).__name__} knows no costs; give it some from "
                "jaxspark.calibration.measure_costs"
            )
        return self.costs

    def timed(self, seconds_J: Float[Array, " J"]) -> Self:
        """With the seconds that rounds took in each branch, see `Costs.timed`."""
        return replace(self, costs=self.known.timed(seconds_J))

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """Those whose costs are known, or would be measured."""
        if self.costs is None:
            return draft_ladder(block_length)
        return self.costs.draft_lengths

    def draft(
        self, lagged: Forecast, rounds_since_BG: Int[Array, "B G"]
    ) -> Int[Array, ""]:
        """What pays most, or the longest drafts that are due to be probed."""
        since_BG = jnp.where(lagged.live_B[:, None], rounds_since_BG, 0)
        since_G = largest(jnp.max(since_BG, axis=0), SLOTS)
        rates, seconds, since = [], [], []
        for curve in self.known.curves:
            index, rate = curve.best_bucket(lagged)
            length = curve.draft_length
            allowed = not length or all_of(lagged.min_drafts_B <= length)
            rates.append(jnp.where(allowed, rate, -1.0))
            seconds.append(jnp.asarray(curve.seconds)[index])
            # Unused for length 0, which is never probed.
            since.append(since_G[length - 1])
        rate_L, seconds_L = jnp.stack(rates), jnp.stack(seconds)
        best = jnp.argmax(rate_L)
        # What a probe loses: it takes longer than its tokens would otherwise.
        lost_L = seconds_L * (1 - rate_L / rate_L[best])
        wait_L = lost_L / (self.probe_share * seconds_L[best])
        choice_L = jnp.arange(len(rates))
        due_L = (choice_L > best) & (rate_L > 0) & (jnp.stack(since) >= wait_L)
        return jnp.max(jnp.where(due_L, choice_L, best))

    @abstractmethod
    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """What is verified of each slot, and in which token bucket."""

    def curve(self, current: Forecast) -> CostCurve:
        """Costs of rounds that draft what this one did."""
        return self.known.curve_for(current.survival_BG.shape[1])


@dataclass(frozen=True, kw_only=True)
class Causal(CostAware):
    """Admits drafts in order while each raises tokens per second (Algorithm 1).

    It stops at the first that does not, so no draft is admitted because of what was
    drafted after it. Seconds between buckets are interpolated, or it would stop at the
    end of every bucket; the bucket that is reached is filled.
    """

    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """The drafts before the first that lowers the rate."""
        worth_N = total(current.worth(), SLOTS)
        draft_N, anchors = jnp.arange(len(worth_N)), max_of(current.anchors)
        seconds_N = self.curve(current).interpolate(anchors + draft_N)
        rate_N = worth_N / seconds_N
        raises_N = rate_N[1:] > rate_N[:-1]
        # Mandatory drafts are always admitted.
        raises_N |= draft_N[:-1] < max_of(jnp.sum(current.min_drafts_B))
        count = jnp.sum(jnp.cumprod(raises_N))
        bucket = smallest_bucket(sizes, anchors + count)
        return current.fill(bucket, sizes)


@dataclass(frozen=True, kw_only=True)
class Lagged(CostAware):
    """Earlier rounds' survival chooses the bucket, this round's fills it.

    The search over buckets is global, so a jagged cost curve does no harm.
    """

    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """The likeliest drafts, as many as paid an earlier time."""
        return current.fill(self.curve(current).best_bucket(lagged)[0], sizes)


@dataclass(frozen=True, kw_only=True)
class Free(CostAware):
    """Chooses the bucket by this round's own survival.

    Whether a draft is verified then depends on the draft itself, through the
    confidences after it. Under rejection sampling that changes the distribution of the
    output (paper appendix A); under the gumbel coupling nothing can.
    """

    couplings: ClassVar = ("gumbel",)

    def __call__(
        self, current: Forecast, lagged: Forecast, sizes: tuple[int, ...]
    ) -> Verification:
        """The likeliest drafts, as many as pay now."""
        return current.fill(self.curve(current).best_bucket(current)[0], sizes)


def parse_schedule(text: str) -> Scheduler:
    """A schedule by the name that commands give it.

    "fixed", "fixed:LENGTH", "threshold:SURVIVAL", "causal", "lagged", "lagged:LAG" or
    "free"; those that weigh costs have none yet.

    Raises:
      ValueError: it is none of these.
    """
    kind, _, value = text.partition(":")
    try:
        if kind == "fixed":
            return Fixed(int(value) if value else None)
        if kind == "threshold":
            return Threshold(float(value))
        if kind == "lagged":
            return Lagged(lag=int(value) if value else 1)
        if text in ("causal", "free"):
            return Causal() if text == "causal" else Free()
    except ValueError as error:
        raise ValueError(f"schedule {text!r}: {error}") from error
    raise ValueError(
        f"unknown schedule {text!r}; expected fixed, fixed:LENGTH, threshold:SURVIVAL, "
        "causal, lagged, lagged:LAG or free"
    )
