"""Starts an oracle (`oracle.py`, `peers.py`) in its own interpreter, talks to it."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def oracle_python() -> str | None:
    """The interpreter that has PyTorch: $JAXSPARK_ORACLE_PYTHON or .venv-oracle."""
    chosen = os.environ.get("JAXSPARK_ORACLE_PYTHON")
    if chosen:
        return chosen
    local = ROOT / ".venv-oracle/bin/python"
    return str(local) if local.exists() else None


class Oracle:
    """One running oracle process."""

    def __init__(self, python: str, program: str = "oracle.py"):
        self.folder = tempfile.TemporaryDirectory(prefix="oracle-")
        self.errors = open(Path(self.folder.name, "stderr"), "w+")
        self.process = subprocess.Popen(
            [python, str(HERE / program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        # An environment without PyTorch should be found out here, not in a test.
        self.ask({})

    def ask(self, request: dict) -> dict[str, np.ndarray]:
        """Sends a request without "out"; returns its arrays by name."""
        out = Path(self.folder.name, "out.npz")
        out.unlink(missing_ok=True)
        wanted = bool(request)
        if wanted:
            request = request | {"out": str(out)}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": self._log()}
        if "error" in reply:
            raise RuntimeError(f"the oracle failed:\n{reply['error']}")
        if not wanted:
            return {}
        with np.load(out) as arrays:
            return dict(arrays)

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()
        self.folder.cleanup()

    def _log(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        return self.errors.read()[-4000:]
