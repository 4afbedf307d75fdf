"""Who waits for a slot, and who is next: bounded, by priority, fair between clients.

Lower priorities go first. Within one, the client goes next that has been served least:
a virtual token counter (Sheng et al. 2024, "Fairness in Serving Large Language
Models"). A client that comes back is lifted to the least counter of those that are
there, so that nobody saves up service. A client's own requests keep their order, but
for those that cannot run yet.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxspark.serving.errors import ApiError
from jaxspark.serving.jobs import Job

# Clients whose service is remembered though nothing of them is there.
_MOST_REMEMBERED = 4096


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What may wait.

    Attributes:
      requests: outputs that have no slot yet.
      tokens: of their prompts.
    """

    requests: int = 256
    tokens: int = 262_144

    def __post_init__(self) -> None:
        if self.requests < 1 or self.tokens < 1:
            raise ValueError(
                f"a queue needs room for at least 1 request and 1 token, got {self}"
            )


class Overloaded(ApiError):
    """The queue is full, or the engine is going down; another server may be free.

    Attributes:
      reason: a word for metrics.
      retry_after_s: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: float = 1.0):
        super().__init__(message, status=503, type="server_error", code=reason)
        self.reason = reason
        self.retry_after_s = math.ceil(min(max(retry_after_s, 1.0), 60.0))


class WaitingLine:
    """Jobs without a slot. Not safe for threads; the engine locks it.

    Attributes:
      tokens: of all waiting prompts.
    """

    def __init__(self, limits: QueueLimits = QueueLimits()):
        self.limits = limits
        self.tokens = 0
        self._count = 0
        self._lines: dict[int, dict[str, deque[Job]]] = {}
        # Tokens that clients were served, and jobs of theirs that are somewhere here.
        self._served: dict[str, float] = {}
        self._present: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        for line in self._lines.values():
            for jobs in line.values():
                yield from jobs

    def push(self, jobs: Sequence[Job], *, retry_after_s: float = 1.0) -> None:
        """Queues all of a request's jobs, or none.

        Raises:
          ApiError: they could never wait together.
          Overloaded: there is no room for them now.
        """
        tokens = sum(job.prompt for job in jobs)
        self.check_room(len(jobs), tokens, retry_after_s=retry_after_s)
        for job in jobs:
            self._arrive(job.client)
            line = self._lines.setdefault(job.demand.priority, {})
            line.setdefault(job.client, deque()).append(job)
        self._count += len(jobs)
        self.tokens += tokens

    def check_room(
        self, outputs: int, tokens: int = 0, *, retry_after_s: float = 1.0
    ) -> None:
        """Whether so many outputs could be queued, with so many tokens of prompts.

        Raises:
          ApiError: they could never wait together.
          Overloaded: there is no room for them now.
        """
        for what, param, given, waiting, most in (
            ("outputs", "n", outputs, len(self), self.limits.requests),
            ("prompt tokens", "prompt", tokens, self.tokens, self.limits.tokens),
        ):
            if given > most:
                raise ApiError(
                    f"the request has {given} {what} in all; at most {most} can wait",
                    param=param,
                )
            if waiting + given > most:
                raise Overloaded(
                    f"{waiting} {what} wait, at most {most} may; try again later",
                    reason="queue_full",
                    retry_after_s=retry_after_s,
                )

    def take(self, count: int, may: Callable[[Job], bool] = bool) -> list[Job]:
        """At most so many jobs that are next; they are charged for their prompts.

        Args:
          count: most of them.
          may: whether a job may run now, as the next; others pass those that may not.
        """
        taken: list[Job] = []
        for priority in sorted(self._lines):
            if len(taken) >= count:
                break
            left = {
                client: deque(jobs) for client, jobs in self._lines[priority].items()
            }
            while len(taken) < count and left:
                client = min(
                    left, key=lambda each: (self._served[each], left[each][0].arrived)
                )
                job = left[client].popleft()
                if not left[client]:
                    del left[client]
                if may(job):
                    taken.append(job)
                    self._remove(job)
                    self.charge(job, job.prompt)
        return taken

    def withdraw(self, job: Job) -> bool:
        """Takes a job out, for good; whether it was waiting."""
        waits = job in self._lines.get(job.demand.priority, {}).get(job.client, ())
        if waits:
            self._remove(job)
            self.leave(job)
        return waits

    def charge(self, job: Job, tokens: int) -> None:
        """Counts tokens that a job's client was served."""
        self._served[job.client] = self._served.get(job.client, 0.0) + tokens

    def leave(self, job: Job) -> None:
        """A job has ended."""
        self._present[job.client] -= 1
        if not self._present[job.client]:
            del self._present[job.client]
        if len(self._served) > _MOST_REMEMBERED:
            self._served = {
                client: served
                for client, served in self._served.items()
                if client in self._present
            }

    def _arrive(self, client: str) -> None:
        if client not in self._present:
            least = min((self._served[each] for each in self._present), default=0.0)
            self._served[client] = max(self._served.get(client, 0.0), least)
        self._present[client] = self._present.get(client, 0) + 1

    def _remove(self, job: Job) -> None:
        line = self._lines[job.demand.priority]
        line[job.client].remove(job)
        self._count -= 1
        self.tokens -= job.prompt
        if not line[job.client]:
            del line[job.client]
        if not line:
            del self._lines[job.demand.priority]
