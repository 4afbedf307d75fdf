"""What scheduling remembers between rounds: how likely drafts were to survive.

Decisions rest on the mean over all that is remembered. One block predicts the next
poorly, and with few blocks the best-looking choice is often just lucky.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.forecast import Forecast
from jaxspark.decoding.schedule import CostAware, Scheduler
from jaxspark.parallel.axes import SLOTS, largest, size, total


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScheduleState:
    """What scheduling knows of each slot.

    Attributes:
      min_drafts_B: drafts that are verified in every round that drafts.
      max_drafts_B: most drafts that are.
      history_BnG: survival in the last rounds that drafted, the newest first; estimated
        for positions they did not draft, -1 for rounds before the first.
      rounds_since_BG: rounds since that many drafts were last proposed.
      seconds_BJ: of a round in each branch, see `DecodeOptions.branches`, alike for all
        slots; None where the schedule's own are taken.
    """

    min_drafts_B: Int[Array, " B"]
    max_drafts_B: Int[Array, " B"]
    history_BnG: Float[Array, "B n G"]
    rounds_since_BG: Int[Array, "B G"]
    seconds_BJ: Float[Array, "B J"] | None = None

    @classmethod
    def empty(
        cls, slots: int, block_length: int, seconds: Sequence[float] | None = None
    ) -> "ScheduleState":
        """No history, and no bounds."""
        return cls(
            min_drafts_B=jnp.zeros((slots,), jnp.int32),
            max_drafts_B=jnp.full((slots,), block_length, jnp.int32),
            # A type given by name: a weak one would have `decode` compiled twice.
            history_BnG=jnp.full(
                (slots, remembered(slots), block_length), -1.0, jnp.float32
            ),
            rounds_since_BG=jnp.zeros((slots, block_length), jnp.int32),
            seconds_BJ=None
            if seconds is None
            else jnp.tile(jnp.array(seconds, jnp.float32), (slots, 1)),
        )

    def informed(self, schedule: Scheduler) -> Scheduler:
        """A schedule, with the seconds that are remembered."""
        if self.seconds_BJ is None or not isinstance(schedule, CostAware):
            return schedule
        return schedule.timed(self.seconds_BJ[0])

    def admit(
        self,
        slots_N: Int[Array, " N"],
        *,
        min_drafts_N: Int[Array, " N"],
        max_drafts_N: Int[Array, " N"],
        same_temperature_N: Bool[Array, " N"],
    ) -> "ScheduleState":
        """For new requests in some slots; numbers past the last slot are skipped.

        A slot keeps the survival history of the request before if the sampling
        temperature is the same; rounds since each length was tried are shared by all
        slots.
        """

        def put(old_B, new_N):
            return old_B.at[slots_N].set(new_N, mode="drop")

        kept_NnG = self.history_BnG.at[slots_N].get(mode="clip")
        kept_NnG = jnp.where(same_temperature_N[:, None, None], kept_NnG, -1.0)
        shared_1G = jnp.max(self.rounds_since_BG, axis=0, keepdims=True)
        shared_1G = largest(shared_1G, SLOTS)
        return replace(
            self,
            min_drafts_B=put(self.min_drafts_B, min_drafts_N),
            max_drafts_B=put(self.max_drafts_B, max_drafts_N),
            history_BnG=put(self.history_BnG, kept_NnG),
            rounds_since_BG=jnp.broadcast_to(shared_1G, self.rounds_since_BG.shape),
        )

    def forecast(
        self,
        survival_BG: Float[Array, "*n B G"],
        *,
        live_B: Bool[Array, " B"],
        room_B: Int[Array, " B"] | None = None,
        reading: Int[Array, ""] | int = 0,
    ) -> Forecast:
        """Survival and the slots' bounds; `room_B` bounds drafts further."""
        max_drafts_B = self.max_drafts_B
        if room_B is not None:
            max_drafts_B = jnp.minimum(max_drafts_B, room_B)
        return Forecast.of(
            survival_BG,
            min_drafts_B=self.min_drafts_B,
            max_drafts_B=max_drafts_B,
            live_B=live_B,
            reading=reading,
        )

    def lagged_survival(
        self, schedule: Scheduler, prior_BUG: Float[Array, "B U G"] | None
    ) -> Float[Array, "n B G"]:
        """Survival in the earlier rounds that a schedule may see, see `recall`."""
        history_nBG = jnp.moveaxis(self.history_BnG, 1, 0)
        return recall(history_nBG, prior_BUG)[schedule.lag - 1 :]

    def after_drafts(
        self,
        survival_Bg: Float[Array, "B g"],
        lagged_nBG: Float[Array, "n B G"],
        live_B: Bool[Array, " B"],
    ) -> "ScheduleState":
        """After a round that drafted g tokens for live slots."""
        newest_BG = extend_survival(survival_Bg, lagged_nBG)
        history_BnG = jnp.concatenate(
            [newest_BG[:, None], self.history_BnG[:, :-1]], axis=1
        )
        drafted = survival_Bg.shape[1]
        return replace(
            self,
            history_BnG=jnp.where(live_B[:, None, None], history_BnG, self.history_BnG),
            rounds_since_BG=(self.rounds_since_BG + 1).at[:, :drafted].set(0),
        )

    def after_none(self) -> "ScheduleState":
        """After a round that drafted nothing."""
        return replace(self, rounds_since_BG=self.rounds_since_BG + 1)


def remembered(slots: int) -> int:
    """Rounds of survival that a state of so many slots remembers.

    Recorded rounds of one slot, replayed against measured costs, lost a tenth of their
    speed to noise with a memory of 8 rounds, and nothing with 32.
    """
    return max(8, -(-64 // slots))


def recall(
    history_nBG: Float[Array, "n B G"], prior_BUG: Float[Array, "B U G"] | None
) -> Float[Array, "n B G"]:
    """Survival of earlier rounds, with an estimate for those not played yet.

    Args:
      history_nBG: of rounds that were played; below 0 for others.
      prior_BUG: typical blocks that stand in for them, in turns: their mean would say
        nothing of what choosing the likeliest drafts gains. None takes the mean of the
        rounds that were played, and 1 if there were none.
    """
    known_nBG = history_nBG >= 0
    if prior_BUG is None:
        count_G = total(jnp.sum(known_nBG, axis=(0, 1)), SLOTS)
        total_G = total(jnp.sum(history_nBG, axis=(0, 1), where=known_nBG), SLOTS)
        mean_G = jnp.where(count_G > 0, total_G / jnp.maximum(count_G, 1), 1.0)
        return jnp.where(known_nBG, history_nBG, mean_G)
    rounds, slots, _ = history_nBG.shape
    turn_nB = jnp.arange(rounds * slots).reshape(rounds, slots) % prior_BUG.shape[1]
    return jnp.where(known_nBG, history_nBG, prior_BUG[jnp.arange(slots), turn_nB])


def extend_survival(
    survival_Bg: Float[Array, "B g"], history_nBG: Float[Array, "n B G"]
) -> Float[Array, "B G"]:
    """Survival of whole blocks where fewer tokens were drafted.

    Beyond what was drafted it falls as it did before, in the mean over rounds and
    slots. Where nothing survived before it does not fall, so that whole blocks are
    tried again.
    """
    drafted = survival_Bg.shape[1]
    if drafted == history_nBG.shape[2]:
        return survival_Bg
    mean_G = total(jnp.mean(history_nBG, axis=(0, 1)), SLOTS) / size(SLOTS)
    least = 1e-6
    tail = mean_G[drafted:] / jnp.maximum(mean_G[drafted - 1], least)
    tail = jnp.where(mean_G[drafted - 1] > least, tail, 1.0)
    return jnp.concatenate([survival_Bg, survival_Bg[:, -1:] * tail], axis=1)
