"""Continuous batching: many requests through a few slots of one compiled loop.

A slot whose request ends is refilled while the others go on (Yu et al. 2022, "Orca").
Newcomers are prefilled in a small state of their own, whose slots are then written into
the large one: every leaf of a `DecodeState` has the slot axis first, but for tables of
`Rows`, which know their own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.generate import (
    Completion,
    as_model,
    check_block_length,
    check_floors,
    check_ids,
    check_length,
    check_prompt,
    completions,
    costed,
    decode_rounds,
    default_buckets,
    is_whole,
    prefill_chunk,
    round_capacity,
    spread_seed,
)
from jaxspark.decoding.round import DecodeOptions, prefill
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.state import DecodeState, init_state
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.models.rows import Rows
from jaxspark.settings import standard_settings


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how it is continued; see `generate` for the parameters.

    Without a seed it gets one from its place among the requests; under rejection
    sampling with a schedule, seeds that are given should differ. `name` is for reports.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: Sequence[int] | None = None
    draft_floor: int = 0
    draft_cap: int | None = None
    name: str = ""


def generate_stream(
    target,
    requests: Iterable[Request],
    drafter: Drafter | None = None,
    *,
    slots: int,
    capacity: int,
    block_length: int | None = None,
    coupling: Coupling = "rejection",
    schedule: Scheduler = Fixed(),
    calibration: Calibration | None = None,
    buckets: tuple[int, ...] | None = None,
    rounds_per_call: int = 8,
    newcomers: int | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yields (request index, completion) as requests end, in no fixed order.

    The tokens of a request do not depend on the requests beside it, greedy or under the
    gumbel coupling; under rejection sampling their distribution does not.

    Args:
      target: a loaded `Target`, or a bare model.
      requests: read one by one as slots become free.
      drafter: what proposes; None decodes plainly.
      slots: requests decoded together.
      capacity: positions per slot; each request needs its prompt, its new tokens and
        the block length.
      block_length: drafts per round; None takes the drafter's most.
      coupling: "rejection" or "gumbel".
      schedule: chooses how much is drafted and what is verified.
      calibration: of the drafter's confidences.
      buckets: token counts to compile the target for, see `DecodeOptions`.
      rounds_per_call: rounds between looks at who is done.
      newcomers: requests prefilled together, a quarter of the slots by default.

    Raises:
      ValueError: a request that is malformed or does not fit; names its index.
    """
    drafter = PlainDrafter() if drafter is None else drafter
    model = as_model(target)
    drafter.check_target(model.config)
    block_length = check_block_length(drafter, block_length)
    options = DecodeOptions(
        block_length=block_length,
        coupling=coupling,
        schedule=schedule,
        calibration=calibration,
        buckets=default_buckets(drafter, slots, block_length, buckets, schedule),
    )
    options.check(slots)
    options = costed(options, model, drafter, slots=slots, capacity=capacity)
    group = max(1, slots // 4) if newcomers is None else min(newcomers, slots)
    check_ids(model, "the target's stop_ids", getattr(target, "stop_ids", ()))
    make = _StateMaker(target, model, drafter, block_length, capacity)
    waiting = enumerate(requests)
    # A request that does nothing fills empty slots; its slot is done from the start.
    idle = Request(prompt=(0,), max_new_tokens=0, seed=0)
    state = make([idle] * slots)
    running: dict[int, tuple[int, Request]] = {}
    while True:
        free = [slot for slot in range(slots) if slot not in running]
        while free and (len(free) >= group or not running):
            arrived = list(islice(waiting, min(group, len(free))))
            if not arrived:
                break
            for index, request in arrived:
                make.check(index, request)
            arrived = [(index, _seeded(index, request)) for index, request in arrived]
            for index, request in arrived:
                # Whoever is beside it: as if all slots asked for as much.
                try:
                    check_floors(options, [request.draft_floor] * slots)
                except ValueError as error:
                    raise ValueError(f"request {index}: {error}") from error
            places, free = free[: len(arrived)], free[len(arrived) :]
            running |= dict(zip(places, arrived))
            padding = group - len(arrived)
            fresh = make([request for _, request in arrived] + [idle] * padding)
            longest = [request.prompt for _, request in arrived]
            fresh = prefill(model, drafter, fresh, chunk=prefill_chunk(longest))
            state = _insert(state, fresh, np.array(places + [slots] * padding))
        if not running:
            return
        state = decode_rounds(model, drafter, state, rounds_per_call, options)
        done_B = jax.device_get(state.done_B)
        ended = {slot: each for slot, each in running.items() if done_B[slot]}
        prompts = {slot: request.prompt for slot, (_, request) in ended.items()}
        for slot, completion in completions(target, state, prompts).items():
            yield running.pop(slot)[0], completion


@standard_settings()
@partial(jax.jit, donate_argnames=("state",))
def _insert(
    state: DecodeState, fresh: DecodeState, slots_N: Int[Array, " N"]
) -> DecodeState:
    """Writes the slots of `fresh` into `state`; numbers past its end are skipped."""

    def merge(old, new):
        if isinstance(old, Rows):
            return old.with_slots(slots_N, new)
        return old.at[slots_N].set(new, mode="drop")

    # What rounds were like remains known, if the new request has the old one's sampling
    # temperature; how long so many were not drafted is known of all slots together.
    alike_N = state.sampling.temperature[slots_N] == fresh.sampling.temperature
    past_NnG = state.schedule.past_BnG[slots_N]
    past_NnG = jnp.where(alike_N[:, None, None], past_NnG, -1.0)
    idle_BG = jnp.broadcast_to(
        jnp.max(state.schedule.idle_BG, axis=0), state.schedule.idle_BG.shape
    )
    arrived = replace(fresh.schedule, past_BnG=past_NnG)
    merged = jax.tree.map(
        merge,
        state,
        replace(fresh, schedule=arrived),
        is_leaf=lambda node: isinstance(node, Rows),
    )
    return replace(merged, schedule=replace(merged.schedule, idle_BG=idle_BG))


@dataclass(frozen=True)
class _StateMaker:
    """Checks requests and makes states of them that all have the same shapes."""

    target: object
    model: object
    drafter: Drafter
    block_length: int
    capacity: int

    def check(self, index: int, request: Request) -> None:
        """Raises `ValueError` if the request is malformed or does not fit."""
        check_prompt(self.model, index, request.prompt)
        budget, name = request.max_new_tokens, f"request {index}"
        if not is_whole(budget) or budget < 1:
            raise ValueError(
                f"{name}: max_new_tokens must be a whole positive number, got {budget}"
            )
        check_length(self.model, name, len(request.prompt), budget)
        if request.stop_ids is not None:
            check_ids(self.model, f"{name}: stop_ids", request.stop_ids)
        cap = self.block_length if request.draft_cap is None else request.draft_cap
        whole = is_whole(request.draft_floor) and is_whole(cap)
        if not whole or not 0 <= request.draft_floor <= cap <= self.block_length:
            raise ValueError(
                f"request {index}: drafts verified must satisfy 0 <= floor <= cap <= "
                f"{self.block_length}, got floor {request.draft_floor} and cap "
                f"{request.draft_cap}"
            )
        needed = len(request.prompt) + request.max_new_tokens + self.block_length
        if needed > self.capacity:
            raise ValueError(
                f"request {index} needs {needed} positions ({len(request.prompt)} of "
                f"its prompt, {request.max_new_tokens} new, a block of "
                f"{self.block_length}), each slot has {self.capacity}"
            )

    def __call__(self, requests: Sequence[Request]) -> DecodeState:
        def column(name):
            return [getattr(request, name) for request in requests]

        stops = getattr(self.target, "stop_ids", ())
        return init_state(
            self.model,
            self.drafter,
            column("prompt"),
            [len(r.prompt) + r.max_new_tokens for r in requests],
            Sampling.of(
                len(requests),
                **{
                    name: column(name)
                    for name in ("temperature", "top_k", "top_p", "min_p", "seed")
                },
            ),
            block_length=self.block_length,
            # One width for all states: padded with an id that no token has.
            stop_ids=[_padded(stops if s is None else s) for s in column("stop_ids")],
            capacity=self.capacity,
            draft_floor=column("draft_floor"),
            draft_cap=[
                self.block_length if cap is None else cap for cap in column("draft_cap")
            ],
        )


def _seeded(index: int, request: Request) -> Request:
    """The request with random numbers of its own, those `generate` gives by default."""
    if request.seed is not None:
        return request
    return replace(request, seed=int(spread_seed(0, index)))


def _padded(stop_ids: Sequence[int]) -> list[int]:
    if len(stop_ids) > MOST_STOP_IDS:
        raise ValueError(
            f"{len(stop_ids)} stop ids, at most {MOST_STOP_IDS} are supported here"
        )
    return list(stop_ids) + [-1] * (MOST_STOP_IDS - len(stop_ids))


MOST_STOP_IDS = 8


def capacity_for(prompts: Iterable[Sequence[int]], new_tokens: int, block: int) -> int:
    """Positions that hold any of `prompts` and its output, rounded up."""
    return round_capacity(max(map(len, prompts)) + new_tokens + block)
