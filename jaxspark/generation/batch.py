"""Continuous batching: many requests through a few slots of one compiled loop.

A slot whose request ends is refilled while the others go on (Yu et al. 2022, "Orca").
The host only admits, collects and releases; what a step reads from the device are the
tokens that are new since the last one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import (
    AdjustmentLimits,
    DecodeOptions,
    DecodeState,
    LikeliestLimits,
    admit,
    decode,
    prefill,
    release,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.estimator import EstimatorState
from jaxspark.decoding.flattened import flattened
from jaxspark.decoding.rehearsal import lead
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.generation.completion import Completion, FinishReason
from jaxspark.generation.grammar_rounds import grammar_rounds, masked_round
from jaxspark.generation.request import (
    UNLIMITED,
    CheckedRequest,
    Limits,
    Request,
    check,
)
from jaxspark.generation.seats import Seats
from jaxspark.generation.slot_pages import SlotPages
from jaxspark.generation.slots import Running, admission_of, prefill_chunk
from jaxspark.generation.updates import Update, collect, completion_of
from jaxspark.models import TargetModel
from jaxspark.parallel.mesh import put, readable, shard, slot_shards, slots_per_shard
from jaxspark.parallel.rows import row_sharding
from jaxspark.settings import standard_settings
from jaxspark.target import Target

# Most stop ids of a request, where a batch is made before its requests are known.
MAX_STOP_IDS = 8


def _check_pages(pages: SlotPages, chunk: int | None) -> None:
    """Raises `ValueError` for pages that are not those of a batch."""
    if chunk != pages.chunk:
        raise ValueError(
            f"pages are shared at multiples of {pages.chunk} tokens, prompts are read "
            f"by {chunk}; give both the same chunk"
        )
    if pages.shards != slot_shards():
        raise ValueError(
            f"pages are for {pages.shards} shards of slots, the mesh in use has "
            f"{slot_shards()}"
        )


class ContinuousBatch:
    """A decode state and the host's side of its slots.

    Requests are checked when they are submitted, wait until a slot is free, and report
    through the updates of `step`. The tokens of a request do not depend on those beside
    it, greedy or under the gumbel coupling; under rejection sampling their distribution
    does not.

    Attributes:
      tokens_read: of prompts, and of outputs that were preempted.
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
        accepted: bool = False,
        adjustments: AdjustmentLimits = AdjustmentLimits(),
        top_log_probs: int = 0,
        prompt_log_probs: bool = False,
        grammars: bool = True,
        together: int | None = None,
        chunk: int | None = None,
        rounds_per_step: int = 8,
        pages: SlotPages | None = None,
        retimed: bool = False,
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
          accepted: whether updates say which tokens are accepted drafts.
          adjustments: what requests may do to logits.
          top_log_probs: most likely tokens that they may ask for beside each.
          prompt_log_probs: whether they may ask for those of prompts.
          grammars: whether outputs may be under grammars.
          together: requests of a shard of slots that are prefilled together; None
            takes a quarter of all slots.
          chunk: most tokens of each of them that a step reads, so that prompts delay no
            step for longer; None reads them whole.
          rounds_per_step: most rounds between two looks at what has come.
          pages: hands out pages, of which there may be fewer than all slots could
            use: then the youngest requests wait for others. None gives every slot rows
            for its whole capacity.
          retimed: whether what its schedule knows of costs is replaced later, see
            `retime`.

        Raises:
          ValueError: options, drafter and target that do not go together.
        """
        self.target = Target.of(target)
        self.drafter = PlainDrafter() if drafter is None else drafter
        self.drafter.check_target(self.target.model.config)
        per_shard = slots_per_shard(slots)
        self.options = options.resolve(self.drafter, per_shard)
        if self.options.schedule.needs_costs:
            raise ValueError(
                f"the schedule {type(self.options.schedule).__name__} weighs costs and "
                "has none; give it those of jaxspark.calibration.measure_costs, or add "
                "them with jaxspark.calibration.with_measured_costs"
            )
        costs = self.options.schedule.costs
        if pages is not None:
            _check_pages(pages, chunk)
        self.slots = slots
        self.together = max(1, slots // 4) if together is None else min(together, slots)
        self.chunk = chunk
        self.rounds_per_step = rounds_per_step
        self.limits = Limits(
            capacity=capacity,
            block_length=self.options.block,
            min_drafts=self.options.max_min_drafts(per_shard),
            stop_ids=max_stop_ids,
            log_probs=log_probs,
            top_log_probs=top_log_probs,
            prompt_log_probs=prompt_log_probs,
            adjustments=adjustments,
            pages=UNLIMITED if pages is None else pages.pages - 1,
            grammars=grammars,
        )
        # The most that a slot can gain in one step.
        self._window = min(rounds_per_step * (self.options.block + 1), capacity)
        read = capacity if chunk is None else chunk
        self.target = replace(self.target, model=shard(self.target.model))
        self.drafter = shard(self.drafter)
        self._models = flattened(self.target.model), flattened(self.drafter)
        self._state = DecodeState.empty(
            self.target.model,
            self.drafter,
            slots=slots,
            capacity=capacity,
            block_length=self.options.block,
            stop_ids=max(1, max_stop_ids),
            log_probs=log_probs,
            accepted=accepted,
            adjustments=adjustments,
            likeliest=LikeliestLimits(
                tokens=top_log_probs,
                prompts=prompt_log_probs,
                # A step may end a prompt and go on with its output.
                positions=self._window + (read if prompt_log_probs else 0),
            ),
            pages=None if pages is None else pages.pages,
            estimator=self.options.estimator,
            seconds=costs.seconds if retimed and costs is not None else None,
        )
        self._pages = pages
        if pages is not None:
            self._state = pages.attach(self._state)
        self._seats = Seats(
            slots, per_shard=per_shard, block=self.options.block, pages=pages
        )
        self.tokens_read = 0
        self._submitted = 0
        self._cancelled: set[int] = set()

    @property
    def free(self) -> int:
        """Slots without a request."""
        return self.slots - len(self._seats.running)

    @property
    def unread(self) -> list[int]:
        """Tokens that are left of every prompt in a slot that is not read yet."""
        return [each.unread for each in self._seats.reading.values()]

    @property
    def room(self) -> int:
        """Requests that the next step would admit, if there are pages for them."""
        if self._pages is not None and self.waiting:
            return 0  # Those that wait here do so for pages.
        return max(0, self.free - self.waiting)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._seats.waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting and self.free == self.slots

    @property
    def preemptions(self) -> int:
        """Times that a request gave its slot up."""
        return self._seats.preemptions

    @property
    def decisions(self) -> int:
        """A checksum of what this host has decided: who is where, with which pages."""
        return self._seats.checksum

    @property
    def estimator(self) -> EstimatorState | None:
        """What was learned of acceptance; gone with the next step."""
        return self._state.estimator

    def will_know(
        self,
        request: CheckedRequest,
        salt: str | None,
        arriving: Iterable[CheckedRequest],
    ) -> bool:
        """Whether a request that waits a little has less of its prompt to read.

        Others are reading its beginning, which it can have of them.

        Args:
          request: which waits.
          salt: of its prefix.
          arriving: requests with the same salt that are about to be queued.
        """
        told = request.params.prompt_log_probs is not None  # which comes of reading
        if self._pages is None or told:
            return False
        return self._pages.will_know(
            request.ids,
            salt,
            reading=self._seats.reading,
            free=self._seats.free,
            arriving=[each.ids for each in arriving],
        )

    def submit(self, request: Request) -> int:
        """Queues a request; returns its index, counted from 0.

        Raises:
          RequestError: it cannot be served. Its index is used up; others go on.
        """
        index = self._submitted
        self._submitted += 1
        self.enqueue(check(request, index, self.target, self.limits))
        return index

    def enqueue(self, request: CheckedRequest, salt: str | None = None) -> None:
        """Queues a request that was checked against this batch's limits."""
        self._seats.waiting.append(Running(request, salt))

    def cancel(self, index: int) -> None:
        """Ends a request at the next step, with what it has; ended ones stay as is."""
        self._cancelled.add(index)

    @standard_settings()
    def step(
        self, rounds: int | None = None, max_finished: int | None = None
    ) -> list[Update]:
        """Admits, prefills and decodes a few rounds; what came of them.

        Args:
          rounds: most of them; None takes the `rounds_per_step`, which is the most.
          max_finished: returns once as many requests have ended; None decides by
            whether others wait.
        """
        updates = self._drop_cancelled()
        self._admit()
        if self.free == self.slots:
            return updates
        if self.chunk is not None:
            self._prefill_some(self.chunk)
        if max_finished is None:
            # With others waiting, ended slots are refilled soon.
            max_finished = self.together if self.waiting else self.slots
        rounds = self.rounds_per_step if rounds is None else rounds
        rounds, vacated = self._seats.make_room(min(rounds, self.rounds_per_step))
        self._empty(vacated)
        self._state, rounds = grammar_rounds(
            self.target.model,
            self.drafter,
            self._placed(),
            self._seats.running,
            rounds=rounds,
            max_finished=max_finished,
            options=self.options,
        )
        if rounds and len(self._seats.reading) < len(self._seats.running):
            self._state = compiled(decode)(
                *self._models,
                self._state,
                jnp.int32(rounds),
                jnp.int32(max_finished),
                options=self.options,
            )
        return updates + self._collect()

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Draft lengths and token buckets of all branches of its loop."""
        return self.options.branches(slots_per_shard(self.slots))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every slot; waits for what is being decoded."""
        return readable(self._state.lengths_B).tolist()

    @standard_settings()
    def round_in(
        self,
        branch: tuple[int, int],
        lengths_B: Sequence[int],
        *,
        rounds: int = 1,
        halves: bool = False,
    ) -> None:
        """Decodes a round in one of the branches, whatever the schedule.

        What runs has been read, and can only be cancelled afterwards.

        Args:
          branch: one of `branches`.
          lengths_B: earlier `lengths`, to which slots go back before.
          rounds: rounds decoded; those after the first are the schedule's.
          halves: whether in the two halves of rounds under grammars, which draft whole
            blocks.
        """
        length, size = branch
        state = lead(self._placed(), lengths_B, draft_length=length, size=size)
        if halves:
            self._state = masked_round(
                self.target.model, self.drafter, state, {}, self.options
            )
        else:
            self._state = compiled(decode)(
                *self._models,
                state,
                jnp.int32(rounds),
                jnp.int32(self.slots),
                options=self.options,
            )

    def retime(self, seconds: Sequence[float]) -> None:
        """Rounds of every branch take so long; its schedule is one that weighs that."""
        schedule = self._state.schedule
        assert schedule.seconds_BJ is not None
        new = np.tile(np.array(seconds, np.float32), (self.slots, 1))
        schedule = replace(schedule, seconds_BJ=put(new, row_sharding()))
        self._state = replace(self._state, schedule=schedule)

    def learned(self) -> tuple[ScheduleState, EstimatorState | None]:
        """A copy of what rounds taught scheduling and the estimator."""
        # What is donated is gone.
        return jax.tree.map(jnp.copy, (self._state.schedule, self._state.estimator))

    def relearn(self, learned: tuple[ScheduleState, EstimatorState | None]) -> None:
        """Goes back to what was learned at another time; it must be idle."""
        schedule, estimator = learned
        self._state = replace(self._state, schedule=schedule, estimator=estimator)

    def _admit(self) -> None:
        """Fills free slots, some at a time, so that they are prefilled together."""
        while self.waiting and self.free >= min(self.together, self.waiting):
            arrived = self._seats.seat(min(self.together, self.waiting))
            if not arrived:
                return  # They need pages that others have.
            newcomers = list(arrived.values())
            # One shape for any number of newcomers: no slot has the last number.
            missing = self.together - len(arrived)
            slots_N = jnp.array([*arrived, *[self.slots] * missing], jnp.int32)
            padded = newcomers + newcomers[:1] * missing
            self._state = admit(self._state, slots_N, admission_of(padded, self._state))
            if self.chunk is None:
                self._state = prefill(
                    *self._models,
                    self._state,
                    chunk=prefill_chunk(each.goal for each in newcomers),
                    together=self.together,
                )
                for each in newcomers:
                    self._read(each, each.unread)

    def _placed(self) -> DecodeState:
        """The state, with the pages that were handed out."""
        if self._pages is not None:
            self._state = self._pages.placed(self._state)
        return self._state

    def _prefill_some(self, most: int) -> None:
        """Reads on in some prompts, by at most one chunk.

        Whatever prompts are beside it, one is cut at multiples of the longest chunk.
        """
        reading = self._seats.readers(self.together)
        if not reading:
            return
        chunk = prefill_chunk((each.unread + 1 for each in reading.values()), most)
        self._state = prefill(
            *self._models,
            self._placed(),
            jnp.int32(1),
            jnp.asarray(np.isin(np.arange(self.slots), list(reading))),
            chunk=chunk,
            together=self.together,
        )
        for slot, each in reading.items():
            self._read(each, min(chunk, each.unread))
            if self._pages is not None:
                self._pages.progress(self._state, slot, each.processed)

    def _read(self, each: Running, count: int) -> None:
        each.processed += count
        self.tokens_read += count

    def _collect(self) -> list[Update]:
        """New tokens of every slot; releases those that are finished."""
        running, vocab = self._seats.running, self.target.model.config.vocab_size
        updates, finished = collect(
            self._state, running, window=self._window, vocab=vocab
        )
        failed = [slot for slot in updates if running[slot].failure]
        completions = self._release(failed, reason="error")
        completions |= self._release([each for each in finished if each not in failed])
        return [
            replace(update, completion=completions.get(slot))
            for slot, update in updates.items()
            if update.tokens or slot in completions
        ]

    def _drop_cancelled(self) -> list[Update]:
        """Takes cancelled requests out of the queue and out of their slots."""
        gone, slots = self._seats.withdraw(self._cancelled)
        self._cancelled.clear()
        indices = {slot: self._seats.running[slot].request.index for slot in slots}
        completions = self._release(slots, reason="cancelled")
        return [
            Update(each.request.index, [], self._completion(each, "cancelled"))
            for each in gone
        ] + [
            Update(indices[slot], [], completion)
            for slot, completion in completions.items()
        ]

    def _release(
        self, slots: Sequence[int], reason: FinishReason | None = None
    ) -> dict[int, Completion]:
        """Empties slots; what they held, which tells its reason where none is given."""
        self._empty(slots)
        left = self._seats.vacate(slots)
        return {slot: self._completion(each, reason) for slot, each in left.items()}

    def _empty(self, slots: Sequence[int]) -> None:
        """Slots decode no more."""
        if slots:
            released_B = np.isin(np.arange(self.slots), slots)
            self._state = release(self._state, jnp.asarray(released_B))

    def _completion(self, each: Running, reason: FinishReason | None) -> Completion:
        return completion_of(each, reason, self.target.tokenizer)
