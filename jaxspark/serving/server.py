"""A process that serves: uvicorn around the application, and how it ends.

SIGTERM and SIGINT drain: no new requests are taken on, those that are here are
finished, within a time; then the process ends with 0. If the device fails, every
request gets an error, and the process ends with 1, so that it is started anew.
"""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from jaxspark.serving.connections import Connection
from jaxspark.serving.engine import Engine

# After the engine's own patience, for answers that are on their way.
_GRACE_S = 5


class Server(uvicorn.Server):
    """Uvicorn, ending as above."""

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        *,
        listener: socket.socket,
        drain_seconds: float = 60.0,
        header_seconds: float = 30.0,
        on_started: Callable[[], None] = lambda: None,
    ):
        """Makes a server that does not run yet.

        Args:
          app: what is served.
          engine: not started yet, or ready; it is stopped in the end.
          listener: see `bound`.
          drain_seconds: most seconds for requests that are here when it is to end.
          header_seconds: in which the header of a request must have come.
          on_started: called once it listens.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(  # type: ignore[arg-type]
                    Connection,
                    header_seconds=header_seconds,
                    is_ending=lambda: self.should_exit,
                ),
                ws="none",
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=int(drain_seconds) + _GRACE_S,
            )
        )
        self._engine, self._drain_seconds = engine, drain_seconds
        self._listener = listener
        self._draining, self._on_started = False, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup([self._listener])
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops to listen, and answers those who had connected before."""
        connected = []
        with contextlib.suppress(BlockingIOError):
            while True:
                connected.append(self._listener.accept()[0])
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for each in connected:
            await loop.connect_accepted_socket(self._connection, each)
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, and ends at once at a second SIGINT."""
        if self._draining and sig == signal.SIGINT:
            self.force_exit = True
        self.drain()

    def drain(self) -> None:
        """Begins to end; may be called from any thread."""
        if not self._draining:
            self._draining = True
            # In a thread: a signal may come while this one holds the engine's lock.
            threading.Thread(target=self._drain, name="drain", daemon=True).start()
        self.should_exit = True

    def end(self) -> None:
        """Ends because the engine has failed."""
        self.should_exit = True

    def _drain(self) -> None:
        self._engine.drain()
        self._engine.wait_idle(self._drain_seconds)
        self._engine.stop()

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
      ValueError: the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"cannot listen at {host}:{port}: {error}") from error
    return listener


def serve(server: Server, engine: Engine) -> int:
    """Serves until a signal or a failure; returns the process's exit status."""
    server.run()
    failed = engine.state == "failed"
    engine.stop()
    return 1 if failed else 0
