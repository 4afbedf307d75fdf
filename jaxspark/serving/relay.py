"""Many engines behind one address: a request goes to any, and on if that one is lost.

The relay reads a request whole, if it has a key where one is needed, and hands it to a
replica as data; what the replica's application sends comes back message by message. The
client sees nothing before the first piece of a body has come. A replica that is lost
until then, or that answers 503, is replaced by another. One that is lost later ends a
stream with an error: an answer that was begun is not begun again, as its tokens could
be others.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.errors import ApiError
from jaxspark.serving.http import (
    Logged,
    check_key,
    error_response,
    needs_key,
    note,
    read,
)
from jaxspark.serving.responses import DONE, event
from jaxspark.serving.waiting import Overloaded

log = logging.getLogger(__name__)
# What an application needs to know of a request, and what can be sent elsewhere.
_FIELDS = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server"),
)
# A replica that was lost may be asked again before others know of it.
ATTEMPTS, PAUSE_S = 5, 0.2


@dataclass(frozen=True)
class Asked:
    """A request as data.

    Attributes:
      scope: of ASGI.
      body: whole.
    """

    scope: dict[str, Any]
    body: bytes


type Messages = AsyncGenerator[Message, None]


async def answered_by(app: ASGIApp, asked: Asked) -> Messages:
    """What an application sends; it is cancelled if nobody listens any more."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    bodies = iter([asked.body])

    async def receive() -> Message:
        for body in bodies:
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # Its client stays until it is cancelled.
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(dict(asked.scope), receive, sent.put)
        finally:
            sent.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await running
    finally:
        running.cancel()


class Relay:
    """An ASGI application that has replicas answer."""

    def __init__(
        self,
        ask: Callable[[Asked], Messages],
        *,
        lost: type[Exception] | tuple[type[Exception], ...],
        options: AppOptions = AppOptions(),
    ):
        """Of replicas that are there, or come later.

        Args:
          ask: has one of them answer; the answer is closed if it is no longer wanted.
          lost: what that raises if a replica is lost.
          options: keys, and limits of bodies.
        """
        self._ask, self._lost, self._options = ask, lost, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        request = Request(scope, receive)
        try:
            if needs_key(scope["path"]):
                check_key(request, self._options)
            body = await read(request, self._options)
        except ApiError as error:
            return await _refused(error)(scope, receive, send)
        asked = Asked({name: scope[name] for name in _FIELDS if name in scope}, body)
        answering = asyncio.ensure_future(self._answer(asked, scope, receive, send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait(
                (answering, leaving), return_when=asyncio.FIRST_COMPLETED
            )
            if answering.done():
                answering.result()
        finally:
            leaving.cancel()
            answering.cancel()

    async def _answer(
        self, asked: Asked, scope: Scope, receive: Receive, send: Send
    ) -> None:
        for attempt in range(ATTEMPTS):
            start: Message | None = None
            answers = False
            try:
                async with contextlib.aclosing(self._ask(asked)) as messages:
                    async for message in messages:
                        if start is None:
                            if _is_refusal(message) and attempt < ATTEMPTS - 1:
                                break
                            start = message
                            continue  # It is sent with what follows.
                        if not answers:
                            answers = True
                            await send(start)
                        await send(message)
                    else:
                        return
            except self._lost:
                log.warning("a replica was lost")
                if start is not None and answers:
                    return await _broken_off(start, send)
            await asyncio.sleep(PAUSE_S * attempt)
        error = Overloaded(
            "no replica answers now; try again later", reason="no_replica"
        )
        await _refused(error)(scope, receive, send)


def _refused(error: ApiError) -> ASGIApp:
    """What no replica answers; with an id and a line in the log, as theirs have."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        note(Request(scope), error=error.code or error.type)
        await error_response(error)(scope, receive, send)

    return Logged(answer)


def _is_refusal(start: Message) -> bool:
    """A replica that is full, or on its way out; others may not be."""
    return start["type"] == "http.response.start" and start["status"] == 503


async def _broken_off(start: Message, send: Send) -> None:
    """Ends a stream whose replica was lost; other answers come in one piece."""
    headers = dict(start["headers"])
    if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        raise ConnectionError("a replica was lost in the middle of an answer")
    error = ApiError(
        "the replica that answered was lost", status=500, type="server_error"
    )
    body = (event(error.body()) + DONE).encode()
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
