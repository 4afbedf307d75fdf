"""The state of many requests being decoded together, a pytree on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.settings import standard_settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counters:
    """What happened so far, per slot.

    Attributes:
      rounds_B: rounds the slot took part in.
      reached_BG: rounds in which draft j was verified and all before it accepted.
      accepted_BG: rounds in which draft j was accepted.
      drafted_B: rounds for which it was drafted.
      verified_B: drafts verified.
    """

    rounds_B: Int[Array, " B"]
    reached_BG: Int[Array, "B G"]
    accepted_BG: Int[Array, "B G"]
    drafted_B: Int[Array, " B"]
    verified_B: Int[Array, " B"]

    @classmethod
    def zeros(cls, slots: int, block_length: int) -> "Counters":
        """Nothing counted yet."""
        one, each = (slots,), (slots, block_length)
        return cls(
            *(jnp.zeros(shape, jnp.int32) for shape in (one, each, each, one, one))
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything `decode_round` reads and writes.

    The last committed token of a slot is its anchor, at position lengths_B - 1: chosen,
    not yet processed. Target cache rows below that position are valid; rows at or past
    it are garbage.

    Attributes:
      tokens_BS: prompt and output of each slot; garbage past its length.
      lengths_B: committed tokens.
      limits_B: length at which a slot stops.
      done_B: whether a slot is finished (or empty).
      stop_ids_BX: tokens that end a slot, padded with -1.
      sampling: per-slot sampling parameters.
      target_cache: the target's position-indexed caches.
      draft_cache: the drafter's.
      confidence_BG: confidence logits of the last round that drafted.
      sharpness_BG: how decided its drafts were, see `Draw`.
      schedule: what scheduling remembers.
      log_probs_BS: log-probabilities of output tokens; [B, 0] unless asked for.
      counters: statistics.
    """

    tokens_BS: Int[Array, "B S"]
    lengths_B: Int[Array, " B"]
    limits_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    stop_ids_BX: Int[Array, "B X"]
    sampling: Sampling
    target_cache: Any
    draft_cache: Any
    confidence_BG: Float[Array, "B G"]
    sharpness_BG: Float[Array, "B G"]
    schedule: ScheduleState
    log_probs_BS: Float[Array, "B S"]
    counters: Counters


@standard_settings()
def init_state(
    target,
    drafter,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    *,
    block_length: int,
    stop_ids: Sequence[Sequence[int]] | None = None,
    capacity: int | None = None,
    log_probs: bool = False,
    draft_floor: int | Sequence[int] = 0,
    draft_cap: int | Sequence[int] | None = None,
) -> DecodeState:
    """A state whose slots hold `prompts`, not yet processed (see `prefill`).

    Args:
      target: the model (`Target.model` of a loaded one), for its cache.
      drafter: for its cache.
      prompts: token ids per slot, at least one each.
      limits: total length (prompt and output) at which each slot stops.
      sampling: parameters of `len(prompts)` slots.
      block_length: most drafts per round.
      stop_ids: per slot, tokens that end it.
      capacity: S; at least the largest limit plus `block_length`, which is the default.
      log_probs: whether to keep log-probabilities.
      draft_floor: drafts verified in every round that drafts, for all or per slot.
      draft_cap: most drafts verified in a round; None: all.

    Raises:
      ValueError: ids that are no integers, an empty prompt, one that its limit or the
        capacity cannot hold, more drafts per round than the target's caches can forget,
        or not one limit, stop list and sampling parameter per prompt.
    """
    slots = len(prompts)
    stop_ids = [()] * slots if stop_ids is None else stop_ids
    counts = {
        "limits": len(limits),
        "sampling": len(sampling.seed),
        "stop_ids": len(stop_ids),
    }
    for name, count in counts.items():
        if not slots or count != slots:
            raise ValueError(f"{slots} prompts, but {name} for {count}; give one each")
    most = getattr(target, "max_rewind", block_length)
    if block_length > most:
        raise ValueError(
            f"block length {block_length}: this target's caches can forget at most "
            f"{most} rejected drafts"
        )
    needed = int(_whole("limits", limits).max()) + block_length
    capacity = needed if capacity is None else capacity
    if capacity < needed:
        raise ValueError(
            f"a capacity of {capacity} positions cannot hold {max(limits)} tokens and "
            f"a block of {block_length}; it must be at least {needed}"
        )
    tokens_BS = np.zeros((slots, capacity), np.int32)
    for slot, (prompt, limit) in enumerate(zip(prompts, limits)):
        if not len(prompt):
            raise ValueError(f"prompt {slot} is empty; give at least one token")
        if len(prompt) > limit:
            raise ValueError(
                f"prompt {slot} has {len(prompt)} tokens, more than its limit {limit}"
            )
        tokens_BS[slot, : len(prompt)] = _whole(f"prompt {slot}", prompt)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    limits_B = np.array(limits, np.int32)
    stop_ids_BX = np.full((slots, max(1, *map(len, stop_ids))), -1, np.int32)
    for slot, ids in enumerate(stop_ids):
        stop_ids_BX[slot, : len(ids)] = _whole("stop_ids", ids)
    return DecodeState(
        tokens_BS=jnp.asarray(tokens_BS),
        lengths_B=jnp.asarray(lengths_B),
        limits_B=jnp.asarray(limits_B),
        done_B=jnp.asarray(lengths_B >= limits_B),
        stop_ids_BX=jnp.asarray(stop_ids_BX),
        # The state is donated when it is decoded; the caller keeps what it gave.
        sampling=jax.tree.map(jnp.array, sampling),
        target_cache=target.init_cache(slots, capacity),
        draft_cache=drafter.init_cache(slots, capacity),
        confidence_BG=jnp.zeros((slots, block_length), jnp.float32),
        sharpness_BG=jnp.zeros((slots, block_length), jnp.float32),
        schedule=ScheduleState.start(
            slots, block_length, floor=draft_floor, cap=draft_cap
        ),
        log_probs_BS=jnp.zeros((slots, capacity if log_probs else 0), jnp.float32),
        counters=Counters.zeros(slots, block_length),
    )


def _whole(name: str, values: Sequence[int]) -> np.ndarray:
    """The values as an array; NumPy would cut what is no integer without a word."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, got {array.tolist()}")
    return array
