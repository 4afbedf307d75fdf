"""Replicas in a Ray cluster on this machine; one of them is killed under load."""

import asyncio
import contextlib
import json
import os
import random as randomness
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.programs import environment
from tests.soak.conftest import SLOTS, body, figure, whole

pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxspark[ray]'")

CLIENTS = 16
TITLE = b"ray::ServeReplica:jaxspark:Replica"


def replica_pids():
    """The processes of replicas with an engine, as Ray names them."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                (each / "cmdline")
                .read_bytes()
                .startswith(b"ray::ServeReplica:jaxspark:Replica")
            ):
                found.append(int(each.name))
    return found


@pytest.fixture
def address(folder):
    """Two replicas of the tiny target."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "jaxspark", "ray_serve", f"--port={port}"),
        *(f"--target={folder}", "--served_name=tiny", "--replicas=2"),
        *("--resources=CPU:0.5", f"--slots={SLOTS}", "--context=110", "--nogrammars"),
        *("--prefill_chunk=16", "--block_length=2"),
    ]
    process = subprocess.Popen(
        command,
        env=environment()
        | {
            "JAX_NUM_CPU_DEVICES": "1",
            # A busy machine takes longer than Ray waits.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        },
    )
    url = f"http://127.0.0.1:{port}"
    try:
        late = time.monotonic() + 550
        while True:
            assert process.poll() is None and time.monotonic() < late
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_a_killed_replica_loses_no_request_that_had_not_begun_to_stream(address):
    url, _ = address
    random = randomness.Random(0)
    # Completions repeat: every seed has one answer, whichever replica gives it.
    told, begun_at, broken, killed = {}, {}, [], []

    def asked(number):
        return body(
            max_tokens=random.randint(60, 90),
            temperature=0.8,
            seed=number % 4,
            stream=number % 3 > 0,
        )

    async def ask(http, number):
        values = asked(number)
        try:
            if not values["stream"]:
                answer = await http.post("/v1/completions", json=values)
                told[number] = answer
                return
            async with http.stream("POST", "/v1/completions", json=values) as answer:
                text = ""
                async for part in answer.aiter_text():
                    begun_at.setdefault(number, time.monotonic())
                    text += part
            told[number] = httpx.Response(
                answer.status_code, headers=answer.headers, text=text
            )
            if '"error"' in text:
                broken.append(number)
        except httpx.TransportError as error:
            broken.append((number, repr(error)))

    async def run():
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            numbers = iter(range(160))

            async def client():
                for number in numbers:
                    await ask(http, number)

            clients = [asyncio.ensure_future(client()) for _ in range(CLIENTS)]
            # More streams than one replica has slots: each has some.
            while len(told) < 40 or len(begun_at.keys() - told.keys()) <= SLOTS:
                await asyncio.sleep(0.002)
            pids = replica_pids()
            assert len(pids) == 2, pids
            killed.append(time.monotonic())
            os.kill(pids[0], signal.SIGKILL)
            await asyncio.gather(*clients)

    asyncio.run(run())
    # Lost are streams alone, and only those that had begun when the replica was killed.
    for each in broken:
        assert not isinstance(each, tuple), each
        assert begun_at[each] < killed[0] + 1.0
        events = told[each].text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error["message"] == "the replica that answered was lost"
    assert 0 < len(broken) <= SLOTS
    good = [each for number, each in told.items() if number not in broken]
    assert all(each.status_code == 200 for each in good), [
        (n, each.status_code, each.text[:200])
        for n, each in told.items()
        if each.status_code != 200
    ]
    assert all(map(whole, good)) and len(told) == 160
    figure(
        f"one of two Ray replicas killed among {CLIENTS} clients: {len(good)} of "
        f"{len(told)} answers whole, {len(broken)} streams that had begun ended with "
        "an error, none lost"
    )
    # Another takes its place.
    late = time.monotonic() + 300
    while len(replica_pids()) < 2 and time.monotonic() < late:
        time.sleep(1)
    assert len(replica_pids()) == 2
