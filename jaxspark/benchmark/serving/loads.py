"""How requests arrive.

    closed:8        8 clients, each of which asks again when it has its answer
    poisson:0.5     half a request a second on average, whether or not others are done
    closed:4+long   beside 4 clients another one sends long prompts at fixed times

Closed loops find the throughput. Only open ones show what queues do to people: a slow
server does not make them come later.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from jaxspark.benchmark.serving.client import Question, Timeline

Ask = Callable[[Question], Awaitable[Timeline]]


@dataclass(frozen=True, kw_only=True)
class Load:
    """A way to arrive.

    Attributes:
      name: as it was given.
      clients: of a closed loop; None for an open one.
      rate: requests per second of an open loop.
      long: whether long prompts come as well.
    """

    name: str
    clients: int | None = None
    rate: float | None = None
    long: bool = False

    @classmethod
    def of(cls, name: str) -> Self:
        """What a name means.

        Raises:
          ValueError: nothing.
        """
        found = re.fullmatch(r"(closed|poisson):(\d+(?:\.\d+)?)(\+long)?", name)
        if not found or not float(found[2]) or (found[1] == "closed" and "." in name):
            raise ValueError(
                f"the load {name!r} is unknown; expected closed:CLIENTS or "
                "poisson:REQUESTS_PER_SECOND, and +long behind it for long prompts"
            )
        long = found[3] is not None
        if found[1] == "closed":
            return cls(name=name, clients=int(found[2]), long=long)
        return cls(name=name, rate=float(found[2]), long=long)

    async def run(
        self,
        ask: Ask,
        questions: Sequence[Question],
        *,
        seed: int,
        long_questions: Sequence[Question] = (),
        long_seconds: float = 2.0,
    ) -> tuple[list[Timeline], list[Timeline]]:
        """Asks all questions.

        Args:
          ask: asks one.
          questions: all of them.
          seed: of the times at which they come.
          long_questions: that come beside them, as far as there is time.
          long_seconds: between two of these.

        Returns:
          what became of the questions, and of the long ones that came.
        """
        beside: list[asyncio.Task[Timeline]] = []

        async def long() -> None:
            for question in long_questions if self.long else ():
                beside.append(asyncio.create_task(_asked(ask, question)))
                await asyncio.sleep(long_seconds)

        others = asyncio.create_task(long())
        try:
            if self.clients is not None:
                timelines = await _closed(ask, questions, self.clients)
            else:
                timelines = await _open(ask, questions, self.rate or 1.0, seed)
        finally:
            others.cancel()
            for each in beside:
                each.cancel()
            await asyncio.gather(others, *beside, return_exceptions=True)
        told = [each.result() for each in beside if not each.cancelled()]
        return timelines, told


async def _asked(ask: Ask, question: Question) -> Timeline:
    return await ask(question)


async def _closed(
    ask: Ask, questions: Sequence[Question], clients: int
) -> list[Timeline]:
    left, timelines = iter(questions), []

    async def client() -> None:
        for question in left:
            timelines.append(await ask(question))

    await asyncio.gather(*(client() for _ in range(clients)))
    return timelines


async def _open(
    ask: Ask, questions: Sequence[Question], rate: float, seed: int
) -> list[Timeline]:
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(questions))
    begun, tasks = time.monotonic(), []
    for question, due in zip(questions, np.cumsum(gaps) - gaps[0]):
        await asyncio.sleep(max(begun + due - time.monotonic(), 0))
        tasks.append(asyncio.create_task(_asked(ask, question)))
    return list(await asyncio.gather(*tasks))
