"""What can be seen of an engine from outside: observers, and figures at a glance."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxspark.calibration.estimates import Estimate
from jaxspark.generation.completion import FinishReason
from jaxspark.generation.slots import Counts
from jaxspark.serving.jobs import Job

State = Literal["starting", "ready", "draining", "stopped", "failed"]
# "Now" is the last few seconds.
_WINDOW_S = 5.0
# The first tokens of a burst say little of speed.
_LEAST_S = 0.5


class Observer:
    """Is told of what happens, in whichever thread it does; must be quick."""

    def rejected(self, reason: str) -> None:
        """A request was turned away, for a reason in one word."""

    def taken_on(self, jobs: Sequence[Job]) -> None:
        """A request was taken on, with so many outputs."""

    def admitted(self, job: Job) -> None:
        """A job got a slot."""

    def prefilled(self, job: Job, cached: int) -> None:
        """A job's prompt was read, but for so many tokens that were cached."""

    def preempted(self, count: int) -> None:
        """So many jobs gave their pages up, and wait again."""

    def progressed(self, job: Job, tokens: int, seconds: float, counts: Counts) -> None:
        """A job has new tokens.

        Args:
          job: `began` and `latest` are still those before.
          tokens: how many.
          seconds: since the latest before, or since its arrival.
          counts: what its rounds did.
        """

    def called(self, tokens: int, rounds: int) -> None:
        """A call came back that read and decoded so many tokens, in so many rounds."""

    def ended(self, job: Job, reason: FinishReason) -> None:
        """A job has ended, with or without a slot."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """An engine at a glance.

    Attributes:
      state: "ready" if it takes requests.
      slots: outputs that can be decoded at once.
      running: those that are.
      waiting: outputs that have no slot.
      deferred: those of them that were admitted and wait for pages.
      waiting_tokens: of prompts that were not admitted.
      prompt_tokens: of prompts that got a slot.
      output_tokens: that were decoded.
      rounds: of all outputs.
      drafted: rounds that drafted.
      drafts: drafts in them.
      verified: drafts verified.
      accepted: drafts accepted, by position.
      tokens_per_second: of the last seconds.
      accepted_length: tokens per round of the last seconds; 0 without rounds.
      compilations: programs compiled before it was ready.
      late_compilations: and since; anything but 0 is a fault.
      pages: of the caches; where slots have rows of their own, slots.
      pages_used: those that running outputs have.
      pages_cached: those that the prefix cache keeps; outputs may use them too.
      cached_tokens: of prompts, which were cached.
      preempted: times that an output gave its pages up.
      estimate: what was learned of acceptance, if anything is; None at first too.
    """

    state: State
    slots: int
    running: int
    waiting: int
    deferred: int
    waiting_tokens: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    drafted: int
    drafts: int
    verified: int
    accepted: tuple[int, ...]
    tokens_per_second: float
    accepted_length: float
    compilations: int
    late_compilations: int
    pages: int
    pages_used: int
    pages_cached: int
    cached_tokens: int
    preempted: int
    estimate: Estimate | None = None


class Tally(Observer):
    """Adds up what an engine does.

    Attributes:
      prompt_tokens, cached_tokens, output_tokens, rounds, drafted, drafts, verified:
        as in `Stats`.
      accepted_G: drafts accepted, by position.
      job_seconds: of recent jobs in their slots, on average.
    """

    def __init__(self, block_length: int):
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.rounds = self.drafted = self.drafts = self.verified = 0
        self.accepted_G = np.zeros((block_length,), np.int64)
        self.job_seconds = 1.0
        self._recent: deque[tuple[float, int, int]] = deque()

    def admitted(self, job: Job) -> None:
        """Counts its prompt."""
        self.prompt_tokens += job.prompt

    def prefilled(self, job: Job, cached: int) -> None:
        """Counts what was cached."""
        self.cached_tokens += cached

    def progressed(self, job: Job, tokens: int, seconds: float, counts: Counts) -> None:
        """Counts its tokens and rounds."""
        self.output_tokens += tokens
        self.rounds += counts.rounds
        self.drafted += counts.drafted
        self.drafts += counts.drafts
        self.verified += counts.verified
        self.accepted_G += np.array(counts.accepted, np.int64)
        self._recent.append((time.monotonic(), tokens, counts.rounds))
        self._forget()

    def ended(self, job: Job, reason: FinishReason) -> None:
        """Learns how long jobs take."""
        if job.admitted is not None:
            seconds = time.monotonic() - job.admitted
            self.job_seconds += 0.1 * (seconds - self.job_seconds)

    def figures(self) -> dict[str, Any]:
        """Those of `Stats`."""
        speed, length = self.recent()
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "drafts": self.drafts,
            "verified": self.verified,
            "accepted": tuple(self.accepted_G.tolist()),
            "tokens_per_second": speed,
            "accepted_length": length,
        }

    def recent(self) -> tuple[float, float]:
        """Tokens per second and accepted length of the last seconds."""
        now = time.monotonic()
        recent = [each for each in list(self._recent) if each[0] > now - _WINDOW_S]
        if not recent:
            return 0.0, 0.0
        tokens = sum(each[1] for each in recent)
        rounds = sum(each[2] for each in recent)
        seconds = max(now - recent[0][0], _LEAST_S)
        return tokens / seconds, tokens / max(rounds, 1)

    def _forget(self) -> None:
        while self._recent[0][0] < time.monotonic() - 2 * _WINDOW_S:
            self._recent.popleft()
