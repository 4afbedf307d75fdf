"""Two processes that are one program."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.programs import ROOT


def member(index: int, port: int, *, supervised: bool) -> dict[str, str]:
    """The environment by which a process is one of two that meet at a port.

    Args:
      index: which of them.
      port: where they meet.
      supervised: whether it has a parent that watches over it.
    """
    alone = {} if supervised else {"JAXSPARK_SUPERVISED": "1"}
    return alone | {
        "JAXSPARK_COORDINATOR": f"localhost:{port}",
        "JAXSPARK_PROCESSES": "2",
        "JAXSPARK_PROCESS_INDEX": str(index),
    }


class Pair:
    """Two processes of four devices each, running one command.

    Standard output has lines of ours alone: the runtime's go to errors, in pieces, so
    there only what a line contains can be asked.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        module: str = "jaxspark",
        supervised: bool = True,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.children = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=folder,
                env=os.environ
                | member(index, port, supervised=supervised)
                | {
                    "PYTHONPATH": str(ROOT),
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": "4",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]

    def ends(self, seconds: float = 300) -> list[tuple[int, str, str]]:
        """Status, output and errors of each."""
        both = [child.communicate(timeout=seconds) for child in self.children]
        return [(child.returncode, *said) for child, said in zip(self.children, both)]
