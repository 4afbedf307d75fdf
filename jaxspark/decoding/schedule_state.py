"""What scheduling remembers between rounds: how likely drafts were to survive.

Decisions rest on the mean over all that is remembered. One block says little of the
next, and of a mean over few blocks the luckiest choice looks best.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.outlook import Outlook
from jaxspark.decoding.schedule import Scheduler


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScheduleState:
    """What scheduling knows of each slot.

    Attributes:
      floor_B: drafts that are verified in every round that drafts.
      cap_B: most drafts that are.
      past_BnG: survival in its last rounds that drafted, the newest first; guessed for
        what they did not draft, -1 for rounds before the first. A request that takes a
        slot over begins with the memory of the one before it, if both have the same
        sampling temperature.
      seen_B: whether its request has had such a round.
      idle_BG: rounds since that many drafts were last proposed.
    """

    floor_B: Int[Array, " B"]
    cap_B: Int[Array, " B"]
    past_BnG: Float[Array, "B n G"]
    seen_B: Bool[Array, " B"]
    idle_BG: Int[Array, "B G"]

    @classmethod
    def start(
        cls, slots: int, block_length: int, *, floor=0, cap=None
    ) -> "ScheduleState":
        """No history; floor and cap for all slots, or one for each.

        Raises:
          ValueError: they are not 0 <= floor <= cap <= block_length.
        """
        cap = block_length if cap is None else cap
        bounds = {"draft_floor": np.asarray(floor), "draft_cap": np.asarray(cap)}
        for name, bound in bounds.items():
            whole = np.issubdtype(bound.dtype, np.integer)
            if not whole or bound.shape not in ((), (slots,)):
                raise ValueError(
                    f"{name} must be a whole number or {slots} of them (one per "
                    f"prompt), got {bound.tolist()}"
                )
        floor_B, cap_B = (np.broadcast_to(x, (slots,)) for x in bounds.values())
        if np.any((floor_B < 0) | (floor_B > cap_B) | (cap_B > block_length)):
            raise ValueError(
                "drafts verified must satisfy 0 <= floor <= cap <= "
                f"{block_length}, got floor {floor} and cap {cap}"
            )
        return cls(
            floor_B=jnp.array(floor_B, jnp.int32),
            cap_B=jnp.array(cap_B, jnp.int32),
            # A type given by name: a weak one would have `decode` compiled twice.
            past_BnG=jnp.full(
                (slots, remembered(slots), block_length), -1.0, jnp.float32
            ),
            seen_B=jnp.zeros((slots,), bool),
            idle_BG=jnp.zeros((slots, block_length), jnp.int32),
        )

    def outlook(
        self,
        survival_BG: Float[Array, "*n B G"],
        *,
        live_B: Bool[Array, " B"],
        room_B: Int[Array, " B"] | None = None,
    ) -> Outlook:
        """Survival beside what may be verified: no more than the cap and the room."""
        most_B = self.cap_B if room_B is None else jnp.minimum(self.cap_B, room_B)
        return Outlook.of(
            survival_BG, floor_B=self.floor_B, most_B=most_B, live_B=live_B
        )

    def earlier(
        self, schedule: Scheduler, usual_BUG: Float[Array, "B U G"] | None
    ) -> Float[Array, "n B G"]:
        """Survival of the earlier rounds that a schedule may look at, see `recall`."""
        past_nBG = jnp.moveaxis(self.past_BnG, 1, 0)
        return recall(past_nBG, usual_BUG)[schedule.lag - 1 :]

    def lengths(
        self, schedule: Scheduler, now: Outlook, earlier: Outlook, largest: int
    ) -> Int[Array, " B"]:
        """Verification lengths that a schedule chooses.

        Args:
          schedule: chooses.
          now: with the survival of this round's drafts.
          earlier: with that of whole blocks in earlier rounds; taken as 1 for new
            requests.
          largest: tokens that a round may verify in all.
        """
        survival_nBG = jnp.where(self.seen_B[:, None], earlier.survival_BG, 1.0)
        earlier = replace(earlier, survival_BG=survival_nBG)
        earlier = earlier.first(now.survival_BG.shape[1])
        return now.within(schedule(now, earlier), largest)

    def after_drafts(
        self,
        survival_Bg: Float[Array, "B g"],
        earlier_nBG: Float[Array, "n B G"],
        live_B: Bool[Array, " B"],
    ) -> "ScheduleState":
        """What is remembered after a round that drafted g tokens for live slots."""
        newest_BG = extend_survival(survival_Bg, earlier_nBG)
        past_BnG = jnp.concatenate([newest_BG[:, None], self.past_BnG[:, :-1]], axis=1)
        return replace(
            self,
            past_BnG=jnp.where(live_B[:, None, None], past_BnG, self.past_BnG),
            seen_B=self.seen_B | live_B,
            idle_BG=(self.idle_BG + 1).at[:, : survival_Bg.shape[1]].set(0),
        )

    def after_none(self) -> "ScheduleState":
        """What is remembered after a round that drafted nothing."""
        return replace(self, idle_BG=self.idle_BG + 1)


def remembered(slots: int) -> int:
    """Rounds of survival that a state of so many slots remembers.

    Recorded rounds of one slot, replayed against measured costs, lost a tenth of their
    speed to noise with a memory of 8 rounds, and nothing with 32.
    """
    return max(8, -(-64 // slots))


def recall(
    past_nBG: Float[Array, "n B G"], usual_BUG: Float[Array, "B U G"] | None
) -> Float[Array, "n B G"]:
    """Survival of earlier rounds, those included that were not played yet.

    Args:
      past_nBG: of those that were; below 0 for others.
      usual_BUG: blocks to expect of these, in turns: a mean would say nothing of what
        choosing the likeliest drafts gains. None takes the mean of the rounds that were
        played, and 1 if there were none.
    """
    known_nBG = past_nBG >= 0
    if usual_BUG is None:
        count_G = jnp.sum(known_nBG, axis=(0, 1))
        total_G = jnp.sum(past_nBG, axis=(0, 1), where=known_nBG)
        mean_G = jnp.where(count_G > 0, total_G / jnp.maximum(count_G, 1), 1.0)
        return jnp.where(known_nBG, past_nBG, mean_G)
    rounds, slots, _ = past_nBG.shape
    turn_nB = jnp.arange(rounds * slots).reshape(rounds, slots) % usual_BUG.shape[1]
    return jnp.where(known_nBG, past_nBG, usual_BUG[jnp.arange(slots), turn_nB])


def extend_survival(
    survival_Bg: Float[Array, "B g"], past_nBG: Float[Array, "n B G"]
) -> Float[Array, "B G"]:
    """Survival of whole blocks where fewer tokens were drafted.

    The rest falls as it did before, in the mean over rounds and slots; it does not fall
    where nothing survived, which has whole blocks tried.
    """
    drafted = survival_Bg.shape[1]
    if drafted == past_nBG.shape[2]:
        return survival_Bg
    mean_G = jnp.mean(past_nBG, axis=(0, 1))
    least = 1e-6
    tail = mean_G[drafted:] / jnp.maximum(mean_G[drafted - 1], least)
    tail = jnp.where(mean_G[drafted - 1] > least, tail, 1.0)
    return jnp.concatenate([survival_Bg, survival_Bg[:, -1:] * tail], axis=1)
