"""Answers to requests, whole or as streams; either way a client that leaves is noticed.

Frameworks cancel only streams when clients leave. Here the slot of a whole answer is
freed as well.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxspark.serving.assembler import Assembler
from jaxspark.serving.engine_events import Tokens
from jaxspark.serving.errors import ApiError
from jaxspark.serving.http import CLIENT_GONE, note, until_gone
from jaxspark.serving.responses import DONE, Answer, event
from jaxspark.serving.stream import Stream
from jaxspark.serving.tracing import GONE

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def answered(request: Request, assembler: Assembler, stream: Stream) -> Response:
    """The response to a request that was taken on."""
    if assembler.prepared.stream:
        return EventStream(_events(request, assembler, stream), stream)
    reading = asyncio.ensure_future(_read(request, assembler, stream))
    leaving = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError("the client has left", status=CLIENT_GONE)
        reading.result()
    finally:
        reading.cancel()
        leaving.cancel()
        stream.cancel()
    note(request, **figures(assembler))
    # Long ones take a while.
    text = await asyncio.to_thread(lambda: assembler.answer().json_text())
    return Response(text, media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends them frees the slots of a request."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], stream: Stream):
        super().__init__(events, headers=_HEADERS)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            log = scope.get("jaxspark.log", {})
            if not log.keys() & {"completion_tokens", "error"}:
                log["error"] = GONE
            self._stream.cancel()


async def _events(
    request: Request, assembler: Assembler, stream: Stream
) -> AsyncIterator[str]:
    try:
        async for chunks in _chunks(request, assembler, stream):
            if chunks:
                yield "".join(map(event, chunks))
        note(request, **figures(assembler))
    except ApiError as error:
        # The status was sent long ago: clients look for errors among the events.
        note(request, error=error.code or error.type)
        yield event(error.body())
    yield DONE


async def _read(request: Request, assembler: Assembler, stream: Stream) -> None:
    async for _ in _chunks(request, assembler, stream):
        pass


async def _chunks(
    request: Request, assembler: Assembler, stream: Stream
) -> AsyncIterator[list[Answer]]:
    """Chunks as they come; outputs that have ended by themselves are stopped."""
    stopped: set[int] = set()
    begun = False
    async for told in stream:
        if not begun and isinstance(told, Tokens):
            begun = True
            waited = time.monotonic() - request.scope["jaxspark.begun"]
            note(request, first_token_seconds=round(waited, 4))
        yield assembler.push(told)
        if not assembler.wants(told.choice) and told.choice not in stopped:
            stopped.add(told.choice)
            stream.cancel(told.choice, "stop")
        if assembler.finished:
            return


def figures(assembler: Assembler) -> dict[str, Any]:
    """What the log tells of an answer."""
    usage = assembler.usage()
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "finish_reasons": assembler.finish_reasons(),
        "outputs": len(assembler.prepared.demands),
        "stream": assembler.prepared.stream,
    }
