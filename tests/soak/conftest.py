"""What takes long, or wants a browser: `make soak`, and no part of `make test`.

Its files are no `test_*.py`, so that a run of all tests passes them over.
"""

import json

import httpx
import pytest

from jaxspark.benchmark.serving.process import serving
from jaxspark.checkpoints import save_target
from tests.programs import environment
from tests.serving import hosting

SLOTS = 4
CONTEXT = 110


def pytest_addoption(parser):
    parser.addoption("--requests", type=int, default=10_000, help="of the long run")
    parser.addoption("--disconnects", type=int, default=1_000)
    parser.addoption("--examples", type=int, default=150, help="per route and kind")
    parser.addoption("--screenshot", help="PNG file for what the browser shows")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A target that speaks bytes."""
    folder = tmp_path_factory.mktemp("soak") / "target"
    save_target(folder, hosting.target())
    return folder


@pytest.fixture
def start(folder):
    """Starts a server as a process; it is stopped in the end."""

    def started(*flags):
        return serving(
            f"--target={folder}",
            "--served_name=tiny",
            f"--slots={SLOTS}",
            f"--context={CONTEXT}",
            *flags,
            # One device, as servers have; programs are compiled as they are for them.
            environment=environment() | {"JAX_NUM_CPU_DEVICES": "1"},
        )

    return started


class Seen:
    """What a server shows operators."""

    def __init__(self, url):
        self.stats = httpx.get(f"{url}/stats", timeout=30).json()
        scraped = httpx.get(f"{url}/metrics", timeout=30).text
        lines = [line for line in scraped.split("\n") if line[:1] not in ("#", "")]
        self.metrics = {}
        for line in lines:
            name, value = line.rsplit(" ", 1)
            self.metrics[name] = float(value)

    def value(self, name):
        """A metric without labels that differ."""
        [found] = [v for k, v in self.metrics.items() if k.partition("{")[0] == name]
        return found

    @property
    def in_use(self):
        """Everything that must be 0 when nobody asks: slots, queue, share of caches."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting",
                 "vllm:kv_cache_usage_perc", "jaxspark:waiting_tokens")  # fmt: skip
        found = {name: self.value(name) for name in names}
        return {name: value for name, value in found.items() if value}


def body(**changes):
    """A completion of an exact length."""
    values = {"model": "tiny", "prompt": "abcabc", "max_tokens": 20}
    return values | {"ignore_eos": True} | changes


def whole(response):
    """Whether an answer is complete: all its tokens, and the end of its stream."""
    if response.headers["content-type"] == "application/json":
        return response.json()["choices"][0]["finish_reason"] == "length"
    events = response.text.strip().split("\n\n")
    ended = json.loads(events[-2].removeprefix("data: "))["choices"][0]
    return events[-1] == "data: [DONE]" and ended["finish_reason"] == "length"


def figure(said):
    """Tells a figure; `make soak` does not capture what is printed."""
    print(f"\n  {said}", flush=True)
