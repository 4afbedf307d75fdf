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
    """Filled behind it with registers of a thread, the most, and spilled bytes, of all.

    Of the kernels that were compiled in between; empty for other chips.
    """
    found: dict[str, int] = {}
    before = set(Path(_FOLDER.name).iterdir())
    yield found
    notes = set(Path(_FOLDER.name).iterdir()) - before
    texts = [path.read_text() for path in notes if path.suffix == ".ptxas"]
    for text in texts:
        registers = re.search(r"Used (\d+) registers", text)
        assert registers is not None, text
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        found["registers"] = max(found.get("registers", 0), int(registers[1]))
        found["spilled"] = found.get("spilled", 0) + spilled
