"""The HTTP that all routes share: bodies, keys, request ids, logs, errors."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.errors import ApiError
from jaxspark.serving.tracing import Tracing
from jaxspark.serving.waiting import Overloaded

log = logging.getLogger("jaxspark.requests")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
# Asked every few seconds.
_QUIET = ("/health", "/ping", "/ready", "/metrics", "/stats")
# A client that left gets no answer; nginx's number for it, in logs.
CLIENT_GONE = 499


async def body_of(request: Request, options: AppOptions) -> bytes:
    """A JSON body.

    Raises:
      ApiError: it is none, or as for `read`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Anything else a foreign page could send without asking the browser.
        raise ApiError(
            f"the content type is {kind[:80]!r}; expected application/json",
            status=415,
        )
    return await read(request, options)


async def read(request: Request, options: AppOptions) -> bytes:
    """A body of any kind, no larger and no slower than allowed.

    Raises:
      ApiError: it is, or the client has left.
    """
    most = options.most_body_bytes
    too_large = ApiError(
        f"the body is larger than {most} bytes", status=413, code="body_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(options.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            f"the body has not come within {options.body_seconds:g} s", status=408
        ) from None
    except ClientDisconnect:
        raise ApiError("the client has left", status=CLIENT_GONE) from None
    return b"".join(parts)


def needs_key(path: str) -> bool:
    """Whether a path is behind keys, where there are some."""
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize")


def check_key(request: Request, options: AppOptions) -> str:
    """Who asks, by key; a name that tells nothing of the key.

    Raises:
      ApiError: no key, or a wrong one.
    """
    if not options.api_keys:
        return ""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    key = given.strip().encode() if scheme.lower() == "bearer" else b""
    # All are compared, so that time tells nothing.
    known = [hmac.compare_digest(key, each.encode()) for each in options.api_keys]
    if not any(known):
        raise ApiError(
            "wrong API key; expected a header 'Authorization: Bearer KEY'"
            if key
            else "no API key; expected a header 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
        )
    return f"key:{hashlib.sha256(key).hexdigest()[:12]}"


async def until_gone(request: Request) -> None:
    """Returns when the client has left; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def note(request: Request, /, **values: Any) -> None:
    """Says something of a request in its line of the log; never what it says."""
    request.scope.setdefault("jaxspark.log", {}).update(values)


def error_response(error: ApiError) -> JSONResponse:
    """An error as clients of OpenAI's know it."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def cors(options: AppOptions) -> dict[str, Any]:
    """What `CORSMiddleware` is told for pages that may ask."""
    return {
        "allow_origins": options.cors_origins,
        "allow_methods": ["GET", "POST"],
        # Clients add some of their own; no page gets at cookies by that.
        "allow_headers": ["*"],
        "expose_headers": ["X-Request-Id", "Retry-After"],
    }


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error an error object."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        note(request, error=error.code or error.type)
        return error_response(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method[:20], request.url.path[:200]
        message = {
            404: f"there is nothing at {method} {path}",
            405: f"{path} does not take {method}",
        }.get(error.status_code, str(error.detail))
        response = error_response(ApiError(message, status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(HTTPException, http)


class Logged:
    """Gives each request an id and a line in the log, as JSON and without prompts.

    Where requests are traced, an answer's span tells the same.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None):
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        id = request_id(Headers(scope=scope))
        values: dict[str, Any] = {}
        begun, status = time.monotonic(), 0
        scope["jaxspark.id"], scope["jaxspark.log"] = id, values
        scope["jaxspark.begun"] = begun
        span = None if self.tracing is None else self.tracing.begin(scope)

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except Exception:
            log.exception("request %s failed", id)
            if status:
                raise  # The connection is closed; the answer was begun.
            failed = ApiError("the server failed", status=500, type="server_error")
            await error_response(failed)(scope, receive, sent)
        finally:
            line = {
                "id": id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or CLIENT_GONE,
                "seconds": round(time.monotonic() - begun, 4),
                **values,
            }
            quiet = scope["path"] in _QUIET
            log.log(logging.DEBUG if quiet else logging.INFO, json.dumps(line))
            if self.tracing is not None and span is not None:
                self.tracing.end(span, line)


def request_id(headers: Mapping[str, str]) -> str:
    """The client's id of a request, if it is one, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
