"""A server in this process, on a port of its own."""

import contextlib
import threading
import time

from jaxspark.decoding import DecodeOptions
from jaxspark.drafters import NgramDrafter
from jaxspark.serving import Engine, Pace, QueueLimits, Served
from jaxspark.serving.app import make_app
from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.metrics import Metrics
from jaxspark.serving.server import Server, bound, serve
from jaxspark.text.formats import CALLS
from tests.checkpoints import tiny

KEY = "a-key"
CONTEXT = 110


def target():
    """Speaks bytes, and repeats itself, so that drafts are accepted."""
    made = tiny.target()
    made.model.embed_tokens.weight[...] *= 30.0
    return made


class Hosted:
    """A running server.

    Attributes:
      engine: behind it.
      target: that it serves.
      url: where it is.
      status: what its process would exit with, once it has ended.
    """

    def __init__(self, tracing=None, **options):
        self.target, self.status = target(), None
        served = Served.of(
            self.target, context=CONTEXT, most_output=60, calls=CALLS["llama3"]
        )
        metrics = Metrics(served.name)
        self.engine = Engine(
            self.target,
            NgramDrafter(block_length=3, shortest=1),
            slots=3,
            context=CONTEXT,
            chunk=32,
            options=DecodeOptions(coupling="gumbel"),
            queue=QueueLimits(requests=8, tokens=600),
            pace=Pace(most=4),
            observers=[metrics],
            on_failure=lambda: self.server.end(),
        )
        metrics.watch(self.engine)
        listening = threading.Event()
        values = {"api_keys": (KEY,), "most_body_bytes": 20_000, "body_seconds": 1.0}
        self.server = Server(
            make_app(
                self.engine,
                served,
                AppOptions(**(values | options)),
                metrics,
                tracing,
            ),
            self.engine,
            listener=bound("127.0.0.1", 0),
            drain_seconds=20,
            header_seconds=1.0,
            on_started=listening.set,
        )
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.engine.start()
        listening.wait()
        self.engine.wait_ready()
        self.url = self.server.address

    def _run(self):
        self.status = serve(self.server, self.engine)

    def slow(self, monkeypatch, seconds=0.03):
        """Makes every turn take a while."""
        slowed(self.engine, monkeypatch, seconds)

    def end(self):
        """Waits for its end; its exit status."""
        self.server.drain()
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.status


def slowed(engine, monkeypatch, seconds=0.03):
    """Makes every turn take a while."""
    step = engine._batch.step

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return step(*args, **kwargs)

    monkeypatch.setattr(engine._batch, "step", slow)


@contextlib.contextmanager
def hosted(**options):
    """Within it a server runs."""
    here = Hosted(**options)
    try:
        yield here
    finally:
        here.end()
