"""`jaxspark NAME --flag=value ...` runs a launcher; `jaxspark` alone lists them.

Nothing heavy is imported before a launcher is chosen: summaries are read from sources.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

import jaxspark
from jaxspark.launch import program

LAUNCHERS = (
    *(
        "generate",
        "serve",
        "ray_serve",
        "demo",
        "audit",
        "convert",
        "describe",
        "compile_check",
    ),
    *("evaluate", "calibrate", "profile_cost", "bench", "simulate", "tune_kernels"),
    *("regenerate", "train_draft", "study", "plot", "pods"),
)


def summary(launcher: str) -> str:
    """The first line of a launcher's docstring."""
    spec = importlib.util.find_spec(f"jaxspark.launch.{launcher}")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def usage() -> str:
    """What `jaxspark --help` prints."""
    width = max(map(len, LAUNCHERS))
    return "\n".join(
        (
            f"jaxspark {jaxspark.__version__}: lossless speculative decoding for JAX",
            "",
            *(f"  jaxspark {name:<{width}}  {summary(name)}" for name in LAUNCHERS),
            "",
            "`jaxspark NAME --help` shows examples and every flag.",
        )
    )


def main() -> None:
    """Runs the launcher that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    with program.readable_errors():
        if name in ("-h", "--help", "help"):
            print(usage())
        elif name == "--version":
            print(jaxspark.__version__)
        elif name not in LAUNCHERS:
            near = difflib.get_close_matches(name, LAUNCHERS)
            raise ValueError(
                f"{name!r} is no launcher; "
                + (f"did you mean {' or '.join(near)}? " if near else "")
                + "`jaxspark --help` lists them"
            )
        else:
            sys.argv = [name, *arguments]
            launcher = importlib.import_module(f"jaxspark.launch.{name}")
            program.run(launcher.main, launcher.Config)


if __name__ == "__main__":
    main()
