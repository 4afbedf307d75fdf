"""Finds the sizes of kernels' blocks that are fastest on a chip.

  jaxspark tune_kernels --out=tuned                          the TPU that is here
  jaxspark tune_kernels --topology=v5p:2x2x1 --out=tuned     one that is not
  jaxspark tune_kernels --topology=v5e:2x2 --problems=verify,sparse_attention

On a device candidates run in turn. For a chip that is not here its compiler ranks them
(`pip install 'jaxspark[tpu]'`): by the cycles of its static schedule, or by bytes where
these take longer, a lower bound; what does not compile is left out. Writes CHIP.json
into a folder, or prints it; kernels read it if PALLAS_KERNELS_TUNED names the folder.
"""

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jaxspark.configuration import Configuration, option
from jaxspark.figures import write_figures
from jaxspark.launch import common, program
from jaxspark.progress import CellProgress, bars
from jaxspark.simulation.chips import parse_slice
from jaxspark.tuning.problems import PROBLEMS, Problem
from jaxspark.tuning.schedule import CLOCKS
from jaxspark.tuning.search import Timer, Tuned, by_device, by_schedule, tune
from pallas_kernels.block_sizes import chip_of


@dataclass(frozen=True, kw_only=True)
class Config(Configuration):
    """What to tune, and where."""

    topology: str | None = option(
        "Chip to compile for instead of running: v5e:2x2, v5p:2x2x1, v6e:2x2 or "
        "tpu7x:2x2x1.",
        None,
    )
    problems: tuple[str, ...] = option(
        "Only those whose names begin so, such as verify or 'grouped_matmul flash'; "
        "the table then holds no others.",
        (),
    )
    repeats: int = option("Timed runs of each candidate on a device.", 5, at_least=1)
    schedule_seconds: int = option(
        "Longest that a compiler may take for a candidate's schedule.", 600, at_least=1
    )
    schedule_gigabytes: int = option("Most memory that it may take.", 12, at_least=1)
    least_gain: float = option(
        "Part of the time that other sizes must save to replace a kernel's own.",
        0.02,
        at_least=0,
        at_most=1,
    )
    progress: str | None = option(
        "JSON-lines file that a stopped run goes on from.", None
    )
    out: str | None = option("Folder for the table; without it it is printed.", None)
    json_out: str | None = common.json_option()


def main(config: Config) -> None:
    """Times candidates, and writes or prints the table."""
    chip, by, timer = where(config)
    chosen = [each for each in PROBLEMS if _wanted(each, config.problems)]
    if not chosen:
        raise ValueError(
            f"--problems={','.join(config.problems)}: none begins so; there are "
            + ", ".join(each.name for each in PROBLEMS)
        )
    progress = CellProgress(config.progress, {"chip": chip, "by": by})
    console, found = common.console(stderr=config.out is None), []
    with bars(console, transient=True) as shown:
        for problem in shown.track(chosen, description=f"tuning for {chip}"):
            found.append(tune(problem, timer, progress))
    _print(console, chip, found, config.least_gain)
    about = {"chip": chip, "by": by, "versions": versions(), "date": str(date.today())}
    if config.json_out:
        problems = [asdict(each) for each in found]
        write_figures(config.json_out, about | {"problems": problems})
    made = about | {"ops": table(found, config.least_gain)}
    if config.out is None:
        print(json.dumps(made, indent=1))
        return
    write_figures(path := Path(config.out) / f"{chip}.json", made)
    console.print(f"wrote {path}")


def where(config: Config) -> tuple[str, str, Timer]:
    """The chip, what measures, and how.

    Raises:
      ValueError: there is no such chip, none here, or no compiler of it.
    """
    if config.topology is not None:
        chip = config.topology.partition(":")[0]
        if chip not in CLOCKS:
            raise ValueError(
                f"--topology={config.topology}: static schedules are of TPUs, "
                f"expected {', '.join(CLOCKS)} with a topology, such as v5p:2x2x1"
            )
        # Only compilers are wanted, whatever this machine has.
        jax.config.update("jax_platforms", "cpu")
        parse_slice(config.topology)
        timer = by_schedule(
            config.topology, config.schedule_seconds, config.schedule_gigabytes
        )
        return chip, "static schedule", timer
    kind = jax.devices()[0].device_kind
    here = chip_of(kind)
    if here not in CLOCKS:
        raise ValueError(
            f"kernels whose sizes can be tuned are for TPUs, and this is {kind}; for a "
            "chip that is not here, its compiler ranks sizes: --topology=v5p:2x2x1"
        )
    return here, f"device {kind}", by_device(config.repeats)


def table(found: list[Tuned], least_gain: float) -> dict:
    """As kernels read it: by op and shape, the sizes and what they take."""
    ops: dict[str, dict] = {}
    for each in found:
        if (best := each.best(least_gain)) is None:
            continue
        assert best.seconds is not None and each.default_seconds is not None
        ops.setdefault(each.op, {})[each.of] = {
            "problem": each.problem,
            "sizes": best.sizes,
            "microseconds": round(1e6 * best.seconds, 2),
            "default": each.default,
            "default_microseconds": round(1e6 * each.default_seconds, 2),
        }
    return ops


def versions() -> dict[str, str]:
    """Of what measures."""
    found = {}
    for name in ("jax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _wanted(problem: Problem, beginnings: tuple[str, ...]) -> bool:
    return not beginnings or problem.name.startswith(beginnings)


def _print(console: Console, chip: str, found: list[Tuned], least_gain: float) -> None:
    shown = Table(title=f"Sizes of blocks on {chip}, µs")
    for column in ("problem", "sizes", "best", "default", ""):
        shown.add_column(column, justify="right")
    for each in found:
        best, default = each.best(least_gain), each.default_seconds
        if best is None or best.seconds is None or default is None:
            why = next(t.why for t in each.timed if t.sizes == each.default)
            shown.add_row(each.problem, "its own", "", "", f"cannot be timed: {why}")
            continue
        failed = sum(t.seconds is None for t in each.timed)
        shown.add_row(
            each.problem,
            ", ".join(f"{name} {size}" for name, size in best.sizes.items()),
            f"{1e6 * best.seconds:.1f}",
            f"{1e6 * default:.1f}",
            f"{failed} failed" if failed else "",
        )
    console.print(shown)


if __name__ == "__main__":
    program.run(main, Config)
