"""What real rounds said and did: confidences beside what was accepted.

The raw material of calibration and of the simulator. A draft is judged when all before
it were accepted and it was verified; behind a rejected draft nothing survives, behind
the last verified one nothing is known.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxspark.decoding import (
    DecodeOptions,
    DecodeState,
    admit,
    decode,
    prefill,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.options import check_block_length
from jaxspark.drafters import Drafter
from jaxspark.generation.generate import capacity_for
from jaxspark.generation.request import Limits, Request, check
from jaxspark.generation.slots import Running, admission_of, prefill_chunk
from jaxspark.target import Target

_TYPICAL = 16


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """N rounds of some requests, in the order they happened.

    Attributes:
      request_N: which request.
      confidence_NG: logits of P(draft j accepted | all before it accepted).
      certainty_NG: how decided draft j was, see `Drawn`.
      judged_N: drafts that were judged.
      accepted_N: drafts accepted, all those judged or one fewer.
    """

    request_N: Int[np.ndarray, " N"]
    confidence_NG: Float[np.ndarray, "N G"]
    certainty_NG: Float[np.ndarray, "N G"]
    judged_N: Int[np.ndarray, " N"]
    accepted_N: Int[np.ndarray, " N"]

    def survived(self) -> tuple[Bool[np.ndarray, "N G"], Bool[np.ndarray, "N G"]]:
        """Whether the first j + 1 drafts were all accepted, and whether that is known.

        Returns:
          survived_NG: the event that the survival probability forecasts.
          known_NG: False for drafts behind the last verified one.
        """
        draft_G = np.arange(self.confidence_NG.shape[1])
        survived_NG = draft_G < self.accepted_N[:, None]
        rejected_N = self.accepted_N < self.judged_N
        return survived_NG, rejected_N[:, None] | (draft_G < self.judged_N[:, None])

    def save(self, path: str | Path) -> None:
        """Writes a NumPy archive."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Rounds":
        """Reads one.

        Raises:
          ValueError: it is no such archive.
        """
        try:
            with np.load(path) as arrays:
                return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})
        except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: holds no recorded rounds ({error})") from error

    def __len__(self) -> int:
        return len(self.request_N)


def typical_blocks(survival_NG: Float[np.ndarray, "N G"]) -> Float[np.ndarray, "U G"]:
    """Sixteen blocks that stand for many: means of those about equally good.

    Ordered so that any few consecutive blocks are representative.
    """
    order_N = np.argsort(survival_NG.sum(axis=1), kind="stable")
    # Of fewer than sixteen some stand twice.
    order_N = np.repeat(order_N, -(-_TYPICAL // len(order_N)))
    groups = np.array_split(order_N, _TYPICAL)
    stride = np.arange(_TYPICAL) * 7 % _TYPICAL
    return np.stack([survival_NG[groups[place]].mean(axis=0) for place in stride])


def record_rounds(
    target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    block_length: int | None = None,
    temperature: float = 1.0,
    coupling: Coupling = "rejection",
    slots: int = 16,
    seed: int = 0,
    on_group: Callable[[int], None] = lambda prompts: None,
) -> Rounds:
    """Decodes prompts, verifying every draft, and records each round.

    Args:
      target: a loaded `Target`, or a bare model.
      drafter: its confidences are recorded.
      prompts: token ids.
      max_new_tokens: output budget of each.
      block_length: drafts per round; None takes the drafter's most.
      temperature: of sampling.
      coupling: "rejection" or "gumbel".
      slots: prompts decoded together.
      seed: of sampling.
      on_group: called with the number of prompts done after every group.

    Raises:
      ValueError: a prompt that is malformed or exceeds the target's positions.
    """
    target = Target.of(target)
    model = target.model
    block_length = check_block_length(drafter, block_length)
    limits = Limits(block_length=block_length)
    requests = [
        Request(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=(seed + index) % 2**32,
        )
        for index, prompt in enumerate(prompts)
    ]
    checked = [
        check(each, index, target, limits) for index, each in enumerate(requests)
    ]
    full = slots * (block_length + 1)
    options = DecodeOptions(
        block_length=block_length,
        coupling=coupling,
        # Rounds in which some requests have ended are smaller.
        buckets=tuple(sorted({-(-full * part // 4) for part in (1, 2, 3, 4)})),
    )
    capacity = capacity_for(prompts, max_new_tokens, block_length)
    rows: list[tuple] = []
    for first in range(0, len(prompts), slots):
        group = checked[first : first + slots]
        state = DecodeState.empty(
            model,
            drafter,
            slots=slots,
            capacity=capacity,
            block_length=block_length,
            stop_ids=max(1, len(target.stop_ids)),
        )
        admission = admission_of([Running(request) for request in group], state)
        state = admit(state, jnp.arange(len(group)), admission)
        chunk = prefill_chunk(len(request.ids) for request in group)
        state = prefill(model, drafter, state, chunk=chunk)
        while np.any(state.live_B):
            before = jax.device_get(state.counters)
            state = compiled(decode)(
                model, drafter, state, jnp.int32(1), options=options
            )
            after, confidence_BG, certainty_BG = jax.device_get(
                (state.counters, state.confidence_BG, state.certainty_BG)
            )
            judged_B = (after.reached_BG - before.reached_BG).sum(axis=1)
            accepted_B = (after.accepted_BG - before.accepted_BG).sum(axis=1)
            # Rounds cut short near a limit would count rejections only.
            verified_B = after.verified_B - before.verified_B
            keep = np.flatnonzero(verified_B == block_length)
            seen = (confidence_BG, certainty_BG, judged_B, accepted_B)
            rows.append((first + keep, *(each[keep] for each in seen)))
        on_group(first + len(group))
    columns = [np.concatenate(column) for column in zip(*rows)]
    return Rounds(**dict(zip(Rounds.__dataclass_fields__, columns)))
