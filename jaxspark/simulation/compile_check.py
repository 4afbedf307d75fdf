"""Compiles the real program for a slice that is not here; what it needs, per chip.

The program is the one that runs there: the same functions, traced over a mesh of the
slice's devices as its own compiler describes them. So what is said of memory is what
the compiler allotted. Times are a roofline: the slowest of three, each alone at full
speed, which no program reaches.
"""

import re
import time
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from jaxspark.models.layers.expert_pairs import SLACK
from jaxspark.parallel.axes import EXPERTS
from jaxspark.simulation.chips import Slice
from jaxspark.simulation.programs import Program
from jaxspark.simulation.traffic import LocalExperts, Traffic, traffic

# What a TPU's compiler says of a program that needs more memory than there is: all of
# it, arguments as well, whatever it calls it.
_OUT_OF_MEMORY = re.compile(
    r"CompileTimeHbmOom.*\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"
)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program for a slice.

    Attributes:
      program: what was compiled.
      slice: it runs on.
      mesh: of it.
      slots, capacity: requests, and cache positions of each; or texts and their tokens.
      held: bytes of one chip, by name: arguments and temporaries.
      peak: bytes at most in use at once, as the compiler says.
      memory: bytes that a program can have.
      traffic: of one chip, in one round; None of what a compiler gave up on, since it
        does not fit.
      seconds: that compiling took.
      text: the program; None likewise.
    """

    program: Program
    slice: Slice
    mesh: Mesh
    slots: int
    capacity: int
    held: dict[str, float]
    peak: float
    memory: float
    traffic: Traffic | None
    seconds: float
    text: str | None = field(repr=False)

    @property
    def slot_shards(self) -> int:
        """Chips with slots of their own."""
        return self.mesh.shape["data"] * self.mesh.shape["expert"]

    @property
    def tokens(self) -> int:
        """Of all slots in one pass."""
        return self.program.tokens * self.slot_shards

    @property
    def free(self) -> float:
        """Bytes that are left; below 0 what is missing."""
        return self.memory - self.peak

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of a round if it did nothing but that; none without a program."""
        chip = self.slice.chip
        if self.traffic is None:
            return {}
        return {
            "memory": self.traffic.memory / chip.bandwidth,
            "arithmetic": self.traffic.flops / chip.flops,
            "links": self.traffic.sent / chip.links,
        }

    @property
    def _growing(self) -> float:
        """Bytes that grow with slots and positions, temporaries taken to do so."""
        return sum(self.held[name] for name in (*self.program.growing, "temporaries"))

    @property
    def most_slots(self) -> int:
        """Slots that fit at this context, on all chips."""
        own = self.slots // self.slot_shards
        return max(int(own * (1 + self.free / self._growing)), 0) * self.slot_shards

    @property
    def most_capacity(self) -> int:
        """Positions that fit with these slots."""
        return max(int(self.capacity * (1 + self.free / self._growing)), 0)


def compile_program(
    program: Program,
    onto: Slice,
    mesh: Mesh,
    *,
    slots: int,
    capacity: int,
    experts: int = 0,
) -> Compiled:
    """Compiles a program for a slice.

    Args:
      program: lowered for it.
      onto: the slice.
      mesh: of its devices.
      slots: requests or texts.
      capacity: positions of each.
      experts: of a layer, on all chips.
    """
    held = {name: program.bytes_per_chip(name) for name in program.arguments}
    given, memory, moved, text = sum(held.values()), onto.chip.memory, None, None
    begin = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            done = program.lowered.compile(compiler_options=program.options)
    except jax.errors.JaxRuntimeError as error:
        if (missing := _OUT_OF_MEMORY.search(str(error))) is None:
            raise
        peak, memory = map(_bytes, missing.groups())
        held["temporaries"] = max(peak - given, 0)
    else:
        analysis, text = done.memory_analysis(), done.as_text()
        held["temporaries"] = analysis.temp_size_in_bytes
        peak = analysis.peak_memory_in_bytes or given + held["temporaries"]
        holders = mesh.shape[EXPERTS[0]] * mesh.shape[EXPERTS[1]]
        local = None
        if experts:
            local = LocalExperts(experts // holders, 1 if holders == 1 else 1 / SLACK)
        moved = traffic(text, devices=mesh.size, experts=local)
    return Compiled(
        program=program,
        slice=onto,
        mesh=mesh,
        slots=slots,
        capacity=capacity,
        held=held,
        peak=peak,
        memory=memory,
        traffic=moved,
        seconds=time.perf_counter() - begin,
        text=text,
    )


def _bytes(text: str) -> float:
    """Of a size such as "99.63G"."""
    return float(text[:-1]) * 2.0 ** (10 * (1 + "KMGT".index(text[-1])))
