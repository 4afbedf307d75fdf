"""Batches that are prefilled once and decoded repeatedly, by contestants in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import (
    DecodeOptions,
    DecodeState,
    Sampling,
    decode,
    init_state,
    prefill,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.decoding.state import Counters
from jaxspark.drafters import Drafter


class PrefilledBatch:
    """Requests that are prefilled once and decoded from there every time.

    All ways of decoding share the caches: rows past a request's length are never read,
    and drafters that do not look at a context have none.
    """

    def __init__(
        self,
        model,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        *,
        rounds: int,
        capacity: int,
        temperature: float,
    ):
        """Prefills the prompts.

        Args:
          model: the target.
          drafter: whose context is kept.
          prompts: token ids, one slot each.
          rounds: of each run.
          capacity: cache positions of each slot.
          temperature: of sampling.
        """
        # No request ends: it goes on past its answer, with room for every draft.
        room = (rounds + 1) * (drafter.block_length + 1)
        limits = [len(p) + room for p in prompts]
        state = init_state(
            model,
            drafter,
            prompts,
            limits,
            Sampling.of(len(prompts), temperature=temperature),
            block_length=drafter.block_length,
            capacity=capacity,
        )
        self.model, self.drafter = model, drafter
        self.rounds, self.capacity, self.temperature = rounds, capacity, temperature
        self.state = prefill(model, drafter, state, chunk=64)
        self.lengths_B = np.array(self.state.lengths_B)

    def start(self, contestant: "Contestant", run: int) -> DecodeState:
        """The state after prefill, with random numbers of this run."""
        slots, block_length = len(self.lengths_B), contestant.options.block
        schedule, estimator = contestant.schedule, contestant.options.estimator
        self.context = self.state.draft_cache
        draft_cache = self.context
        if contestant.drafter is not self.drafter:
            draft_cache = contestant.drafter.init_cache(slots, self.capacity)
        return replace(
            self.state.rewind(jnp.array(self.lengths_B)),
            sampling=Sampling.of(
                slots,
                temperature=self.temperature,
                seed=1000 * run + np.arange(slots),
            ),
            draft_cache=draft_cache,
            confidence_BG=jnp.zeros((slots, block_length)),
            certainty_BG=jnp.zeros((slots, block_length)),
            counters=Counters.zeros(slots, block_length),
            schedule=schedule or ScheduleState.empty(slots, block_length),
            estimator=estimator and estimator.empty(slots, block_length),
        )

    def finish(self, state: DecodeState) -> None:
        """Takes the caches back."""
        self.state = replace(state, draft_cache=state.draft_cache or self.context)


@dataclass
class Contestant:
    """One way to decode batches, run again and again.

    Attributes:
      drafter, options: the way.
      runs: what `run` returns, of all batches together, one by one.
      schedule: what scheduling remembers from run to run, as in a server.
    """

    drafter: Drafter
    options: DecodeOptions
    runs: list[np.ndarray] = field(default_factory=list)
    schedule: ScheduleState | None = None

    def run(self, batch: PrefilledBatch, run: int) -> np.ndarray:
        """Decodes the batch's rounds once.

        Returns:
          Tokens, seconds, verified drafts and rounds of all slots together.
        """
        state = jax.block_until_ready(batch.start(self, run))
        # One call for all rounds, as what a call itself takes weighs where they are
        # short.
        rounds = jnp.int32(batch.rounds)
        begin = time.perf_counter()
        state = compiled(decode)(
            batch.model, self.drafter, state, rounds, options=self.options
        )
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        self.schedule = jax.tree.map(jnp.copy, state.schedule)
        gained = np.sum(np.array(state.lengths_B) - batch.lengths_B)
        counters = state.counters
        verified, rounds = counters.verified_B.sum(), counters.rounds_B.sum()
        batch.finish(state)
        return np.array([gained, seconds, int(verified), int(rounds)])

    def warm_up(self, batch: PrefilledBatch) -> None:
        """Runs once what the schedule may choose: on CPUs a first time takes longer.

        What it must verify, may at most and has not tried for long leave no choice.
        """
        costs, slots = self.options.schedule.costs, len(batch.lengths_B)
        for curve in costs.curves if costs else ():
            length = curve.draft_length
            for size in curve.sizes:
                forced_B = np.clip(size - slots - length * np.arange(slots), 0, length)
                state = batch.start(self, 0)
                due = 10**6 if length else 0
                schedule = replace(
                    state.schedule,
                    min_drafts_B=jnp.array(forced_B, jnp.int32),
                    max_drafts_B=jnp.array(forced_B, jnp.int32),
                    rounds_since_BG=state.schedule.rounds_since_BG.at[
                        :, length - 1
                    ].set(due),
                )
                state = replace(state, schedule=schedule)
                state = compiled(decode)(
                    batch.model, self.drafter, state, jnp.int32(1), options=self.options
                )
                batch.finish(state)

    def figures(self) -> dict[str, float]:
        """The median rate of the runs but the first, which compiled; means."""
        tokens, seconds, verified, rounds = np.array(self.runs[1:]).T
        return {
            "tokens_per_second": float(np.median(tokens / seconds)),
            "verified_tokens_per_slot": 1 + float(verified.sum() / rounds.sum()),
            "accepted_length": float(tokens.sum() / rounds.sum()),
        }
