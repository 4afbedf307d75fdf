"""How a launcher runs: help, errors that a person can read, a compilation cache."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging as absl_logging

from jaxspark.configuration import Configuration
from jaxspark.launch.flags import help_text, parse

HELP = {"-h", "-?", "-help", "--help", "--helpshort"}
CLOSED_PIPE = 128 + 13


def run[C: Configuration](main: Callable[[C], int | None], config: type[C]) -> None:
    """Runs a launcher's `main` with the configuration of the command line; then exits.

    Args:
      main: takes a configuration and returns an exit status.
      config: the class that the command line's flags fill.
    """
    module = sys.modules[main.__module__]
    assert module.__file__ is not None
    launcher, arguments = Path(module.__file__).stem, sys.argv[1:]
    with readable_errors():
        if HELP.intersection(arguments):
            print(f"{module.__doc__}{help_text(config, launcher)}")
            status = None
        else:
            chosen = parse(config, arguments, launcher)
            quiet()
            use_compilation_cache()
            status = _run(main, chosen)
        # A closed pipe shows here, not while Python ends.
        sys.stdout.flush()
        sys.exit(status)


def _run[C: Configuration](main: Callable[[C], int | None], chosen: C) -> int | None:
    """Runs `main` on the devices that were chosen, as one process of a job or alone."""
    # Imported here: `jaxspark --help` must be quick.
    from jaxspark.launch.devices import DeviceOptions
    from jaxspark.parallel.processes import is_supervised, leave, supervise

    if not isinstance(chosen, DeviceOptions):
        return main(chosen)
    if chosen.job() is None:
        with chosen.devices():
            return main(chosen)
    if not is_supervised():
        return supervise()
    try:
        with readable_errors(), chosen.devices():
            status = main(chosen)
    except SystemExit as error:
        # The others wait for this one: it must not wait for them.
        leave(error.code if isinstance(error.code, int) else 1)
    except Exception:
        traceback.print_exc()
        leave(1)
    return status


def quiet() -> None:
    """Silences what libraries report of themselves."""
    # JAX reports every accelerator plugin it does not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    # Orbax tells of every option it was given.
    absl_logging.set_verbosity(absl_logging.WARNING)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the environment chose a place."""
    # Imported here: `jaxspark --help` must be quick.
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        folder = Path(home).expanduser() / "jaxspark" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Errors about what the user gave end the program with their message alone."""
    try:
        yield
    except BrokenPipeError:
        # Whoever read this program's output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)
    except ModuleNotFoundError as error:
        if os.environ.get("JAXSPARK_TRACEBACK") or _is_ours(error.name):
            raise
        print(
            f"error: the package {error.name} is not installed: "
            "pip install 'jaxspark[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXSPARK_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("jaxspark", "pallas_kernels")
