"""The engine: requests in, events out, one thread that owns the device.

    with Engine(target, drafter, slots=8, context=2048) as engine:
        for event in engine.submit(demand): ...

The thread runs turns. In each it lets newcomers into free slots, reads a chunk of every
prompt that is not read yet, decodes a few rounds of all others, and tells what came of
them. Everything else (`submit`, `cancel`, `drain`) may be called from any thread or
event loop, and leaves work for the next turn.
"""

import contextlib
import itertools
import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import jax

from jaxspark.calibration.estimates import Estimate
from jaxspark.decoding import AdjustmentLimits, DecodeOptions, Fixed
from jaxspark.decoding.options import check_block_length
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.generation import ContinuousBatch, Update
from jaxspark.generation.generate import round_capacity
from jaxspark.generation.request import (
    MAX_TOP_LOG_PROBS,
    CheckedRequest,
    RequestError,
    check,
)
from jaxspark.parallel.mesh import mesh_in_use, slots_per_shard
from jaxspark.parallel.messages import Receiver, Sender
from jaxspark.serving.buckets import with_buckets, with_guessed_costs
from jaxspark.serving.cache_memory import check_context, slot_pages
from jaxspark.serving.commands import STOP, Command
from jaxspark.serving.compilations import Compilations
from jaxspark.serving.demands import Demand
from jaxspark.serving.desk import Desk, Turn
from jaxspark.serving.errors import ApiError
from jaxspark.serving.jobs import Job
from jaxspark.serving.memory import Apart
from jaxspark.serving.observing import Observer, State, Stats, Tally
from jaxspark.serving.pace import Pace, Pacer
from jaxspark.serving.stream import Stream
from jaxspark.serving.waiting import Overloaded, QueueLimits
from jaxspark.serving.warmup import retime, warm_up
from jaxspark.target import Target

log = logging.getLogger(__name__)
# Chunks of a prompt that is not long yet.
_LONG_CHUNKS = 8
# Seconds between two looks at what was learned of acceptance.
_LOOK_S = 1.0
# What clients call fields of `SamplingParams`.
FIELDS = {
    "max_new_tokens": "max_tokens",
    "stop_ids": "stop_token_ids",
    "allowed_ids": "allowed_token_ids",
    "top_log_probs": "top_logprobs",
    "prompt_log_probs": "prompt_logprobs",
}
# All that requests may do to logits is compiled; nobody pays for what no one asks for.
SERVING = AdjustmentLimits.serving()


class Engine:
    """Serves requests by continuous batching; see the module.

    Greedy outputs, and under the gumbel coupling sampled ones, are the tokens of plain
    decoding with the same seed, whatever runs beside them.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        slots: int = 8,
        context: int = 2048,
        options: DecodeOptions = DecodeOptions(coupling="gumbel"),
        chunk: int | None = None,
        together: int | None = None,
        max_stop_ids: int = 16,
        adjustments: AdjustmentLimits = SERVING,
        top_log_probs: int = MAX_TOP_LOG_PROBS,
        prompt_log_probs: bool = True,
        prefix_cache: bool = True,
        cache_pages: int | None = None,
        snapshot_bytes: int | None = None,
        grammars: bool = True,
        queue: QueueLimits = QueueLimits(),
        pace: Pace = Pace(),
        observers: Sequence[Observer] = (),
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
        others: Sender | None = None,
    ):
        """Makes an engine that is not started yet.

        Args:
          target: a loaded target.
          drafter: what proposes; None decodes plainly.
          slots: outputs decoded at once.
          context: most tokens of a prompt and its output.
          options: how rounds draft, schedule and verify; see `with_buckets`. A
            schedule that weighs costs and has none gets those of its own rounds.
          chunk: most tokens of each prompt that are read between two calls; None takes
            32 on CPUs, where they cost as much as some rounds, and 256 elsewhere.
          together: prompts that are read at once; None takes a quarter of the slots. A
            long one gets no slot while as many are in theirs that have less to read.
          max_stop_ids: most tokens that may end an output.
          adjustments: what requests may do to logits.
          top_log_probs: most likely tokens that they may ask for beside each.
          prompt_log_probs: whether they may ask for those of prompts.
          prefix_cache: whether prompts that begin alike share cache rows.
          cache_pages: pages of 128 positions for all outputs and shared prefixes, which
            shards of slots have equally many of; one output of the whole context fits
            those of a shard. When they run out, the youngest outputs wait. None has as
            many as all slots can fill.
          snapshot_bytes: of models with rings, most bytes that the prefix cache takes
            beside pages; None takes as many as pages have.
          grammars: whether they may have grammars; costs programs to compile.
          queue: what may wait.
          pace: rounds per call.
          observers: are told of what happens.
          on_ready: called once everything is compiled.
          on_failure: called if the device fails, or another process is lost.
          others: the other processes of this one's job, which are told what to do and
            `follow`; None if there are none.

        Raises:
          ValueError: options, drafter and target that do not go together.
        """
        most = target.model.config.max_position_embeddings
        if not 2 <= context <= most:
            raise ValueError(f"context is {context}; the target has 2 to {most} tokens")
        self.context = context
        if chunk is None:
            chunk = 32 if jax.default_backend() == "cpu" else 256
        self._long_prompt = _LONG_CHUNKS * chunk
        drafter = PlainDrafter() if drafter is None else drafter
        block = check_block_length(drafter, options.block_length)
        own = slots_per_shard(slots)
        options = with_buckets(options, drafter, own)
        self._retimes = options.schedule.needs_costs
        options = with_guessed_costs(options, drafter, own)
        capacity = round_capacity(context + block)
        if cache_pages is not None:
            check_context(context, block, cache_pages)
        self.pages = slot_pages(
            drafter,
            slots=slots,
            capacity=capacity,
            chunk=chunk,
            prefix_cache=prefix_cache,
            cache_pages=cache_pages,
            snapshot_bytes=snapshot_bytes,
        )
        self._batch = ContinuousBatch(
            target,
            drafter,
            slots=slots,
            capacity=capacity,
            options=options,
            max_stop_ids=max_stop_ids,
            log_probs=True,
            accepted=True,
            adjustments=adjustments,
            top_log_probs=top_log_probs,
            prompt_log_probs=prompt_log_probs,
            grammars=grammars,
            together=together,
            chunk=chunk,
            rounds_per_step=pace.most,
            pages=self.pages,
            retimed=self._retimes,
        )
        self.options = self._batch.options
        # Draws of requests with one seed are not independent; a schedule that looks at
        # those of others must not see them together.
        self._own_seeds = options.coupling == "rejection" and not isinstance(
            options.schedule, Fixed
        )
        self._mesh = jax.sharding.get_mesh() if mesh_in_use() is not None else None
        self._pacer = Pacer(pace)
        self._tally = Tally(self.options.block)
        self._on_ready, self._on_failure = on_ready, on_failure
        self._early, self._late = Compilations(), Compilations()
        self._estimate: Estimate | None = None
        self._looked = 0.0
        self._indices = itertools.count()
        self._desk = Desk(queue, (self._tally, *observers))
        self._observers = observers
        self._others = others
        self._compiled, self._stopping = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def state(self) -> State:
        """What it is doing."""
        return self._desk.state

    @property
    def compiled(self) -> bool:
        """Whether everything is: before, its thread may take minutes to end."""
        return self._compiled.is_set()

    def start(self) -> None:
        """Starts the thread, which compiles everything and is then ready."""
        self._thread.start()

    def follow(self, receiver: Receiver) -> None:
        """Does what process 0 tells, until that stops.

        If it stops before everything is compiled, this returns while a thread compiles.

        Raises:
          RuntimeError: process 0 is lost, or this one has decided otherwise.
        """
        work = Apart(lambda: self._follow(receiver))
        while work.is_alive() and not self.compiled:
            if receiver.peek() == STOP:
                return
        work.result()

    def fail(self, why: str) -> None:
        """Ends everything with an error, even if the thread never comes back."""
        self._desk.become("failed")
        self._desk.end_all(why, status=500)
        self._on_failure()

    def wait_ready(self) -> None:
        """Waits until it is ready.

        Raises:
          RuntimeError: it failed.
        """
        self._desk.wait_for(lambda: self.state != "starting")
        if self.state == "failed":
            raise RuntimeError("the engine failed while it was started")

    def submit(self, *demands: Demand, client: str = "") -> Stream:
        """Takes a request on.

        Args:
          *demands: its outputs; all are taken on or none.
          client: who asks; those who were served least go first.

        Returns:
          the events of all its outputs.

        Raises:
          ApiError: what cannot be served.
          Overloaded: no room now.
        """
        return self.take_on(self.check(*demands, client=client))

    def check_room(self, outputs: int = 1) -> None:
        """Raises what `submit` would for so many outputs, whatever is asked for."""
        with self._told_if_full():
            self._desk.check_room(outputs, retry_after_s=self._wait_s(outputs))

    def check(self, *demands: Demand, client: str = "") -> list[Job]:
        """The first half of `submit`, which takes a while for long prompts and lists.

        An event loop leaves it to another thread. Nothing is taken on yet.
        """
        self.check_room(len(demands))
        jobs: list[Job] = []
        stream = Stream(
            len(demands), lambda choice, reason: self._desk.cancel(jobs, choice, reason)
        )
        now = time.monotonic()
        jobs += [self._job(demand, client, stream, now) for demand in demands]
        return jobs

    def take_on(self, jobs: Sequence[Job]) -> Stream:
        """The second half of `submit`, for what was checked."""
        with self._told_if_full():
            self._desk.take_on(jobs, retry_after_s=self._wait_s(len(jobs)))
        return jobs[0].stream

    def drain(self) -> None:
        """Takes no new requests on; those that are here go on to their ends."""
        self._desk.become("draining")

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing waits or runs; whether that came about in time."""
        return self._desk.wait_for(lambda: self._desk.idle, timeout_s)

    def stop(self) -> None:
        """Ends the thread after the call that is running, and what is left with it.

        While it compiles it is not waited for; it will do nothing else.
        """
        self._desk.become("stopped")
        if self._thread.is_alive() and self.compiled and self.state != "failed":
            self._thread.join()
        with self._stopping:
            if self._others is not None and self.state != "failed":
                self._others.send(STOP)
                self._others = None

    def stats(self) -> Stats:
        """What it does, at a glance."""
        desk = self._desk
        admitted = len(desk.running)
        # Before it is ready, what waits there is nobody's.
        deferred = min(self._batch.waiting, admitted)
        return Stats(
            state=desk.state,
            slots=self._batch.slots,
            running=admitted - deferred,
            waiting=len(desk.line) + deferred,
            deferred=deferred,
            waiting_tokens=desk.line.tokens,
            preempted=self._batch.preemptions,
            **self._page_figures(),
            **self._tally.figures(),
            compilations=self._early.count,
            late_compilations=self._late.count,
            estimate=self._estimate,
        )

    def _page_figures(self) -> dict[str, Any]:
        """Of `Stats`; without pages every slot counts as one."""
        if self.pages is None:
            pages, used = self._batch.slots, len(self._desk.running)
            return {"pages": pages, "pages_used": used, "pages_cached": 0}
        return {
            "pages": self.pages.size,
            "pages_used": self.pages.used,
            "pages_cached": self.pages.cached,
        }

    def _wait_s(self, more: int) -> float:
        """Seconds until so many that come now would have slots."""
        ahead = (len(self._desk.line) + more) / self._batch.slots
        return self._tally.job_seconds * ahead

    @contextlib.contextmanager
    def _told_if_full(self) -> Iterator[None]:
        """Lets observers know of requests that find no room."""
        try:
            yield
        except Overloaded as error:
            for each in self._observers:
                each.rejected(error.reason)
            raise

    def _job(self, demand: Demand, client: str, stream: Stream, now: float) -> Job:
        request, batch = demand.request, self._batch
        if request.params.seed is None:
            params = replace(request.params, seed=secrets.randbelow(2**32))
            request = replace(request, params=params)
        try:
            checked = check(request, next(self._indices), batch.target, batch.limits)
        except RequestError as error:
            # Its cause does not begin with our number of the request.
            param = FIELDS.get(error.field or "", error.field)
            raise ApiError(str(error.__cause__ or error), param=param) from error
        if checked.limit > self.context:
            raise ApiError(
                f"prompt and output need {checked.limit} tokens, the context has "
                f"{self.context}",
                param="prompt",
                code="context_length_exceeded",
            )
        late = None if demand.deadline_s is None else now + demand.deadline_s
        return Job(
            demand=demand,
            request=checked,
            client=client,
            stream=stream,
            arrived=now,
            expires=late,
        )

    # What follows runs in the engine's own thread.

    def _main(self) -> None:
        try:
            with self._devices():
                self._warm_up()
                self._desk.become("ready", after="starting")
                with self._late:
                    while (turn := self._next_turn()) is not None:
                        for update in self._step(turn):
                            self._desk.tell(update)
        except BaseException:
            # Without a lost process its collectives fail as well.
            if self.state != "failed":
                log.exception("the engine failed")
                self.fail("the engine failed")
        else:
            self._desk.end_all("the server stopped before the end", status=503)

    def _follow(self, receiver: Receiver) -> None:
        with self._devices():
            self._warm_up()
            with self._late:
                while (message := receiver.receive()) != STOP:
                    Command.decode(message, self._batch).apply(self._batch)

    def _warm_up(self) -> None:
        def compile_all() -> None:
            with self._devices(), self._early:
                warm_up(self._batch)

        Apart(compile_all).result()
        if self._retimes:
            with self._early:
                retime(self._batch)
        if self.pages is not None:
            self.pages.forget()
        self._on_ready()
        self._compiled.set()
        log.info("compiled %d programs; ready", self._early.count)

    @contextlib.contextmanager
    def _devices(self) -> Iterator[None]:
        """The mesh in use belongs to a thread."""
        if self._mesh is None:
            yield
        else:
            with jax.set_mesh(self._mesh):
                yield

    def _next_turn(self) -> Turn | None:
        batch, running = self._batch, self._desk.running.values()
        seeds = {job.request.seed for job in running} if self._own_seeds else set()
        long = self._long_prompt
        unread = [tokens for tokens in batch.unread if tokens > long]
        arriving: defaultdict[str | None, list[CheckedRequest]] = defaultdict(list)

        def may(job: Job) -> bool:
            salt = job.demand.cache_salt
            if job.request.seed in seeds:
                return False
            if batch.will_know(job.request, salt, arriving[salt]):
                return False
            if job.prompt > long:
                if sum(tokens <= job.prompt for tokens in unread) >= batch.together:
                    return False
                unread.append(job.prompt)
            if self._own_seeds:
                seeds.add(job.request.seed)
            arriving[salt].append(job.request)
            return True

        return self._desk.next_turn(batch.room, may)

    def _step(self, turn: Turn) -> list[Update]:
        """Lets newcomers in, reads on in prompts, decodes a few rounds."""
        batch = self._batch
        reading = bool(turn.arriving or batch.unread)
        begun = time.monotonic()
        preempted, read = batch.preemptions, batch.tokens_read
        command = Command(
            arriving=[(job.request, job.demand.cache_salt) for job in turn.arriving],
            unwanted=[job.request.index for job in turn.unwanted],
            rounds=self._pacer.rounds(reading=reading),
            decisions=0 if self._others is None else batch.decisions,
        )
        if self._others is not None:
            self._others.send(command.encode())
        updates = command.apply(batch)
        rounds = max((each.counts.rounds for each in updates), default=0)
        tokens = batch.tokens_read - read + sum(len(each.tokens) for each in updates)
        for each in self._observers:
            each.called(tokens, rounds)
            if batch.preemptions > preempted:
                each.preempted(batch.preemptions - preempted)
        if not reading:
            self._pacer.note(rounds, time.monotonic() - begun)
        if batch.estimator is not None and begun - self._looked >= _LOOK_S:
            self._estimate, self._looked = Estimate.of(batch.estimator), begun
        return updates
