"""Events on their way from the engine's thread to whoever waits for them."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from jaxspark.generation.completion import FinishReason
from jaxspark.serving.engine_events import Ended, EngineEvent, Tokens

# Ends one output or, for None, all.
Cancel = Callable[[int | None, FinishReason], None]


class Stream:
    """The events of one request, until each of its outputs has ended.

        async for event in engine.submit(demand): ...
        for event in engine.submit(demand): ...  # Outside of an event loop.

    One reader at a time. Nothing is dropped: what nobody reads waits.

    Attributes:
      begun: whether any output has tokens.
    """

    def __init__(self, choices: int, cancel: Cancel):
        """Made by the engine.

        Args:
          choices: outputs of the request.
          cancel: ends them.
        """
        self.begun = False
        self._cancel = cancel
        self._open = choices
        self._events: deque[EngineEvent] = deque()
        self._changed = threading.Condition()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = None

    @property
    def ended(self) -> bool:
        """Whether every output has ended; its events may not have been read."""
        return not self._open

    def cancel(
        self, choice: int | None = None, reason: FinishReason = "cancelled"
    ) -> None:
        """Ends an output, or all; its slot is free after the call that is running.

        Args:
          choice: the output; None for all. One that has ended stays as it is.
          reason: what its end is called.
        """
        if not self.ended:
            self._cancel(choice, reason)

    def put(self, *events: EngineEvent) -> None:
        """Appends events; called by the engine, from any thread."""
        with self._changed:
            self._events.extend(events)
            self._open -= sum(isinstance(event, Ended) for event in events)
            self.begun |= any(isinstance(event, Tokens) for event in events)
            reader, self._reader = self._reader, None
            self._changed.notify_all()
        if reader is not None:
            loop, future = reader
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:
                # Its loop is closed: nobody will read on.
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        while True:
            with self._changed:
                events, ended = self._taken(), self.ended
                if not events and not ended:
                    loop = asyncio.get_running_loop()
                    self._reader = loop, loop.create_future()
                    waiting = self._reader[1]
            for event in events:
                yield event
            if ended:
                return
            if not events:
                await waiting

    def __iter__(self) -> Iterator[EngineEvent]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self.ended)
                events, ended = self._taken(), self.ended
            yield from events
            if ended:
                return

    def _taken(self) -> list[EngineEvent]:
        events = list(self._events)
        self._events.clear()
        return events


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
