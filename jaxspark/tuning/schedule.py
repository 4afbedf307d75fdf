"""Times of kernels on a TPU that need not be here, by its compiler's static schedule.

    python -m jaxspark.tuning.schedule v5p:2x2x1 "verify flash" '{"tokens": 1024}' 12

Prints the kernel's time in seconds, as JSON. libtpu writes what it expects of each
instruction (`--xla_jf_dump_static_llo_profile_to`): it executes the scalar side of a
kernel, loops and waits for copies included, and tells the cycles. Copies do not slow
each other there, so the time is at least that of the bytes that a kernel says it moves.
A lower bound, for comparing sizes.

A process of its own: libtpu reads its flags once, and ends the process where a kernel
cannot be. The kernel is compiled alone, its operands as arguments: XLA's gathers around
it are nothing that libtpu can profile.
"""

import json
import os
import re
import resource
import sys
import tempfile
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.experimental.layout import Format, Layout
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import Slice, parse_slice
from jaxspark.tuning.problems import PROBLEMS, Problem
from pallas_kernels.block_sizes import Sizes, trying

# Gigahertz, of chips whose published operations per second these explain.
CLOCKS = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


def scheduled(onto: Slice, problem: Problem, sizes: Sizes, folder: Path) -> float:
    """Seconds of a problem's kernel at some sizes.

    Args:
      onto: the chip.
      problem: which kernel, and for what.
      sizes: of its blocks; others are the kernel's own.
      folder: that libtpu was told to write profiles to.

    Raises:
      ValueError: libtpu told nothing of the kernel.
    """
    mesh = Mesh(np.array(onto.devices[:1]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    operands = jax.eval_shape(problem.operands)
    run = partial(problem.run, implementation="mosaic_tpu")
    with use_abstract_mesh(mesh.abstract_mesh), trying({problem.op: sizes}) as trial:
        with problem.with_known_turns(trial):
            [kernel] = kernels(jax.make_jaxpr(run)(*operands).jaxpr)

        def alone(*operands):
            return kernel.primitive.bind(*operands, **kernel.params)

        # Operands lie as the kernel wants them: no copies to be profiled either.
        anywhere = Format(Layout.AUTO, place)
        avals = [typing.cast(ShapedArray, each.aval) for each in kernel.invars]
        arguments = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in avals]
        jax.jit(alone, in_shardings=anywhere, out_shardings=anywhere).lower(
            *arguments
        ).compile()
    cycles = cycles_of(folder, alone.__name__)
    kind = onto.name.partition(":")[0]
    moved = kernel.params["cost_estimate"].bytes_accessed
    return max(cycles / CLOCKS[kind] / 1e9, moved / onto.chip.bandwidth)


def cycles_of(folder: Path, name: str) -> int:
    """What libtpu's profiles say of a kernel.

    Raises:
      ValueError: nothing.
    """
    for path in folder.glob("*_static_llo_profile.textproto"):
        text = path.read_text()
        op = re.search(r'hlo_op_name: "(.*?)"', text)
        cycles = re.search(r"estimated_cycles: (\d+)", text)
        if op and cycles and op[1].partition(".")[0] == name:
            return int(cycles[1])
    raise ValueError(f"libtpu wrote no profile of {name}")


def kernels(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All Pallas calls of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if isinstance(value, ClosedJaxpr):
                yield from kernels(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from kernels(value)


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def main(topology: str, problem: str, sizes: str, gigabytes: str) -> None:
    """Prints the time of one candidate, or ends where that takes too much memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes) * 10**9,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"{flags} --xla_jf_dump_static_llo_profile_to={folder}"
        )
        jax.config.update("jax_platforms", "cpu")
        # What was compiled before is not profiled.
        jax.config.update("jax_enable_compilation_cache", False)
        onto = parse_slice(topology)
        [found] = (each for each in PROBLEMS if each.name == problem)
        print(json.dumps(scheduled(onto, found, json.loads(sizes), Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
