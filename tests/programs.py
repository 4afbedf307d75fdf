"""What tests of whole programs share."""

import os


def environment(folder) -> dict[str, str]:
    """A process's environment: CPU, compiled programs kept in `folder`, wide tables."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "COLUMNS": "200",
    }
