"""One server for all tests of what it answers; those that end one make their own."""

import httpx
import openai
import pytest

from tests.serving.hosting import KEY, hosted

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="session")
def server():
    with hosted() as here:
        yield here
        assert here.engine.wait_idle(10)
        assert here.engine._batch.idle and here.engine._batch.free == 3
        assert here.engine.stats().late_compilations == 0
    assert here.status == 0


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="session")
def http(server):
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=30) as http:
        yield http
