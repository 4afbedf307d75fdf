"""Schedulers: how many drafts to propose, and how many of each slot to verify.

A round costs what its token bucket costs, plus the drafter. Its worth is the expected
number of tokens, tau = sum over slots of 1 + a_1 + ... + a_l, with survival a and
verification length l. Schedulers maximise tau / seconds (paper section 3.2.2), over
draft lengths too: how many drafts are proposed, perhaps none, is decided before
anything is drafted, by earlier rounds.

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
from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspark.decoding.costs import CostCurve, Costs, draft_ladder
from jaxspark.decoding.couplings import COUPLINGS
from jaxspark.decoding.outlook import Outlook

# The oldest survival that a schedule may begin with, in rounds.
MOST_LAG = 4


class Scheduler(Protocol):
    """Chooses what is verified; hashable, as part of the compiled round."""

    @property
    def couplings(self) -> tuple[str, ...]:
        """Couplings under which it is exact."""

    @property
    def costs(self) -> Costs | None:
        """What it weighs gains against; None if nothing."""

    @property
    def lag(self) -> int:
        """Age in rounds of the newest survival it gets as `earlier`, 1..MOST_LAG."""

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """Numbers of drafts a round may propose for each slot, ascending."""

    def draft(self, earlier: Outlook, idle_BG: Int[Array, "B G"]) -> Int[Array, ""]:
        """Which of them, by index; not asked where there is but one.

        Args:
          earlier: with the survival of earlier rounds; of new requests that of the ones
            before them, or what is usual: whether to draft at all is asked of the
            whole batch, which they join.
          idle_BG: rounds since so many drafts were last proposed.
        """

    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """Verification length of each slot, given what was drafted.

        Args:
          now: with the survival of this round's drafts.
          earlier: with that of as many drafts in earlier rounds, 1 for new requests.
        """


class _OneLength:
    """Schedules that always draft as much, whole blocks if they do not say else."""

    couplings: ClassVar = COUPLINGS
    costs: ClassVar = None
    lag: ClassVar = 1

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """The whole block."""
        return (block_length,)

    def draft(self, earlier: Outlook, idle_BG: Int[Array, "B G"]) -> Int[Array, ""]:
        """The only one."""
        return jnp.int32(0)


@dataclass(frozen=True)
class Fixed(_OneLength):
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

    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """The same length for every slot."""
        slots, drafted = now.survival_BG.shape
        length = drafted if self.length is None else self.length
        return jnp.full((slots,), min(length, drafted), jnp.int32)


@dataclass(frozen=True)
class Threshold(_OneLength):
    """Verifies drafts while their survival is at least `least`."""

    least: float

    def __post_init__(self):
        if not 0 <= self.least <= 1:
            raise ValueError(f"a survival threshold lies in [0, 1], got {self.least}")

    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """The drafts likely enough to survive."""
        return jnp.sum(now.survival_BG >= self.least, axis=1, dtype=jnp.int32)


@dataclass(frozen=True, kw_only=True)
class CostAware(ABC):
    """Schedulers that weigh tokens against seconds.

    They draft as many tokens as are expected to gain most per second, or none, but look
    now and then whether more would gain more: the sooner the less it seems to lose.

    Attributes:
      costs: of a round; None has `generate` measure them.
      lag: age in rounds of the newest survival that earlier decisions rest on. They
        take the mean over all rounds remembered, see `ScheduleState`.
      probe_share: time lost by such looks, as a share of all, for each draft length.
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

    def draft_lengths(self, block_length: int) -> tuple[int, ...]:
        """Those whose costs are known, or will be measured."""
        if self.costs is None:
            return draft_ladder(block_length)
        return self.costs.draft_lengths

    def draft(self, earlier: Outlook, idle_BG: Int[Array, "B G"]) -> Int[Array, ""]:
        """What pays most, or the most drafts that were not tried for long enough."""
        idle_G = jnp.max(jnp.where(earlier.live_B[:, None], idle_BG, 0), axis=0)
        rates, seconds, idle = [], [], []
        for curve in self.known.curves:
            index, rate = curve.best_bucket(earlier)
            length = curve.draft_length
            allowed = not length or jnp.all(earlier.floor_B <= length)
            rates.append(jnp.where(allowed, rate, -1.0))
            seconds.append(jnp.array(curve.seconds)[index])
            # Of no drafts it is not asked: no choice is smaller.
            idle.append(idle_G[length - 1])
        rate_L, seconds_L = jnp.stack(rates), jnp.stack(seconds)
        best = jnp.argmax(rate_L)
        # What a look loses: it takes longer than its tokens would otherwise.
        lost_L = seconds_L * (1 - rate_L / rate_L[best])
        wait_L = lost_L / (self.probe_share * seconds_L[best])
        choice_L = jnp.arange(len(rates))
        due_L = (choice_L > best) & (rate_L > 0) & (jnp.stack(idle) >= wait_L)
        return jnp.max(jnp.where(due_L, choice_L, best))

    @abstractmethod
    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """Verification length of each slot, given what was drafted."""

    def curve(self, now: Outlook) -> CostCurve:
        """Costs of rounds that draft what this one did."""
        return self.known.drafting(now.survival_BG.shape[1])


def fill(curve: CostCurve, now: Outlook, index: Int[Array, ""]) -> Int[Array, " B"]:
    """Verification lengths that fill a bucket with the likeliest drafts."""
    return now.admit(jnp.array(curve.sizes)[index] - now.anchors)


@dataclass(frozen=True, kw_only=True)
class Causal(CostAware):
    """Admits drafts in order while each raises tokens per second (Algorithm 1).

    It stops at the first that does not, so no draft is admitted because of what was
    drafted after it. Seconds between buckets are interpolated, or it would stop at the
    end of every bucket; the bucket that is reached is filled.
    """

    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """The drafts before the first that lowers the rate."""
        curve = self.curve(now)
        tau_N = now.expected_tokens()
        draft_N = jnp.arange(len(tau_N))
        rate_N = tau_N / curve.between(now.anchors + draft_N)
        # What must be verified is no question.
        raises_N = rate_N[1:] > rate_N[:-1]
        raises_N |= draft_N[:-1] < jnp.sum(now.floor_B)
        count = jnp.sum(jnp.cumprod(raises_N))
        return fill(curve, now, curve.holding(now.anchors + count))


@dataclass(frozen=True, kw_only=True)
class Lagged(CostAware):
    """Earlier rounds' survival chooses the bucket, this round's fills it.

    The search over buckets is global, so a jagged cost curve does no harm.
    """

    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """The likeliest drafts, as many as paid an earlier time."""
        curve = self.curve(now)
        return fill(curve, now, curve.best_bucket(earlier)[0])


@dataclass(frozen=True, kw_only=True)
class Free(CostAware):
    """Chooses the bucket by this round's own survival.

    Whether a draft is verified then depends on the draft itself, through the
    confidences after it. Under rejection sampling that changes the distribution of the
    output (paper appendix A); under the gumbel coupling nothing can.
    """

    couplings: ClassVar = ("gumbel",)

    def __call__(self, now: Outlook, earlier: Outlook) -> Int[Array, " B"]:
        """The likeliest drafts, as many as pay now."""
        curve = self.curve(now)
        return fill(curve, now, curve.best_bucket(now)[0])


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
