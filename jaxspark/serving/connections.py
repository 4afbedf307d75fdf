"""Connections of clients that are slow, wrong, or there when the server is to end.

Uvicorn waits for a header as long as a client likes, tells of broken HTTP in plain
text, and while it ends closes connections whose request it has not read yet.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxspark.serving.errors import ApiError

# In which requests that were on their way still get an answer.
_LINGER_S = 0.5


class Connection(H11Protocol):
    """Uvicorn's, with a time for headers, errors as objects, and a patient end."""

    def __init__(
        self,
        *args: Any,
        header_seconds: float,
        is_ending: Callable[[], bool],
        **kwargs: Any,
    ):
        """Made by uvicorn.

        Args:
          *args: its.
          header_seconds: in which a header must have come, from the connection's
            beginning or from its first byte.
          is_ending: whether the server is about to end.
          **kwargs: its.
        """
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._is_ending = is_ending
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a header."""
        super().connection_made(transport)
        self._watch()
        if self._is_ending():
            self.shutdown()

    def data_received(self, data: bytes) -> None:
        """Reads on."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Waits for the next request, if there will be one."""
        super().on_response_complete()
        # A part of it may be here already.
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        super().connection_lost(exc)
        self._stop_watching()

    def shutdown(self) -> None:
        """Ends after what is being answered, or what is on its way."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_LINGER_S, self._end)
        else:
            super().shutdown()

    def _end(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def handle_events(self) -> None:
        """Begins to answer what has come."""
        super().handle_events()
        if self._is_ending() and self.cycle is not None:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Tells that this was no HTTP."""
        self._refuse(ApiError(f"the request is no valid HTTP: {msg}"))

    def _watch(self) -> None:
        """Limits the time of a header that has begun, or that was never begun."""
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if self.conn.their_state is not h11.IDLE or not begun:
            self._stop_watching()
        elif self._patience is None:
            self._patience = self.loop.call_later(self._header_seconds, self._give_up)

    def _stop_watching(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        said = f"no whole header has come within {self._header_seconds:g} s"
        self._refuse(ApiError(said, status=408))

    def _refuse(self, error: ApiError) -> None:
        """Answers with an error, unless an answer was begun, and closes."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(error.body()).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(content))),
                ("Connection", "close"),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
