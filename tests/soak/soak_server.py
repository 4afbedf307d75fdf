"""A server that is tormented for a while: nothing leaks, nothing is lost."""

import asyncio
import random as randomness
import signal
import time

import httpx
import pytest

from tests.soak.conftest import Seen, body, figure, whole

# Clients at once.
CLIENTS = 12
# They leave after about so many seconds.
PATIENCE_S = 0.3


def idle(url, seconds=60):
    """What is seen once nothing is in use."""
    late = time.monotonic() + seconds
    while (seen := Seen(url)).in_use and time.monotonic() < late:
        time.sleep(0.2)
    assert not seen.in_use
    return seen


@pytest.fixture
def random(seed):
    return randomness.Random(seed)


async def everybody(count, client, *, clients=CLIENTS):
    """Lets clients do something so many times together."""
    numbers = iter(range(count))

    async def one():
        for number in numbers:
            await client(number)

    await asyncio.gather(*(one() for _ in range(clients)))


def test_clients_that_leave_at_random_moments_leave_nothing_behind(
    start, pytestconfig, random
):
    count = pytestconfig.getoption("disconnects")
    with start() as server:

        async def leave(number):
            asked = body(
                stream=bool(number % 2),
                n=random.choice((1, 1, 2)),
                max_tokens=random.randint(1, 90),
            )
            wanted.append(asked["n"] * asked["max_tokens"])
            request = http.stream("POST", "/v1/completions", json=asked)

            async def read():
                async with request as response:
                    async for _ in response.aiter_bytes():
                        pass

            try:
                await asyncio.wait_for(read(), random.expovariate(1 / PATIENCE_S))
            except TimeoutError:
                left.append(number)

        async def run():
            nonlocal http
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=server.url, timeout=60, limits=limits
            ) as http:
                await everybody(count, leave)

        http, left, wanted = None, [], []
        asyncio.run(run())
        seen = idle(server.url)
        decoded = seen.stats["output_tokens"]
        figure(
            f"{count} requests, {len(left)} left early: {decoded} of {sum(wanted)} "
            "tokens decoded, nothing in use afterwards"
        )
        assert len(left) > count / 4
        # What nobody waits for is not decoded to its end.
        assert decoded < 0.8 * sum(wanted)
        assert seen.value("jaxspark:compilations_after_ready") == 0
        assert (
            httpx.post(f"{server.url}/v1/completions", json=body()).status_code == 200
        )
        assert server.end() == 0


def test_memory_stays_and_nothing_is_compiled_over_many_requests(
    start, pytestconfig, random
):
    count = pytestconfig.getoption("requests")
    with start("--max_queued=64") as server:

        async def ask(number):
            kind = random.choice(("completion", "chat", "stream", "several", "wrong"))
            path, asked = "/v1/completions", body(max_tokens=random.randint(1, 30))
            asked["prompt"] = "".join(
                random.choices("abcdef ", k=random.randint(1, 70))
            )
            if kind == "chat":
                path = "/v1/chat/completions"
                asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
            elif kind == "several":
                asked |= {"n": 3, "temperature": 0.8, "seed": number}
            elif kind == "wrong":
                asked["prompt"] *= 20
            response = await http.post(path, json=asked | {"stream": kind == "stream"})
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

        async def run(number):
            nonlocal http
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
                await everybody(number, ask)

        http, statuses = None, {}
        asyncio.run(run(warm := max(count // 5, 200)))
        before = server.resident_bytes()
        asyncio.run(run(count))
        after, seen = server.resident_bytes(), idle(server.url)
        figure(
            f"{count} requests after {warm}: resident {before / 2**20:.1f} MiB, then "
            f"{after / 2**20:.1f} MiB ({100 * (after / before - 1):+.2f} %); {statuses}"
        )
        assert set(statuses) == {200, 400}
        assert after < 1.02 * before
        assert seen.value("jaxspark:compilations_after_ready") == 0


@pytest.mark.parametrize("turn", range(3))
def test_sigterm_under_load_loses_nothing(start, turn, random):
    with start() as server:
        told = []

        async def ask(number):
            asked = body(stream=bool(number % 2), max_tokens=90)
            # A connection of its own each, as behind a proxy that does not keep them.
            url = server.url
            async with httpx.AsyncClient(
                base_url=url, timeout=60, verify=False
            ) as http:
                try:
                    told.append(await http.post("/v1/completions", json=asked))
                except httpx.ConnectError:
                    told.append(None)
            await asyncio.sleep(random.uniform(0, 0.02))

        async def run():
            asking = asyncio.ensure_future(everybody(300, ask, clients=24))
            enough = random.randint(5, 100)
            while len(told) < enough:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            await asking

        asyncio.run(run())
        assert server.process.wait(60) == 0
    answers = [each for each in told if each is not None]
    good = [each for each in answers if each.status_code == 200]
    refused = [each for each in answers if each.status_code == 503]
    figure(
        f"SIGTERM: {len(good)} answers, {len(refused)} times 503, "
        f"{len(told) - len(answers)} times nobody listened"
    )
    assert len(told) == 300 and len(good) + len(refused) == len(answers) and good
    assert all(map(whole, good))
    for each in refused:
        assert (
            each.json()["error"]["code"] == "draining" and each.headers["Retry-After"]
        )
