"""What the assembler says of a GPU's kernel; to be imported before JAX."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = tempfile.TemporaryDirectory()
os.environ["MOSAIC_GPU_DUMP_TO"] = _FOLDER.name


@contextmanager
def assembled() -> Iterator[dict]:
    """Filled behind it with most registers of a thread, and spilled bytes.

    Of the kernels that were compiled in between; empty for other chips.
    """
    found: dict[str, int] = {}
    before = set(Path(_FOLDER.name).iterdir())
    yield found
    notes = set(Path(_FOLDER.name).iterdir()) - before
    texts = [path.read_text() for path in notes if path.suffix == ".ptxas"]
    if texts:
        registers = [re.search(r"Used (\d+) registers", text) for text in texts]
        found["registers"] = max(int(each[1]) for each in registers if each)
        spilled = re.findall(r"(\d+) bytes spill", "".join(texts))
        found["spilled"] = sum(map(int, spilled))
