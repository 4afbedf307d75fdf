"""Requests that are wrong, huge, slow, or made up: answers or clear errors, no 5xx."""

import contextlib
import socket
import threading
import time

import httpx

from tests.serving.fuzzing import fuzz
from tests.soak.conftest import Seen, body, figure

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_requests_made_from_the_schema_get_no_5xx_and_do_not_hang(
    start, pytestconfig, seed
):
    examples = pytestconfig.getoption("examples")
    with start() as server:
        told = fuzz(server.url, {}, examples=examples, number=seed)
        for route, statuses in told.items():
            figure(f"{route}: {dict(sorted(statuses.items()))}")
        assert Seen(server.url).value("jaxspark:compilations_after_ready") == 0
        assert server.end() == 0


def test_bodies_of_100_megabytes_are_refused_and_not_kept(start):
    with start() as server:
        before = server.resident_bytes()
        part = b"x" * 2**20

        def parts():
            yield b'{"model": "tiny", "prompt": "'
            for _ in range(100):
                yield part

        for content in (b'{"prompt": "' + part * 100, parts()):
            headers = {"Content-Type": "application/json"}
            with contextlib.suppress(httpx.WriteError):
                # Some servers close before all was sent; then nothing is read.
                response = httpx.post(
                    f"{server.url}/v1/completions",
                    content=content,
                    headers=headers,
                    timeout=60,
                )
                assert response.status_code == 413
        grown = server.resident_bytes() - before
        figure(f"two bodies of 100 MiB: resident memory {grown / 2**20:+.1f} MiB")
        assert grown < 40 * 2**20
        assert (
            httpx.post(f"{server.url}/v1/completions", json=body()).status_code == 200
        )


def test_slow_clients_hold_nobody_up_and_are_given_up(start):
    with start("--body_seconds=2") as server:
        host, port = server.url.removeprefix("http://").split(":")
        connections = [socket.create_connection((host, int(port))) for _ in range(200)]
        for number, each in enumerate(connections):
            # Half of them never end their header, half never their body.
            slow = b"X-Slow: " if number % 2 else b"Content-Length: 1000\r\n\r\n{"
            each.sendall(HEAD + slow)
        going = True

        def drip():
            while going:
                for each in connections:
                    with contextlib.suppress(OSError):
                        each.sendall(b"a")
                time.sleep(0.5)

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            times = []
            for _ in range(20):
                begun = time.monotonic()
                answer = httpx.post(f"{server.url}/v1/completions", json=body())
                times.append(time.monotonic() - begun)
                assert answer.status_code == 200
            figure(f"beside 200 slow clients: answers within {max(times):.2f} s")
            assert max(times) < 5
            closed = 0
            for each in connections[::2]:
                each.settimeout(10)
                closed += b" 408 " in each.recv(200)
            assert closed == 100
        finally:
            going = False
            thread.join()
        begun = time.monotonic()
        # Those that still hold their connections do not hold up its end.
        assert server.end() == 0
        figure(
            f"with 100 unfinished headers it ended in {time.monotonic() - begun:.1f} s"
        )
        assert time.monotonic() - begun < 20
        for each in connections:
            each.close()
