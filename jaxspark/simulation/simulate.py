"""Replays rounds of real or stated acceptance against a cost curve.

Every slot walks through the rounds of a recorded request: what the drafter expected and
how many of its drafts were right. A schedule, the same object that decodes, chooses
what is verified; the round takes what its bucket costs; a slot gains the drafts that
were both verified and right, and one token. Throughput is that of all slots, speed that
of one user. A shorter verification would have moved the next round to another place of
the text; the replay takes the next recorded round all the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxspark.calibration.rounds import Rounds, typical_blocks
from jaxspark.decoding import Calibration, Costs, Forecast, Scheduler
from jaxspark.decoding.schedule_state import ScheduleState


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Rounds of many requests, each with whole blocks.

    Attributes:
      begin_R: first round of each request; its rounds follow each other.
      count_R: how many it has.
      survival_NG: forecast that the first j + 1 drafts are right.
      right_N: drafts that were right, from the first.
    """

    begin_R: Int[np.ndarray, " R"]
    count_R: Int[np.ndarray, " R"]
    survival_NG: Float[np.ndarray, "N G"]
    right_N: Int[np.ndarray, " N"]

    def first(self, length: int) -> "Trace":
        """The same rounds, had they drafted no more than so many tokens."""
        return replace(
            self,
            survival_NG=self.survival_NG[:, :length],
            right_N=np.minimum(self.right_N, length),
        )

    @classmethod
    def recorded(
        cls,
        rounds: Rounds,
        calibration: Calibration | None = None,
        temperature: float = 1.0,
    ) -> "Trace":
        """What was recorded, with confidences as they are or calibrated.

        Args:
          rounds: recorded rounds.
          calibration: of their confidences.
          temperature: that they were sampled at.

        Raises:
          ValueError: no round judged its whole block, or the calibration has
            temperatures for fewer drafts.
        """
        block_length = rounds.confidence_NG.shape[1]
        if calibration is None:
            calibration = Calibration.identity(block_length, "rejection")
        calibration.check(block_length, calibration.coupling)
        survival_NG = calibration.survival(
            jnp.asarray(rounds.confidence_NG),
            jnp.asarray(rounds.certainty_NG),
            jnp.full((len(rounds),), temperature),
        )
        return cls.forecast(rounds, np.asarray(survival_NG))

    @classmethod
    def forecast(cls, rounds: Rounds, survival_NG: Float[np.ndarray, "N G"]) -> "Trace":
        """What was recorded, with any forecast of survival.

        Raises:
          ValueError: no round judged its whole block.
        """
        _, known_NG = rounds.survived()
        whole = np.flatnonzero(known_NG.all(axis=1))
        if not len(whole):
            raise ValueError(
                "no recorded round verified its whole block; record rounds that do"
            )
        # Rounds of a request come together, in the order they happened.
        whole = whole[np.argsort(rounds.request_N[whole], kind="stable")]
        _, begin_R, count_R = np.unique(
            rounds.request_N[whole], return_index=True, return_counts=True
        )
        return cls(
            begin_R=begin_R,
            count_R=count_R,
            survival_NG=survival_NG[whole],
            right_N=rounds.accepted_N[whole],
        )

    @classmethod
    def stated(
        cls,
        acceptance: Mapping[str, Sequence[float]],
        *,
        concentration: float,
        requests: int = 300,
        rounds: int = 200,
        seed: int = 0,
    ) -> "Trace":
        """Rounds with given conditional acceptance, where none were recorded.

        A draft's chance is drawn from a Beta distribution around its place's acceptance
        and is what the drafter forecasts: a calibrated confidence, the sharper the
        smaller the concentration.

        Args:
          acceptance: by domain, conditional acceptance of each place.
          concentration: of the Beta distributions.
          requests: of all domains in equal parts.
          rounds: of each request.
          seed: of the draws.
        """
        random = np.random.default_rng(seed)
        means = np.array([list(each) for each in acceptance.values()])
        mean_NG = np.repeat(np.resize(means, (requests, means.shape[1])), rounds, 0)
        mean_NG = np.clip(mean_NG, 1e-6, 1 - 1e-6)
        chance_NG = random.beta(concentration * mean_NG, concentration * (1 - mean_NG))
        right_NG = random.random(chance_NG.shape) < chance_NG
        return cls(
            begin_R=np.arange(requests) * rounds,
            count_R=np.full(requests, rounds),
            survival_NG=np.cumprod(chance_NG, axis=1),
            right_N=np.cumprod(right_NG, axis=1).sum(axis=1),
        )


@dataclass(frozen=True, kw_only=True)
class Load:
    """Who asks.

    Attributes:
      slots: most requests decoded together.
      rate: requests per second that arrive by chance (Poisson) and queue for a slot;
        None for a closed loop, in which every slot is always taken.
      tokens: mean length of an output (geometric).
    """

    slots: int
    rate: float | None = None
    tokens: int = 500


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulation showed; nothing of it was measured.

    Attributes:
      throughput: tokens per second of all requests.
      user_speed: tokens per second of one, while it is decoded.
      accepted_length: tokens per request and round.
      verified_length: tokens verified per request and round, the anchor included.
      drafted: share of rounds with drafts.
      busy: mean requests decoded together.
    """

    throughput: float
    user_speed: float
    accepted_length: float
    verified_length: float
    drafted: float
    busy: float


def simulate(
    trace: Trace,
    schedule: Scheduler,
    costs: Costs,
    load: Load,
    *,
    rounds: int = 400,
    seed: int = 0,
) -> Simulated:
    """Plays some rounds.

    Args:
      trace: what drafts would be worth.
      schedule: chooses what is verified.
      costs: what rounds take, also those of a schedule that knows no costs; of a draft
        length they do not know, as long as of the next.
      load: who asks.
      rounds: how many, after a tenth that is not counted.
      seed: of arrivals, output lengths and who asks what.
    """
    random = np.random.default_rng(seed)
    slots, G = load.slots, trace.survival_NG.shape[1]
    lengths = schedule.draft_lengths(G)
    curves = [costs.curve_for(length) for length in lengths]
    for curve in curves:
        if curve.sizes[-1] < slots:
            raise ValueError(
                f"costs end at {curve.sizes[-1]} tokens, {slots} slots need as many"
            )
    place_B, end_B = np.zeros(slots, int), np.zeros(slots, int)
    left_B = np.zeros(slots, int)
    memory = ScheduleState.empty(slots, G)
    prior_UG = typical_blocks(trace.survival_NG)
    prior_BUG = jnp.asarray(np.broadcast_to(prior_UG, (slots, *prior_UG.shape)))
    waiting, clock, arrival = 0, 0.0, 0.0
    sums = dict.fromkeys(
        ("time", "tokens", "slots", "verified", "drafted", "busy"), 0.0
    )
    warm, played = rounds // 10, 0
    while played < warm + rounds:
        # Who comes.
        if load.rate is None:
            waiting = slots
        else:
            while arrival <= clock:
                waiting += 1
                arrival += random.exponential(1 / load.rate)
        free = np.flatnonzero(left_B <= 0)[:waiting]
        waiting -= len(free)
        chosen = random.integers(len(trace.begin_R), size=len(free))
        # Not all begin at the beginning, or a short replay would see nothing else.
        offset = random.integers(trace.count_R[chosen])
        place_B[free] = trace.begin_R[chosen] + offset
        end_B[free] = trace.begin_R[chosen] + trace.count_R[chosen]
        left_B[free] = random.geometric(1 / load.tokens, size=len(free))
        live_B = left_B > 0
        if not live_B.any():
            # Nobody asks for a while, which passes all the same.
            sums["time"] += (arrival - clock) * (played >= warm)
            clock = arrival
            continue
        # What is verified.
        lagged = _lagged(schedule, memory, prior_BUG, live_B)
        pick = 0
        if len(lengths) > 1:
            pick = int(_draft(schedule, lagged, memory.rounds_since_BG))
        drafted, curve = lengths[pick], curves[pick]
        if drafted:
            survival_Bg = trace.survival_NG[place_B, :drafted]
            lengths_B, memory = _verify(
                schedule, curve.sizes, memory, lagged, survival_Bg
            )
            lengths_B = np.asarray(lengths_B)
        else:
            lengths_B, memory = np.zeros(slots, int), memory.after_none()
        # What comes of it.
        gained_B = np.minimum(lengths_B, trace.right_N[place_B]) + 1
        gained_B = np.where(live_B, np.minimum(gained_B, left_B), 0)
        count = live_B.sum() + lengths_B.sum()
        taken = curve.seconds[np.searchsorted(curve.sizes, count)]
        clock += taken
        left_B = left_B - gained_B
        place_B = place_B + 1
        over_B = place_B >= end_B
        chosen = random.integers(len(trace.begin_R), size=slots)
        place_B = np.where(over_B, trace.begin_R[chosen], place_B)
        end_B = np.where(over_B, (trace.begin_R + trace.count_R)[chosen], end_B)
        played += 1
        if played > warm:
            sums["time"] += taken
            sums["tokens"] += gained_B.sum()
            sums["slots"] += live_B.sum()
            sums["verified"] += count
            sums["drafted"] += drafted > 0
            sums["busy"] += live_B.sum() * taken
    return Simulated(
        throughput=sums["tokens"] / sums["time"],
        user_speed=sums["tokens"] / sums["busy"],
        accepted_length=sums["tokens"] / sums["slots"],
        verified_length=sums["verified"] / sums["slots"],
        drafted=sums["drafted"] / rounds,
        busy=sums["busy"] / sums["time"],
    )


@partial(jax.jit, static_argnames=("schedule",))
def _lagged(
    schedule: Scheduler,
    memory: ScheduleState,
    prior_BUG: Float[Array, "B U G"],
    live_B: Bool[Array, " B"],
) -> Forecast:
    """What a compiled round would know before it drafts."""
    survival_nBG = memory.lagged_survival(schedule, prior_BUG)
    return memory.forecast(survival_nBG, live_B=live_B)


@partial(jax.jit, static_argnames=("schedule",))
def _draft(
    schedule: Scheduler, lagged: Forecast, rounds_since_BG: Int[Array, "B G"]
) -> Int[Array, ""]:
    """Which number of drafts it would choose."""
    return schedule.draft(lagged, rounds_since_BG)


@partial(jax.jit, static_argnames=("schedule", "sizes"))
def _verify(
    schedule: Scheduler,
    sizes: tuple[int, ...],
    memory: ScheduleState,
    lagged: Forecast,
    survival_Bg: Float[Array, "B g"],
) -> tuple[Int[Array, " B"], ScheduleState]:
    """Verification lengths that it would choose, and what it would remember."""
    drafted = survival_Bg.shape[1]
    current = replace(lagged, survival_BG=survival_Bg).first(drafted)
    chosen = schedule(current, lagged.first(drafted), sizes)
    return chosen.lengths_B, memory.after_drafts(
        survival_Bg, lagged.survival_BG, lagged.live_B
    )


def speed_at(throughput: float, frontier: Sequence[Simulated]) -> float | None:
    """A user's speed where a frontier has that throughput; None outside it.

    Along a frontier throughput rises with the number of users and speed falls; of two
    places with one throughput the faster counts.
    """
    best = None
    for a, b in zip(frontier, frontier[1:]):
        low, high = sorted((a, b), key=lambda each: each.throughput)
        if low.throughput <= throughput <= high.throughput:
            width = high.throughput - low.throughput
            share = (throughput - low.throughput) / width if width else 0.0
            speed = low.user_speed + share * (high.user_speed - low.user_speed)
            best = speed if best is None else max(best, speed)
    return best
