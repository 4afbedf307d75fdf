"""What tests of whole programs share: launchers called here, or as processes."""

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).parents[1]


def call(folder: Path, launcher: ModuleType, **options) -> tuple[int, str]:
    """Calls a launcher's `main` in a folder; returns its status and what it printed.

    A refusal has what was printed before it as a note.
    """
    printed = io.StringIO()
    with (
        chdir(folder),
        mock.patch.dict(os.environ, COLUMNS="200"),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        try:
            status = launcher.main(launcher.Config(**options))
        except ValueError as error:
            error.add_note(printed.getvalue())
            raise
    return status or 0, printed.getvalue()


def command(name: str, *arguments: str, **options) -> list[str]:
    """The command line of a launcher, with flags for options."""
    flags = (
        f"--{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in options.items()
    )
    return [sys.executable, "-m", "jaxspark", name, *arguments, *flags]


def environment() -> dict[str, str]:
    """A process's environment: CPU, wide tables, and the sources that are tested.

    `conftest.py` adds how programs are compiled, and where they are kept for others.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "200",
    }


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a folder."""
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
