"""What `compile_check` says of what does not fit or cannot be, in lines of JSON."""

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from jaxspark.launch.compile_check import Config, main

FITS = Config(
    config="tiny_llama", topology="v5e:2x2", mesh="data:4", slots=4, capacity=128
)
# Of the second, caches alone are larger than memory.
TRIALS = (
    FITS,
    replace(FITS, slots=4096, capacity=2**18),
    replace(FITS, mesh="data:3"),
    replace(FITS, mesh="data:2,model:2", slots=5),
    replace(FITS, mesh="expert:2,model:2", config="deepseek_v4_tiny", slots=3),
    replace(FITS, topology="v5e:3x5"),
)


def tried(config: Config, path: Path) -> dict:
    """The exit status, what was printed, the error and the figures."""
    said, error, status = io.StringIO(), None, None
    with contextlib.redirect_stdout(said):
        try:
            status = main(replace(config, json_out=str(path)))
        except ValueError as refused:
            error = str(refused)
    figures = json.loads(path.read_text()) if path.exists() else None
    return {
        "status": status, "said": said.getvalue(), "error": error, "figures": figures
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for index, trial in enumerate(TRIALS):
            print(json.dumps(tried(trial, Path(folder) / f"{index}.json")))
