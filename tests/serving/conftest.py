"""One server for a module's tests of its answers; those that end one make their own.

No longer than a module: between modules a worker may forget its compiled programs, and
workers steal tests from each other, so those of other packages run in between.
"""

import httpx
import openai
import pytest

from jaxspark.serving.tracing import Tracing
from tests.serving.hosting import KEY, hosted

HEADERS = {"Authorization": f"Bearer {KEY}"}


def traced(exporter):
    """Tracing that exports at once; None if nothing does."""
    if exporter is None:
        return None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider, "tiny")


@pytest.fixture(scope="module")
def exporter():
    """Keeps the server's spans; None without OpenTelemetry's SDK."""
    try:
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
            InMemorySpanExporter,
        )
    except ModuleNotFoundError:
        return None
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(exporter):
    with hosted(tracing=traced(exporter)) as here:
        yield here
        assert here.engine.wait_idle(10)
        assert here.engine._batch.idle and here.engine._batch.free == 3
        assert here.engine.stats().late_compilations == 0
    assert here.status == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=30) as http:
        yield http
