"""A server of two processes with a device each, as on a slice of two hosts."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from tests.parallel.pairs import member
from tests.programs import environment

# One size of pass over prompts, short blocks: few programs are compiled.
FLAGS = (
    *("--target=target", "--served_name=tiny", "--mesh=model:2", "--slots=2"),
    *("--context=110", "--prefill_chunk=16", "--block_length=2"),
    # Both take the costs that one of them has measured.
    "--schedule=lagged",
)


def asked(prompt="abcabc", **changes):
    values = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "ignore_eos": True}
    return values | {"temperature": 0.8, "seed": 3} | changes


def is_ready(here):
    """Whether a pod takes requests."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{here.url}/ready").status_code == 200
    return False


class Pod:
    """Two processes that serve.

    Attributes:
      processes: the first of them answers HTTP.
      url: where it does.
      said: lines of each.
    """

    def __init__(self, folder, *flags, supervised=True, seconds=600, until=is_ready):
        with socket.socket() as free, socket.socket() as other:
            free.bind(("localhost", 0))
            other.bind(("localhost", 0))
            meeting, port = free.getsockname()[1], other.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.said = [[], []]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxspark", "serve", f"--port={port}", *flags],
                cwd=folder,
                env=environment()
                | member(index, meeting, supervised=supervised)
                | {"JAX_NUM_CPU_DEVICES": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(2)
        ]
        for process, said in zip(self.processes, self.said):
            threading.Thread(
                target=lambda process=process, said=said: said.extend(process.stdout),
                daemon=True,
            ).start()
        late = time.monotonic() + seconds
        while not until(self):
            assert time.monotonic() < late and not self.ended(), self.said
            time.sleep(0.1)

    def ended(self):
        return [each.poll() for each in self.processes if each.poll() is not None]

    def worker(self, index):
        """Processes that work; its parent waits for it."""
        watching = self.processes[index].pid
        children = Path(f"/proc/{watching}/task/{watching}/children")
        return [int(each) for each in children.read_text().split()]

    def kill(self, index):
        """Ends the process that works, at once."""
        for each in self.worker(index):
            os.kill(each, signal.SIGKILL)

    def ends(self, seconds=60):
        """Statuses of both."""
        return [each.wait(seconds) for each in self.processes]


@contextlib.contextmanager
def pod(folder, *flags, supervised=True, until=is_ready):
    """Within it two processes serve."""
    here = Pod(folder, *flags, supervised=supervised, until=until)
    try:
        yield here
    finally:
        for index, each in enumerate(here.processes):
            if each.poll() is None:
                here.kill(index)
                each.kill()
            each.wait()
