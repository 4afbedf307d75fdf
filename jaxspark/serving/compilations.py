"""How many programs a thread has compiled: after a server is ready, none."""

import threading
from types import TracebackType
from typing import Self

import jax.monitoring

# JAX tells of it in the thread that compiles, whether or not a cache had the program.
_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts programs that the thread which enters it compiles.

    Attributes:
      count: of them.
      seconds: that they took.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._thread: int | None = None

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _EVENT and threading.get_ident() == self._thread:
            self.count += 1
            self.seconds += duration_secs
