"""A program of another library, decoding beside ours."""

import contextlib
import json
import os
import subprocess
from pathlib import Path


class Peer:
    """The transformers program of `peers`, kept running."""

    def __init__(self, python: str, folder: str):
        program = Path(__file__).parent / "peers" / "hf_transformers.py"
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(program), folder, str(os.cpu_count())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.version = self._read()["version"]

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError("the peer ended unexpectedly; its output is above")
        return json.loads(line)

    def decode(self, prompt: list[int], tokens: int) -> dict:
        """Greedy tokens and the seconds they took."""
        request = json.dumps({"prompt": prompt, "tokens": tokens})
        # One that has ended says so when it is read from.
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        return self._read()
