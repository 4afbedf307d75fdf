"""A server of ours as a process of its own, for those who measure or torment it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping

# Lines of its output that are kept for error messages.
_LINES = 200


class ServerProcess:
    """`jaxspark serve` with some flags, at a free port.

    Attributes:
      process: of the operating system.
      url: where it listens.
      model: what clients call it.
      lines: what it printed last.
    """

    def __init__(
        self,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        ready_seconds: float = 900.0,
    ):
        """Starts it and waits until it is ready.

        Args:
          *flags: of `jaxspark serve`, but for `--port`.
          environment: of the process; None for that of this one.
          ready_seconds: in which it must be ready.

        Raises:
          ValueError: it did not start.
        """
        self.lines: deque[str] = deque(maxlen=_LINES)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxspark", "serve", "--port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ if environment is None else environment,
        )
        try:
            self.model, self.url = self._announced()
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            self._wait_ready(ready_seconds)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def end(self, timeout_s: float = 120.0) -> int:
        """Sends SIGTERM and waits; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self._reader.join()

    def resident_bytes(self) -> int:
        """Memory that it holds now; only where there is /proc."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _announced(self) -> tuple[str, str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            name, at, rest = line.partition(" at http://")
            if at:
                return name, f"http://{rest.split()[0]}"
        raise ValueError(f"the server did not start: {''.join(self.lines)}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def _wait_ready(self, seconds: float) -> None:
        late = time.monotonic() + seconds
        while time.monotonic() < late:
            if self.process.poll() is not None:
                raise ValueError(f"the server ended: {''.join(self.lines)}")
            # Refused, not ready, or too busy to answer.
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/ready", timeout=10).close()
                return
            time.sleep(0.2)
        raise ValueError(f"the server was not ready within {seconds:g} s")


@contextlib.contextmanager
def serving(
    *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Within it a server runs; see `ServerProcess`."""
    server = ServerProcess(*flags, environment=environment)
    try:
        yield server
    finally:
        server.end()
