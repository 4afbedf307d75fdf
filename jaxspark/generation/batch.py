"""Continuous batching: many requests through a few slots of one compiled loop.

A slot whose request ends is refilled while the others go on (Yu et al. 2022, "Orca").
The host only admits, collects and releases; what a step reads from the device are the
tokens that are new since the last one.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxspark.decoding import (
    Admission,
    DecodeOptions,
    DecodeState,
    Phase,
    Sampling,
    admit,
    decode,
    prefill,
    release,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.state import Counters
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.generation.completion import Completion, FinishReason
from jaxspark.generation.request import CheckedRequest, Limits, Request, check
from jaxspark.models import TargetModel
from jaxspark.parallel.mesh import readable, replicated, shard, slots_per_shard
from jaxspark.settings import standard_settings
from jaxspark.target import Target

# Most stop ids of a request, where a batch is made before its requests are known.
MAX_STOP_IDS = 8


@dataclass(frozen=True)
class Update:
    """What a step brought for one request.

    Attributes:
      index: the request.
      tokens: new output tokens.
      completion: all of it, once it has ended.
    """

    index: int
    tokens: list[int]
    completion: Completion | None = None


@dataclass
class _Running:
    """A request in a slot, and its output so far."""

    request: CheckedRequest
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class ContinuousBatch:
    """A decode state and the host's side of its slots.

    Requests are checked when they are submitted, wait until a slot is free, and report
    through the updates of `step`. The tokens of a request do not depend on those beside
    it, greedy or under the gumbel coupling; under rejection sampling their distribution
    does not.
    """

    @standard_settings()
    def __init__(
        self,
        target: Target | TargetModel,
        drafter: Drafter | None = None,
        *,
        slots: int,
        capacity: int,
        options: DecodeOptions = DecodeOptions(),
        max_stop_ids: int = MAX_STOP_IDS,
        log_probs: bool = False,
        together: int | None = None,
        rounds_per_step: int = 8,
    ):
        """Makes an empty state.

        Args:
          target: a loaded `Target`, or a bare model.
          drafter: what proposes; None decodes plainly.
          slots: requests decoded together.
          capacity: positions per slot; each request needs its prompt, its new tokens
            and the block length.
          options: how rounds draft, schedule and verify.
          max_stop_ids: most tokens that may end a request.
          log_probs: whether requests may ask for log-probabilities.
          together: requests prefilled together; None takes a quarter of the slots.
          rounds_per_step: most rounds between two looks at what has come.

        Raises:
          ValueError: options, drafter and target that do not go together.
        """
        self.target = Target.of(target)
        self.drafter = PlainDrafter() if drafter is None else drafter
        self.drafter.check_target(self.target.model.config)
        self._per_shard = slots_per_shard(slots)
        self.options = options.resolve(self.drafter, self._per_shard)
        if self.options.schedule.needs_costs:
            raise ValueError(
                f"the schedule {type(self.options.schedule).__name__} weighs costs and "
                "has none; give it those of jaxspark.calibration.measure_costs, or add "
                "them with jaxspark.calibration.with_measured_costs"
            )
        self.slots = slots
        self.together = max(1, slots // 4) if together is None else min(together, slots)
        self.rounds_per_step = rounds_per_step
        self.limits = Limits(
            capacity=capacity,
            block_length=self.options.block,
            min_drafts=self.options.max_min_drafts(self._per_shard),
            stop_ids=max_stop_ids,
            log_probs=log_probs,
        )
        self.target = replace(self.target, model=shard(self.target.model))
        self.drafter = shard(self.drafter)
        self._state = DecodeState.empty(
            self.target.model,
            self.drafter,
            slots=slots,
            capacity=capacity,
            block_length=self.options.block,
            stop_ids=max(1, max_stop_ids),
            log_probs=log_probs,
        )
        # The most that a slot can gain in one step.
        self._window = min(rounds_per_step * (self.options.block + 1), capacity)
        self._submitted = 0
        self._waiting: deque[CheckedRequest] = deque()
        self._running: dict[int, _Running] = {}
        self._cancelled: set[int] = set()

    @property
    def free(self) -> int:
        """Slots without a request."""
        return self.slots - len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._running

    def submit(self, request: Request) -> int:
        """Queues a request; returns its index, counted from 0.

        Raises:
          RequestError: it cannot be served. Its index is used up; others go on.
        """
        index = self._submitted
        self._submitted += 1
        self.enqueue(check(request, index, self.target, self.limits))
        return index

    def enqueue(self, request: CheckedRequest) -> None:
        """Queues a request that was checked against this batch's limits."""
        self._waiting.append(request)

    def cancel(self, index: int) -> None:
        """Ends a request at the next step, with what it has; ended ones stay as is."""
        self._cancelled.add(index)

    @standard_settings()
    def step(self) -> list[Update]:
        """Admits, prefills and decodes a few rounds; what came of them."""
        updates = self._drop_cancelled()
        self._admit()
        if not self._running:
            return updates
        # With others waiting, ended slots are refilled soon.
        max_finished = self.together if self._waiting else self.slots
        self._state = compiled(decode)(
            self.target.model,
            self.drafter,
            self._state,
            jnp.int32(self.rounds_per_step),
            jnp.int32(max_finished),
            options=self.options,
        )
        return updates + self._collect()

    def _admit(self) -> None:
        """Fills free slots, some at a time, so that they are prefilled together."""
        free = [slot for slot in range(self.slots) if slot not in self._running]
        # Shards in turn: their work is the same if they have equally many requests.
        free.sort(key=lambda slot: slot % self._per_shard)
        while self._waiting and len(free) >= min(self.together, len(self._waiting)):
            count = min(self.together, len(self._waiting))
            arrived = [self._waiting.popleft() for _ in range(count)]
            taken, free = free[:count], free[count:]
            self._running |= {
                slot: _Running(request) for slot, request in zip(taken, arrived)
            }
            # One shape for any number of newcomers: no slot has the last number.
            missing = self.together - count
            slots_N = jnp.array(taken + [self.slots] * missing, jnp.int32)
            padded = arrived + arrived[:1] * missing
            self._state = prefill(
                self.target.model,
                self.drafter,
                admit(self._state, slots_N, admission_of(padded, self._state)),
                chunk=prefill_chunk(len(request.ids) for request in arrived),
                together=self.together,
            )

    def _collect(self) -> list[Update]:
        """New tokens of every slot; releases those that are finished."""
        since_B = np.zeros((self.slots,), np.int32)
        for slot, each in self._running.items():
            since_B[slot] = len(each.request.ids) + len(each.tokens)
        phase_B, lengths_B, tokens_BW, log_probs_BW = jax.device_get(
            _newest(self._state, jnp.asarray(since_B), self._window)
        )
        arrived: dict[int, tuple[int, list[int]]] = {}
        for slot, each in self._running.items():
            gained = slice(int(lengths_B[slot] - since_B[slot]))
            arrived[slot] = each.request.index, tokens_BW[slot, gained].tolist()
            each.tokens += arrived[slot][1]
            each.log_probs += log_probs_BW[slot, gained].tolist()
        ended = [slot for slot in arrived if phase_B[slot] == Phase.FINISHED]
        completions = self._release(ended)
        return [
            Update(index, tokens, completions.get(slot))
            for slot, (index, tokens) in arrived.items()
            if tokens or slot in completions
        ]

    def _drop_cancelled(self) -> list[Update]:
        """Takes cancelled requests out of the queue and out of their slots."""
        nothing = Completion(tokens=[], text=None, finish_reason="cancelled")
        updates = [
            Update(request.index, [], nothing)
            for request in self._waiting
            if request.index in self._cancelled
        ]
        self._waiting = deque(
            request for request in self._waiting if request.index not in self._cancelled
        )
        slots = {
            slot: each.request.index
            for slot, each in self._running.items()
            if each.request.index in self._cancelled
        }
        self._cancelled.clear()
        completions = self._release(list(slots), reason="cancelled")
        return updates + [
            Update(slots[slot], [], completion)
            for slot, completion in completions.items()
        ]

    def _release(
        self, slots: Sequence[int], reason: FinishReason | None = None
    ) -> dict[int, Completion]:
        """Empties slots; what they hold, which tells its reason where none is given."""
        if not slots:
            return {}
        counters = jax.device_get(readable(self._state.counters))
        released_B = np.isin(np.arange(self.slots), slots)
        self._state = release(self._state, jnp.asarray(released_B))
        return {slot: self._completion(slot, counters, reason) for slot in slots}

    def _completion(
        self, slot: int, counters: Counters, reason: FinishReason | None
    ) -> Completion:
        """What a slot's request became; it no longer runs."""
        each, tokenizer = self._running.pop(slot), self.target.tokenizer
        tokens = each.tokens
        stopped = bool(tokens) and tokens[-1] in each.request.stop_ids
        shown = tokens[:-1] if stopped else tokens
        return Completion(
            tokens=tokens,
            text=tokenizer.decode(shown) if tokenizer else None,
            finish_reason=reason or ("stop" if stopped else "length"),
            log_probs=each.log_probs if each.request.params.log_probs else None,
            rounds=int(counters.rounds_B[slot]),
            drafted=int(counters.drafted_B[slot]),
            verified=int(counters.verified_B[slot]),
            reached=counters.reached_BG[slot].tolist(),
            accepted=counters.accepted_BG[slot].tolist(),
        )


def admission_of(requests: Sequence[CheckedRequest], state: DecodeState) -> Admission:
    """Requests in the form in which slots of `state` take them up."""
    params = [request.params for request in requests]
    return Admission.of(
        state,
        [request.ids for request in requests],
        [request.limit for request in requests],
        Sampling.of(
            len(requests),
            temperature=[each.temperature for each in params],
            top_k=[each.top_k for each in params],
            top_p=[each.top_p for each in params],
            min_p=[each.min_p for each in params],
            seed=[request.seed for request in requests],
        ),
        stop_ids=[request.stop_ids for request in requests],
        min_drafts=[request.min_drafts for request in requests],
        max_drafts=[request.max_drafts for request in requests],
    )


@partial(jax.jit, static_argnames=("window",))
def _newest(
    state: DecodeState, since_B: Int[Array, " B"], window: int
) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, "B W"], Float[Array, "B L"]]:
    """Phases, lengths, and from `since_B` on tokens and log-probabilities, if kept."""
    place_BW = since_B[:, None] + jnp.arange(window)
    tokens_BW, log_probs_BW = (
        jnp.take_along_axis(x_BS, place_BW, axis=1, mode="clip")
        if x_BS.shape[1]
        else jnp.zeros((state.slots, 0))
        for x_BS in (state.tokens_BS, state.log_probs_BS)
    )
    return replicated((state.phase_B, state.lengths_B, tokens_BW, log_probs_BW))


def prefill_chunk(lengths: Iterable[int]) -> int:
    """Tokens per slot and prefill pass for such prompts: a power of two, 16 to 128."""
    longest = max(lengths)
    return int(np.clip(2 ** np.ceil(np.log2(max(longest - 1, 1))), 16, 128))
