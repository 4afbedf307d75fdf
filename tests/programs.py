"""What tests of whole programs share."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launcher(name: str) -> list[str]:
    """The command that runs a launcher, from any folder."""
    return [sys.executable, "-m", "jaxspark", name]


def environment(folder) -> dict[str, str]:
    """A process's environment: CPU, compiled programs kept in `folder`, wide tables.

    It imports the sources that are tested, whatever is installed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "COLUMNS": "200",
    }
