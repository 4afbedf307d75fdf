"""Serves a model to OpenAI's clients, and to people who open its address in a browser.

  jaxspark serve                                  at http://127.0.0.1:8000
  jaxspark serve --draft=hybrid:dspark --slots=4
  jaxspark serve --host=0.0.0.0 --api_key_file=keys.txt
  jaxspark serve --mesh=model:8 --distributed=auto     on every host of a slice

Any client of OpenAI's works with the base URL http://127.0.0.1:8000/v1. Needs more
packages than the library: pip install 'jaxspark[serve]'.
"""

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from jaxspark.configuration import option
from jaxspark.launch import program
from jaxspark.launch.serve_options import (
    ServeOptions,
    check_packages,
    make_service,
    show_logs,
)
from jaxspark.parallel.messages import Receiver, Sender
from jaxspark.parallel.processes import leave
from jaxspark.pods.serving import PORT

if TYPE_CHECKING:
    from jaxspark.serving import Engine

# Begins the keys of messages between the processes of a job.
TOPIC = "serve"


@dataclass(frozen=True, kw_only=True)
class Config(ServeOptions):
    """What is served, to whom, and how much of it."""

    host: str = option("Address to listen at; 0.0.0.0 is all there are.", "127.0.0.1")
    port: int = option("Port to listen at; 0 takes a free one.", PORT, at_least=0)


def main(config: Config) -> int:
    """Loads, compiles, serves until it is told to end.

    Of several processes, the first serves, and the others do what it tells them.
    """
    check_packages()
    show_logs()
    return _follow(config) if jax.process_index() else _lead(config)


def _lead(config: Config) -> int:
    from jaxspark.serving.server import Server, bound, serve

    # First of all: loading takes a while.
    listener = bound(config.host, config.port)
    others = None
    if jax.process_count() > 1:
        # JAX's own patience would end this process without a word.
        others = Sender(TOPIC, patience_s=config.heartbeat_seconds / 2)
    service = make_service(config, on_failure=lambda: server.end(), others=others)
    server = Server(
        service.app,
        service.engine,
        listener=listener,
        drain_seconds=config.drain_seconds,
        header_seconds=config.body_seconds,
        on_started=lambda: print(
            f"{service.name} at {server.address} (compiling; /ready tells when)",
            flush=True,
        ),
    )
    if others is not None:
        others.watch(
            lost=lambda process: service.engine.fail(
                f"process {process} of this server was lost"
            ),
            leaving=lambda process: server.drain(),
        )
    service.engine.start()
    status = serve(server, service.engine)
    if status and others is not None:
        leave(status)  # JAX would wait for the others.
    return _ended(service.engine, status)


def _follow(config: Config) -> int:
    receiver = Receiver(TOPIC)

    def asked(number: int, frame: object) -> None:
        receiver.leaving = True

    # Process 0 finishes what it has, and tells all when to end.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, asked)
    engine = make_service(config, on_failure=lambda: None).engine
    engine.follow(receiver)
    return _ended(engine, 0)


def _ended(engine: "Engine", status: int) -> int:
    """The exit status. Ends the process if a thread compiles, which Python would join.

    Nothing is lost: no request was taken on.
    """
    if not engine.compiled:
        if jax.process_count() > 1:
            jax.distributed.shutdown()  # Waits until all are told.
        leave(status)
    return status


if __name__ == "__main__":
    program.run(main, Config)
