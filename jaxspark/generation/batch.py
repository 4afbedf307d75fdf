"""Continuous batching: many requests through a few slots of one compiled loop.

A slot whose request ends is refilled while the others go on (Yu et al. 2022, "Orca").
The host only admits, collects and releases; what a step reads from the device are the
tokens that are new since the last one.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import (
    AdjustmentLimits,
    DecodeOptions,
    DecodeState,
    LikeliestLimits,
    Phase,
    admit,
    decode,
    prefill,
    release,
)
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.estimator import EstimatorState
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.generation.completion import (
    Completion,
    FinishReason,
    Likely,
    PromptLogProb,
)
from jaxspark.generation.grammar_rounds import grammar_rounds
from jaxspark.generation.request import (
    UNLIMITED,
    CheckedRequest,
    Limits,
    Request,
    check,
)
from jaxspark.generation.slot_pages import SlotPages
from jaxspark.generation.slots import (
    Counts,
    Ring,
    Running,
    admission_of,
    newest,
    newest_likeliest,
    prefill_chunk,
)
from jaxspark.models import TargetModel
from jaxspark.parallel.mesh import shard, slot_shards, slots_per_shard
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
      log_probs: of the new tokens, where the batch keeps them.
      accepted: which of them are accepted drafts, where the batch keeps that.
      top_log_probs: likely tokens beside each, if asked for.
      prompt_log_probs: of the prompt, if asked for, in the first update with tokens.
      counts: what the step's rounds did.
      cached: tokens of its prompt whose cache rows were there already.
    """

    index: int
    tokens: list[int]
    completion: Completion | None = None
    log_probs: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    top_log_probs: list[Likely] = field(default_factory=list)
    prompt_log_probs: list[PromptLogProb | None] | None = None
    counts: Counts = Counts()
    cached: int = 0


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
          together: requests prefilled together; None takes a quarter of the slots.
          chunk: most tokens of each prompt that a step reads, so that prompts delay no
            step for longer; None reads them whole.
          rounds_per_step: most rounds between two looks at what has come.
          pages: hands out pages, of which there may be fewer than all slots could
            use: then the youngest requests wait for others. None gives every slot rows
            for its whole capacity.

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
        if pages is not None:
            _check_pages(pages, chunk)
        self.slots = slots
        self.together = max(1, slots // 4) if together is None else min(together, slots)
        self.chunk = chunk
        self.rounds_per_step = rounds_per_step
        self.limits = Limits(
            capacity=capacity,
            block_length=self.options.block,
            min_drafts=self.options.max_min_drafts(self._per_shard),
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
        )
        self._pages = pages
        if pages is not None:
            self._state = pages.attach(self._state)
        self.preemptions = 0
        self._submitted = 0
        self._waiting: deque[Running] = deque()
        self._running: dict[int, Running] = {}
        self._cancelled: set[int] = set()

    @property
    def free(self) -> int:
        """Slots without a request."""
        return self.slots - len(self._running)

    @property
    def prefilling(self) -> int:
        """Slots whose prompts are not read to their ends."""
        return sum(each.unread > 0 for each in self._running.values())

    @property
    def room(self) -> int:
        """Requests that the next step would admit, if there are pages for them."""
        if self._pages is not None and self._waiting:
            return 0  # Those that wait here do so for pages.
        lanes = self.slots if self.chunk is None else self.together - self.prefilling
        return max(0, min(self.free, lanes) - self.waiting)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._running

    @property
    def decisions(self) -> int:
        """A checksum of what this host has decided: who is where, with which pages."""
        running = [
            (
                slot,
                each.request.index,
                each.processed,
                len(each.tokens),
                each.tokens[-1:],
            )
            for slot, each in sorted(self._running.items())
        ]
        waiting = [each.request.index for each in self._waiting]
        pages = 0 if self._pages is None else self._pages.checksum
        return zlib.crc32(repr((running, waiting, pages)).encode())

    @property
    def estimator(self) -> EstimatorState | None:
        """What was learned of acceptance; gone with the next step."""
        return self._state.estimator

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
        self._waiting.append(Running(request, salt))

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
        if not self._running:
            return updates
        if self.chunk is not None:
            self._prefill_some(self.chunk)
        if max_finished is None:
            # With others waiting, ended slots are refilled soon.
            max_finished = self.together if self._waiting else self.slots
        rounds = self.rounds_per_step if rounds is None else rounds
        rounds = self._make_room(min(rounds, self.rounds_per_step))
        self._state, rounds = grammar_rounds(
            self.target.model,
            self.drafter,
            self._placed(),
            self._running,
            rounds=rounds,
            max_finished=max_finished,
            options=self.options,
        )
        if rounds:
            self._state = compiled(decode)(
                self.target.model,
                self.drafter,
                self._state,
                jnp.int32(rounds),
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
            if self.chunk is not None:
                # All that are being read go on in every step: nobody is left behind.
                count = min(count, self.together - self.prefilling)
                if not count:
                    return
            arrived = self._next(free, count)
            if not arrived:
                return  # They need pages that others have.
            free = [slot for slot in free if slot not in arrived]
            newcomers = list(arrived.values())
            self._running |= arrived
            # One shape for any number of newcomers: no slot has the last number.
            missing = self.together - len(arrived)
            slots_N = jnp.array([*arrived, *[self.slots] * missing], jnp.int32)
            padded = newcomers + newcomers[:1] * missing
            self._state = admit(self._state, slots_N, admission_of(padded, self._state))
            if self.chunk is None:
                self._state = prefill(
                    self.target.model,
                    self.drafter,
                    self._state,
                    chunk=prefill_chunk(each.goal for each in newcomers),
                    together=self.together,
                )
                for each in newcomers:
                    each.processed += each.unread

    def _next(self, free: Sequence[int], count: int) -> dict[int, Running]:
        """Who waits longest, in free slots; fewer than asked for if pages are few."""
        arrived: dict[int, Running] = {}
        while len(arrived) < count:
            each = self._waiting[0]
            place = self._place(each, [slot for slot in free if slot not in arrived])
            if place is None:
                break
            slot, processed = place
            each.begin(processed)
            arrived[slot] = self._waiting.popleft()
        return arrived

    def _place(self, each: Running, free: Sequence[int]) -> tuple[int, int] | None:
        """One of free slots for a request, and tokens whose rows are there already."""
        if self._pages is None:
            return free[0], 0
        return self._pages.admit(
            free,
            each.request.ids + each.tokens,
            self._positions(each, rounds=1),
            each.salt,
            share=not each.wants_prompt,
        )

    def _positions(self, each: Running, rounds: int) -> int:
        """Positions that a request writes to in so many rounds."""
        block = self.options.block
        return min(each.length + rounds * (block + 1), each.request.limit) + block

    def _make_room(self, rounds: int) -> int:
        """Pages for the next rounds, which are fewer where pages are.

        Where they do not suffice for one, the youngest request that has some of those
        that are too few gives its own up.
        """
        if self._pages is None:
            return rounds
        while short := self._pages.reserve(
            {
                slot: self._positions(each, rounds)
                for slot, each in self._running.items()
            }
        ):
            if rounds > 1:
                rounds //= 2
            else:
                self._preempt(short)
        return rounds

    def _preempt(self, slots: Sequence[int]) -> None:
        """The youngest of requests waits again; it goes on from what it has said."""
        slot = max(slots, key=lambda slot: self._running[slot].request.index)
        each = self._vacate([slot])[slot]
        self._waiting.appendleft(each)
        self.preemptions += 1

    def _placed(self) -> DecodeState:
        """The state, with the pages that were handed out."""
        if self._pages is not None:
            self._state = self._pages.placed(self._state)
        return self._state

    def _prefill_some(self, most: int) -> None:
        """Reads on in every prompt, by at most one chunk.

        Whatever prompts are beside it, one is cut at multiples of the longest chunk.
        """
        reading = {
            slot: each for slot, each in self._running.items() if each.unread > 0
        }
        if not reading:
            return
        chunk = prefill_chunk((each.unread + 1 for each in reading.values()), most)
        self._state = prefill(
            self.target.model,
            self.drafter,
            self._placed(),
            jnp.int32(1),
            chunk=chunk,
            together=self.together,
        )
        for slot, each in reading.items():
            each.processed += min(chunk, each.unread)
            if self._pages is not None:
                self._pages.progress(self._state, slot, each.processed)

    def _collect(self) -> list[Update]:
        """New tokens of every slot; releases those that are finished."""
        since_B = np.zeros((self.slots,), np.int32)
        for slot, each in self._running.items():
            since_B[slot] = each.length
        phase_B, lengths_B, counters, tokens_BW, log_probs_BW, accepted_BW = (
            jax.device_get(newest(self._state, jnp.asarray(since_B), self._window))
        )
        likeliest = None
        if any(each.asks_likeliest for each in self._running.values()):
            likeliest = jax.device_get(newest_likeliest(self._state))
        vocab = self.target.model.config.vocab_size
        updates: dict[int, Update] = {}
        for slot, each in self._running.items():
            first = not each.tokens
            gained = slice(int(lengths_B[slot] - since_B[slot]))
            if each.failure is not None:
                gained = slice(0)
            counts, before = each.before.plus(Counts.of(counters, slot)), each.counts
            each.counts = counts
            updates[slot] = update = Update(
                each.request.index,
                tokens_BW[slot, gained].tolist(),
                log_probs=log_probs_BW[slot, gained].tolist(),
                accepted=accepted_BW[slot, gained].tolist(),
                counts=counts.since(before),
                cached=each.cached or 0,
            )
            each.tokens += update.tokens
            each.log_probs += update.log_probs
            if likeliest is not None:
                ring = Ring(likeliest, slot, vocab)
                top = each.take_likeliest(ring, len(update.tokens))
                updates[slot] = update = replace(update, top_log_probs=top)
            if each.request.params.prompt_log_probs is not None and first:
                told = each.prompt_log_probs
                updates[slot] = replace(update, prompt_log_probs=told)
        failed = [slot for slot in updates if self._running[slot].failure]
        ended = [slot for slot in updates if phase_B[slot] == Phase.FINISHED]
        completions = self._release(failed, reason="error")
        completions |= self._release([slot for slot in ended if slot not in failed])
        return [
            replace(update, completion=completions.get(slot))
            for slot, update in updates.items()
            if update.tokens or slot in completions
        ]

    def _drop_cancelled(self) -> list[Update]:
        """Takes cancelled requests out of the queue and out of their slots."""

        def unwanted(each: Running) -> bool:
            return each.request.index in self._cancelled

        updates = [
            Update(each.request.index, [], self._completion(each, "cancelled"))
            for each in self._waiting
            if unwanted(each)
        ]
        self._waiting = deque(each for each in self._waiting if not unwanted(each))
        slots = {
            slot: each.request.index
            for slot, each in self._running.items()
            if unwanted(each)
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
        left = self._vacate(slots)
        return {slot: self._completion(each, reason) for slot, each in left.items()}

    def _vacate(self, slots: Sequence[int]) -> dict[int, Running]:
        """Empties slots; who was there."""
        if not slots:
            return {}
        released_B = np.isin(np.arange(self.slots), slots)
        self._state = release(self._state, jnp.asarray(released_B))
        left = {slot: self._running.pop(slot) for slot in slots}
        if self._pages is not None:
            for slot, each in left.items():
                read = each.processed if each.unread > 0 else each.length - 1
                self._pages.release(slot, read)
        return left

    def _completion(self, each: Running, reason: FinishReason | None) -> Completion:
        """What a request became that no longer runs."""
        tokens, counts, tokenizer = each.tokens, each.counts, self.target.tokenizer
        params = each.request.params
        stopped = bool(tokens) and tokens[-1] in each.request.stop_ids
        shown = tokens[:-1] if stopped else tokens
        return Completion(
            tokens=tokens,
            text=tokenizer.decode(shown) if tokenizer else None,
            finish_reason=reason or ("stop" if stopped else "length"),
            error=each.failure,
            log_probs=each.log_probs if params.log_probs else None,
            top_log_probs=each.top_log_probs if params.top_log_probs else None,
            prompt_log_probs=None
            if params.prompt_log_probs is None
            else each.prompt_log_probs,
            rounds=counts.rounds,
            drafted=counts.drafted,
            verified=counts.verified,
            reached=list(counts.reached),
            accepted=list(counts.accepted),
        )
