"""Clients below HTTP: they send headers slowly, nonsense, or when it ends."""

import json
import socket
import time

import pytest

from tests.serving.hosting import KEY, hosted

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server():
    with hosted() as here:
        yield here
    assert here.status == 0


def connected(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer(connection):
    """Status, body and whether the connection was closed, of one answer."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = dict(
        line.decode().strip().lower().split(": ", 1)
        for line in iter(file.readline, b"\r\n")
    )
    body = json.loads(file.read(int(headers["content-length"])))
    return status, body, headers.get("connection") == "close"


@pytest.mark.parametrize("sent", [b"", GET, b"GET"], ids=["nothing", "most", "a word"])
def test_a_header_that_never_ends_is_given_up(server, sent):
    begun = time.monotonic()
    with connected(server) as connection:
        connection.sendall(sent)
        while time.monotonic() < begun + 0.7:
            # Whoever sends now and then is no less slow.
            time.sleep(0.1)
            connection.sendall(b"a" if sent else b"")
        status, body, closed = answer(connection)
        assert (status, closed) == (408, True)
        assert body["error"]["message"] == "no whole header has come within 1 s"
        assert connection.recv(1) == b""
    assert 0.9 < time.monotonic() - begun < 5


def test_a_second_header_is_given_up_as_well(server):
    with connected(server) as connection:
        connection.sendall(GET + b"\r\n")
        assert answer(connection) == (200, {"status": "ready"}, False)
        # An idle connection may stay; one on which a request has begun may not.
        time.sleep(1.3)
        connection.sendall(GET)
        assert answer(connection)[0] == 408


def test_an_answer_takes_longer_than_a_header_may(server, monkeypatch):
    server.slow(monkeypatch, 0.1)
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 50, "ignore_eos": True}
    content = json.dumps(body).encode()
    with connected(server) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\n"
            + f"Authorization: Bearer {KEY}\r\n".encode()
            + f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        begun = time.monotonic()
        assert answer(connection)[0] == 200
        assert time.monotonic() - begun > 1.1


def test_what_is_no_http_gets_an_error_object(server):
    with connected(server) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, body, closed = answer(connection)
        assert (status, closed) == (400, True)
        assert body["error"]["type"] == "invalid_request_error"


def test_a_request_that_is_on_its_way_when_the_server_ends_gets_an_answer():
    with hosted() as here:
        with connected(here) as new, connected(here) as used:
            used.sendall(GET + b"\r\n")
            assert answer(used)[0] == 200
            here.server.drain()
            time.sleep(0.3)
            for connection in (new, used):
                connection.sendall(GET.replace(b"health", b"ready") + b"\r\n")
                status, body, _ = answer(connection)
                assert status == 503 and body["status"] in ("draining", "stopped")
                assert connection.recv(1) == b""
        here.thread.join(10)
        assert here.status == 0
