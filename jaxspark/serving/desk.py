"""Who waits, who runs and what each is told: the engine's books, without a device.

Every job that is taken on gets exactly one end, whatever happens: its outcome, its
cancellation, or an error. All methods may be called from any thread.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxspark.generation import Update
from jaxspark.generation.completion import FinishReason
from jaxspark.serving.engine_events import (
    Ended,
    EngineEvent,
    Prefilled,
    Sampled,
    Tokens,
)
from jaxspark.serving.jobs import Job
from jaxspark.serving.observing import Observer, State
from jaxspark.serving.waiting import Overloaded, QueueLimits, WaitingLine


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is new for the device.

    Attributes:
      arriving: jobs that get slots.
      unwanted: jobs that leave theirs.
      waiting: whether others wait for slots.
    """

    arriving: Sequence[Job]
    unwanted: Sequence[Job]
    waiting: bool


class Desk:
    """The books.

    Attributes:
      state: of the engine.
      line: jobs without slots.
      running: jobs with slots, by index.
    """

    def __init__(self, queue: QueueLimits, observers: Sequence[Observer]):
        self.state: State = "starting"
        self.line = WaitingLine(queue)
        self.running: dict[int, Job] = {}
        self._observers = observers
        self._unwanted: list[Job] = []
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not len(self.line) and not self.running

    def become(self, state: State, *, after: State | None = None) -> None:
        """Enters a state, from another if that is named; the last two are not left."""
        with self._changed:
            if self.state not in ("stopped", "failed") and after in (None, self.state):
                self.state = state
            self._changed.notify_all()

    def wait_for(
        self, come: Callable[[], bool], timeout_s: float | None = None
    ) -> bool:
        """Waits until something has come about; whether it did in time."""
        with self._changed:
            return self._changed.wait_for(come, timeout_s)

    def check_room(self, outputs: int, *, retry_after_s: float) -> None:
        """Raises what `take_on` would for so many outputs, whatever their prompts."""
        with self._changed:
            self._check_state()
            self.line.check_room(outputs, retry_after_s=retry_after_s)

    def _check_state(self) -> None:
        if self.state != "ready":
            raise Overloaded(
                f"the engine is {self.state}; it takes no requests",
                reason=self.state,
                retry_after_s=5.0,
            )

    def take_on(self, jobs: Sequence[Job], *, retry_after_s: float) -> None:
        """Lets all jobs of a request wait, or none.

        Raises:
          ApiError: they can never wait together.
          Overloaded: there is no room now.
        """
        with self._changed:
            self._check_state()
            self.line.push(jobs, retry_after_s=retry_after_s)
            for each in self._observers:
                each.taken_on(jobs)
            self._changed.notify_all()

    def cancel(
        self, jobs: Sequence[Job], choice: int | None, reason: FinishReason
    ) -> None:
        """Ends those that wait at once, and those that run before the next call."""
        with self._changed:
            for job in jobs:
                if choice not in (None, job.demand.choice) or job.because is not None:
                    continue
                if self.line.withdraw(job):
                    job.because = reason
                    self._end(job, reason)
                elif job.request.index in self.running:
                    job.because = reason
                    self._unwanted.append(job)
            self._changed.notify_all()

    def next_turn(self, room: int, may: Callable[[Job], bool]) -> Turn | None:
        """Waits until there is something to do.

        Args:
          room: jobs that can be admitted.
          may: whether a job can run beside those that do.

        Returns:
          what is new; None once the engine is to stop.
        """
        with self._changed:
            # Whoever waits, waits for one that runs: so there is always a next turn.
            self._changed.wait_for(
                lambda: not self.idle or self.state in ("stopped", "failed")
            )
            if self.state in ("stopped", "failed"):
                return None
            now = time.monotonic()
            for job in [each for each in self.line if each.is_late(now)]:
                if self.line.withdraw(job):
                    self._end_late(job)
            for job in self.running.values():
                if job.is_late(now) and job.because is None:
                    job.because = "late"
                    self._unwanted.append(job)
            unwanted, self._unwanted = self._unwanted, []
            arriving = self.line.take(room, may)
            for job in arriving:
                job.admitted = now
                self.running[job.request.index] = job
                for each in self._observers:
                    each.admitted(job)
            waiting = len(self.line) > 0
            return Turn(arriving=arriving, unwanted=unwanted, waiting=waiting)

    def tell(self, update: Update) -> None:
        """Passes on what a step brought for a job."""
        with self._changed:
            job, now = self.running[update.index], time.monotonic()
            choice, count = job.demand.choice, len(update.tokens)
            events: list[EngineEvent] = []
            if count:
                since = job.arrived if job.latest is None else job.latest
                for each in self._observers:
                    each.progressed(job, count, now - since, update.counts)
                self.line.charge(job, count)
                if job.began is None:
                    job.began = now
                    prompt = _told(job, update)
                    events.append(
                        Prefilled(choice=choice, cached=update.cached, prompt=prompt)
                    )
                    for each in self._observers:
                        each.prefilled(job, update.cached)
                job.latest = now
                job.tokens += count
                events.append(Tokens(choice=choice, tokens=sampled(job, update)))
                job.stream.put(*events)
            if update.completion is not None:
                del self.running[update.index]
                self.line.leave(job)
                completion = update.completion
                reason = job.because or completion.finish_reason
                if reason == "late":
                    self._end_late(job)
                elif completion.error is not None:
                    # Grammars alone fail one output, and they are the client's.
                    self._end(job, reason, error=completion.error, status=400)
                else:
                    self._end(job, reason)

    def end_all(self, error: str, *, status: int) -> None:
        """Ends whatever is left with an error."""
        with self._changed:
            for job in list(self.line):
                if self.line.withdraw(job):
                    self._end(job, "error", error=error, status=status)
            for job in self.running.values():
                self.line.leave(job)
                self._end(job, "error", error=error, status=status)
            self.running.clear()
            self._changed.notify_all()

    def _end_late(self, job: Job) -> None:
        """Ends one whose time is over: in an error if its request was told nothing."""
        if job.stream.begun:
            return self._end(job, "cancelled")
        waited = (
            f"the request waited {time.monotonic() - job.arrived:.1f} s for its first "
            f"token, its timeout is {job.demand.deadline_s:g} s"
        )
        self._end(job, "error", error=waited, status=504)

    def _end(
        self,
        job: Job,
        reason: FinishReason,
        *,
        error: str | None = None,
        status: int = 500,
    ) -> None:
        for each in self._observers:
            each.ended(job, reason)
        job.stream.put(
            Ended(choice=job.demand.choice, reason=reason, error=error, status=status)
        )
        self._changed.notify_all()


def sampled(job: Job, update: Update) -> list[Sampled]:
    """New tokens in the form in which they are told."""
    count = len(update.tokens)
    log_probs: Sequence[float | None] = update.log_probs
    if not job.request.params.log_probs:
        log_probs = [None] * count
    top = update.top_log_probs or [[]] * count
    return [
        Sampled(token=token, log_prob=log_prob, top=likely, accepted=accepted)
        for token, log_prob, likely, accepted in zip(
            update.tokens, log_probs, top, update.accepted, strict=True
        )
    ]


def _told(job: Job, update: Update) -> list[Sampled] | None:
    """The prompt in the form in which it is told, if it was asked for."""
    if update.prompt_log_probs is None:
        return None
    return [
        Sampled(token=token)
        if told is None
        else Sampled(token=token, log_prob=told.log_prob, top=told.top, rank=told.rank)
        for token, told in zip(job.request.ids, update.prompt_log_probs, strict=True)
    ]
