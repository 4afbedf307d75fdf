"""How a launcher runs: help, errors that a person can read, a compilation cache."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType

from absl import app, flags
from absl import logging as absl_logging

HELP = {"-h", "-?", "-help", "--help", "--helpshort"}
CLOSED_PIPE = 128 + 13


def run(main: Callable[[], int | None], *, may_be_empty: Collection[str] = ()) -> None:
    """Runs a launcher's `main` with the flags of the command line; then exits.

    Args:
      main: takes no arguments and returns an exit status.
      may_be_empty: flags whose empty value is a value. Any other `--flag=` is an error:
        scripts write it when a variable of theirs is not set.
    """
    launcher = sys.modules[main.__module__]

    def start(arguments: list[str]) -> None:
        check_given(arguments, own_flags(launcher), may_be_empty)
        quiet()
        use_compilation_cache()
        status = main()
        # A closed pipe shows here, not while Python ends.
        sys.stdout.flush()
        sys.exit(status)

    with readable_errors():
        app.run(start, flags_parser=lambda argv: parse(launcher, argv))


def own_flags(launcher: ModuleType) -> list[flags.Flag]:
    """The flags that a launcher and the modules of this package have defined."""
    values = flags.FLAGS
    shared = (
        flag
        for module, defined in values.flags_by_module_dict().items()
        if module.startswith(f"{__package__}.")
        for flag in defined
    )
    return list(dict.fromkeys([*values.get_flags_for_module(launcher), *shared]))


def command(launcher: ModuleType) -> str:
    """How people start a launcher."""
    assert launcher.__file__ is not None
    return f"jaxspark {Path(launcher.__file__).stem}"


def help_text(launcher: ModuleType) -> str:
    """A launcher's docstring and all its flags with their defaults.

    absl's own shows the flags of the main module alone.
    """
    title = f"flags of {command(launcher)}"
    for flag in own_flags(launcher):
        flags.FLAGS.register_key_flag_for_module(title, flag)
    return f"{launcher.__doc__}{flags.FLAGS.module_help(title)}"


def parse(launcher: ModuleType, argv: list[str]) -> list[str]:
    """Parses flags; returns what is none. Prints help and exits where it is asked for.

    Raises:
      ValueError: a flag that is unknown, or that cannot have its value.
    """
    if HELP.intersection(argv[1:]):
        print(help_text(launcher))
        sys.stdout.flush()
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise ValueError(f"{error} (see {command(launcher)} --help)") from error


def check_given(
    arguments: list[str], given: list[flags.Flag], may_be_empty: Collection[str]
) -> None:
    """Raises ValueError for arguments that are no flags, and for empty values."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; all are --flags")
    for flag in given:
        value = flag.value
        empty = value in ("", []) or isinstance(value, list) and "" in value
        if empty and value != flag.default and flag.name not in may_be_empty:
            raise ValueError(
                f"--{flag.name} has an empty value; give it one, or leave it out"
            )


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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


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
