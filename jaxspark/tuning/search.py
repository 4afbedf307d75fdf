"""The best sizes of each problem, by a device that is here or by a compiler's schedule.

Both measure candidates by the same rule: the fastest counts if it beats the kernel's
own sizes by enough. Whatever cannot be compiled or timed is left out, and why is kept.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import jax

from jaxspark.progress import CellProgress
from jaxspark.timing import alternate, medians, timed
from jaxspark.tuning.problems import Problem
from pallas_kernels.block_sizes import Sizes, trying

# Calls that are timed at once: dispatching one takes longer than some kernels.
_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A candidate.

    Attributes:
      sizes: of blocks.
      seconds: of a call; None where there is no time.
      why: there is none.
    """

    sizes: Sizes
    seconds: float | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a problem's candidates took.

    Attributes:
      problem: its name.
      op, of: by which tables name it.
      default: the kernel's own sizes.
      timed: all candidates.
    """

    problem: str
    op: str
    of: str
    default: Sizes
    timed: Sequence[Timed]

    @property
    def default_seconds(self) -> float | None:
        """Of the kernel's own sizes."""
        return next(t.seconds for t in self.timed if t.sizes == self.default)

    def best(self, least_gain: float) -> Timed | None:
        """The fastest; the default if that is slower by less than a part of its time.

        None where the default has no time: then nothing can be said.
        """
        own = next(t for t in self.timed if t.sizes == self.default)
        if own.seconds is None:
            return None
        seconds = {i: t.seconds for i, t in enumerate(self.timed) if t.seconds}
        fastest = min(seconds, key=lambda i: seconds[i])
        gains = seconds[fastest] < (1 - least_gain) * own.seconds
        return self.timed[fastest] if gains else own


type Timer = Callable[[Problem, Sequence[Sizes]], Iterable[Timed]]


def tune(problem: Problem, timer: Timer, progress: CellProgress) -> Tuned:
    """Times all candidates of a problem that `progress` does not know."""
    of, default = problem.asked()
    candidates = problem.candidates()
    cells = {f"{problem.name} {json.dumps(each)}": each for each in candidates}
    missing = [each for cell, each in cells.items() if cell not in progress.cells]
    for found in timer(problem, missing) if missing else ():
        cell = f"{problem.name} {json.dumps(found.sizes)}"
        progress.add({"cell": cell, **asdict(found)})
    timed = [
        Timed(**{k: v for k, v in progress.cells[cell].items() if k != "cell"})
        for cell in cells
    ]
    return Tuned(
        problem=problem.name, op=problem.op, of=of, default=default, timed=timed
    )


def by_schedule(topology: str, seconds: int, gigabytes: int) -> Timer:
    """By the static schedule of a chip's compiler; a process for each candidate.

    Args:
      topology: chips, such as v5p:2x2x1.
      seconds: that the compiler may take for a candidate; some never end.
      gigabytes: of memory that it may take.
    """

    def timer(problem, candidates):
        for sizes in candidates:
            arguments = (topology, problem.name, json.dumps(sizes), str(gigabytes))
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "jaxspark.tuning.schedule", *arguments],
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    capture_output=True,
                    text=True,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired:
                why = f"its compiler took more than {seconds} seconds"
                yield Timed(sizes=sizes, seconds=None, why=why)
                continue
            if done.returncode:
                why = reason(done.stderr) or f"ended by {done.returncode}"
                yield Timed(sizes=sizes, seconds=None, why=why)
            else:
                taken = json.loads(done.stdout.splitlines()[-1])
                yield Timed(sizes=sizes, seconds=taken)

    return timer


def reason(errors: str) -> str | None:
    """The line of errors that says most: libtpu's fatal one, or Python's."""
    for says in (r"^F\d{4} .*?\] (.*)", r"^([\w.]*(?:Error|Exception): .*)"):
        if found := re.findall(says, errors, re.MULTILINE):
            return found[-1][:200]
    return None


def by_device(repeats: int) -> Timer:
    """By the device that is here: all candidates in turn, medians."""

    def timer(problem, candidates):
        operands = jax.jit(problem.operands)()
        programs, failed = {}, []
        for number, sizes in enumerate(candidates):
            try:
                programs[number] = _compiled(problem, sizes, operands)
            except Exception as error:  # Compilers raise what they like.
                why = str(error).partition("\n")[0][:200]
                failed.append(Timed(sizes=sizes, seconds=None, why=why))
        runs = {number: timed(_often, run) for number, run in programs.items()}
        seconds = medians(alternate(runs, repeats))
        for number, taken in seconds.items():
            yield Timed(sizes=candidates[number], seconds=taken / _CALLS)
        yield from failed

    return timer


def _compiled(problem: Problem, sizes: Sizes, operands) -> Callable:
    """A call of the kernel with these sizes."""
    jax.clear_caches()
    with trying({problem.op: sizes}):
        run = partial(problem.run, implementation="mosaic_tpu")
        return partial(jax.jit(run).lower(*operands).compile(), *operands)


def _often(run: Callable) -> list:
    return [run() for _ in range(_CALLS)][-1:]
