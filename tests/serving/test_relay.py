"""A request goes to another replica as long as nothing of its answer was sent."""

import asyncio
import contextlib
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from jaxspark.serving import relay
from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.relay import Relay, answered_by

LIMITS = AppOptions(most_body_bytes=100, body_seconds=0.3)


class LostError(Exception):
    """A replica is."""


class Replicas:
    """Applications that are asked in turn, some of which are lost on the way.

    Attributes:
      asked: how many were.
      left: how often an application's client left before its end.
    """

    def __init__(self, *, lost_after=(), refuse=0):
        self.asked = self.left = 0
        self._lost_after, self._refuse = list(lost_after), refuse
        self.app = Starlette(
            routes=[
                Route("/whole", self.whole, methods=["POST"]),
                Route("/stream", self.stream, methods=["POST"]),
            ]
        )

    async def whole(self, request: Request):
        if self.asked <= self._refuse:
            return JSONResponse({"error": "full"}, status_code=503)
        return JSONResponse({"said": (await request.body()).decode()})

    async def stream(self, request: Request):
        async def events():
            try:
                for number in range(4):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.left += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    async def ask(self, asked):
        self.asked += 1
        most = self._lost_after.pop(0) if self._lost_after else None
        async with contextlib.aclosing(answered_by(self.app, asked)) as messages:
            count = 0
            async for message in messages:
                if count == most:
                    raise LostError
                count += 1
                yield message

    def post(self, path, limits=LIMITS, **options):
        """A response through a relay."""
        app = Relay(self.ask, lost=LostError, options=limits)

        async def posted():
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://relay"
            ) as http:
                return await http.post(path, **options)

        return asyncio.run(posted())


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(relay, "PAUSE_S", 0.0)


# After no message, and after the head of an answer.
@pytest.mark.parametrize("lost_after", [(0,), (1,), (1, 0, 1)])
@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_a_replica_that_is_lost_before_it_answers_is_replaced(path, lost_after):
    replicas = Replicas(lost_after=lost_after)
    answer = replicas.post(path, content="hello")
    assert answer.status_code == 200
    if path == "/whole":
        assert answer.json() == {"said": "hello"}
    else:
        assert answer.text == "".join(f"data: {n}\n\n" for n in range(4))
    assert replicas.asked == len(lost_after) + 1


def test_a_stream_that_was_begun_ends_with_an_error():
    replicas = Replicas(lost_after=(3,))
    answer = replicas.post("/stream")
    events = answer.text.strip().split("\n\n")
    assert events[:2] == ["data: 0", "data: 1"] and events[-1] == "data: [DONE]"
    told = json.loads(events[2].removeprefix("data: "))["error"]
    assert told["message"] == "the replica that answered was lost"
    assert replicas.asked == 1 and len(events) == 4


def test_a_replica_that_is_full_is_passed_over():
    replicas = Replicas(refuse=2)
    assert replicas.post("/whole", content="x").json() == {"said": "x"}
    assert replicas.asked == 3
    # Where all are, the client is told what they say.
    answer = Replicas(refuse=99).post("/whole")
    assert (answer.status_code, answer.json()) == (503, {"error": "full"})


def test_without_replicas_there_is_an_error():
    answer = Replicas(lost_after=[0] * 9).post("/whole")
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["code"] == "no_replica"


def test_bodies_that_are_long_or_slow_reach_no_replica(caplog):
    async def slowly():
        yield b"x"
        await asyncio.sleep(5)

    async def endlessly():
        while True:
            yield b"x"

    replicas = Replicas()
    with caplog.at_level("INFO", "jaxspark.requests"):
        for content, status in (
            (b"x" * 101, 413),
            (endlessly(), 413),
            (slowly(), 408),
        ):
            answer = replicas.post("/whole", content=content)
            error = answer.json()["error"]
            assert answer.status_code == status and "body" in error["message"]
            line = json.loads(caplog.records[-1].message)
            assert line["status"] == status and line["path"] == "/whole"
            assert answer.headers["X-Request-Id"] == line["id"]
    assert replicas.asked == 0 and len(caplog.records) == 3


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize"])
def test_without_a_key_no_body_is_read(path):
    async def body():
        raise AssertionError
        yield

    limits, replicas = AppOptions(api_keys=("a-key",)), Replicas()
    answer = replicas.post(path, limits, content=body())
    assert answer.status_code == 401 and replicas.asked == 0
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    right = {"Authorization": "Bearer a-key"}
    assert replicas.post(path, limits, headers=right).status_code == 404
    assert replicas.post("/whole", limits, content="x").status_code == 200
    assert replicas.asked == 2


def test_a_client_that_leaves_leaves_the_replica():
    replicas = Replicas()
    app = Relay(replicas.ask, lost=LostError)

    async def leave():
        left, sent = asyncio.Event(), []
        messages = [{"type": "http.request", "body": b""}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            left.set()

        scope = {"type": "http", "method": "POST", "path": "/stream", "headers": []}
        scope |= {"query_string": b"", "http_version": "1.1"}
        await asyncio.wait_for(app(scope, receive, send), 5)
        await asyncio.sleep(0.1)
        return len(sent)

    assert asyncio.run(leave()) < 5
    assert replicas.left == 1
