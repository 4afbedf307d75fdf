"""Compiles the real program for a slice that is not here; what it needs, per chip.

The program is the one that runs there: the same functions, traced over a mesh of the
slice's devices as its own compiler describes them. So what is said of memory is what
the compiler allotted. Times are a roofline: the slowest of three, each alone at full
speed, which no program reaches.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxspark.decoding import DecodeOptions, DecodeState, decode, prefill
from jaxspark.parallel.axes import EXPERTS
from jaxspark.parallel.mesh import check_mesh, slots_per_shard
from jaxspark.parallel.rules import parameter_specs, state_specs
from jaxspark.simulation.chips import DECODE_OPTIONS, Slice, abstract
from jaxspark.simulation.traffic import LocalExperts, Traffic, traffic

WHAT = ("decode", "prefill")
PREFILL_CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes of one chip's memory."""

    target: float
    drafter: float
    target_cache: float
    draft_cache: float
    other: float
    temporaries: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program for a slice.

    Attributes:
      what: it does: one round of decoding, or one chunk of prefill.
      slice: it runs on.
      mesh: of it.
      slots, capacity: requests, and cache positions of each.
      tokens: of all shards in one pass.
      parts: of one chip's memory.
      peak: bytes at most in use at once, as the compiler says.
      traffic: of one chip, in one round.
      seconds: that compiling took.
      text: the program.
      state: that it works on, described.
    """

    what: str
    slice: Slice
    mesh: Mesh
    slots: int
    capacity: int
    tokens: int
    parts: Parts
    peak: float
    traffic: Traffic
    seconds: float
    text: str = field(repr=False)
    state: DecodeState = field(repr=False)

    @property
    def free(self) -> float:
        """Bytes that are left; below 0 what is missing."""
        return self.slice.chip.memory - self.peak

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of a round if it did nothing but that."""
        chip = self.slice.chip
        return {
            "memory": self.traffic.memory / chip.bandwidth,
            "arithmetic": self.traffic.flops / chip.flops,
            "links": self.traffic.sent / chip.links,
        }

    @property
    def per_slot(self) -> float:
        """Bytes that one slot takes on its chip, temporaries taken to grow with it."""
        own = self.slots / _shards_of_slots(self.mesh)
        return (self._caches + self.parts.temporaries) / own

    @property
    def most_slots(self) -> int:
        """Slots that fit at this context, on all chips."""
        own = self.slots / _shards_of_slots(self.mesh)
        return max(int(own + self.free // self.per_slot), 0) * _shards_of_slots(
            self.mesh
        )

    @property
    def most_capacity(self) -> int:
        """Positions that fit with these slots, were all to grow with positions."""
        grown = 1 + self.free / (self._caches + self.parts.temporaries)
        return max(int(self.capacity * grown), 0)

    @property
    def _caches(self) -> float:
        return self.parts.target_cache + self.parts.draft_cache


def _shards_of_slots(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["expert"]


def compile_program(
    what: str,
    onto: Slice,
    mesh: Mesh,
    target: Any,
    drafter: Any,
    *,
    slots: int,
    capacity: int,
    block_length: int,
) -> Compiled:
    """Compiles one of the loop's functions for a slice.

    Args:
      what: "decode" (rounds that draft and verify whole blocks) or "prefill".
      onto: the slice.
      mesh: of its devices.
      target: a described model, see `abstract_models`.
      drafter: likewise.
      slots: requests decoded together.
      capacity: cache positions of each.
      block_length: drafts of a round.

    Raises:
      ValueError: the model, the drafter or the slots cannot be shared out.
    """
    for model in (target, drafter):
        check_mesh(model, mesh)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        own = slots_per_shard(slots)
        state = jax.eval_shape(
            lambda: DecodeState.empty(
                target,
                drafter,
                slots=slots,
                capacity=capacity,
                block_length=block_length,
            )
        )
        arguments = (
            abstract(mesh, target, parameter_specs(target)),
            abstract(mesh, drafter, parameter_specs(drafter)),
            abstract(mesh, state, state_specs(state)),
            abstract(mesh, jax.ShapeDtypeStruct((), jnp.int32), PartitionSpec()),
        )
        options = None
        if what == "decode":
            chosen = DecodeOptions(block_length=block_length).resolve(drafter, own)
            tokens = chosen.sizes(own)[-1]
            lowered = decode.lower(*arguments, options=chosen)
            options = DECODE_OPTIONS.get(onto.platform)
        else:
            tokens = own * PREFILL_CHUNK
            lowered = prefill.lower(*arguments, chunk=PREFILL_CHUNK)
        compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    shards = jax.tree.map(_bytes_per_chip, arguments)
    parts = {
        "target": _sum(shards[0]),
        "drafter": _sum(shards[1]),
        "target_cache": _sum(shards[2].target_cache),
        "draft_cache": _sum(shards[2].draft_cache),
    }
    caches = parts["target_cache"] + parts["draft_cache"]
    experts = None
    if count := getattr(target.config, "n_routed_experts", 0):
        holders = mesh.shape[EXPERTS[0]] * mesh.shape[EXPERTS[1]]
        experts = LocalExperts(count // holders, 1 / holders)
    return Compiled(
        what=what,
        slice=onto,
        mesh=mesh,
        slots=slots,
        capacity=capacity,
        tokens=tokens * _shards_of_slots(mesh),
        parts=Parts(
            **parts,
            other=_sum(shards[2]) - caches,
            temporaries=memory.temp_size_in_bytes,
        ),
        peak=memory.peak_memory_in_bytes or memory.temp_size_in_bytes + _sum(shards),
        traffic=traffic(text, devices=mesh.size, experts=experts),
        seconds=seconds,
        text=text,
        state=arguments[2],
    )


def _bytes_per_chip(leaf: jax.ShapeDtypeStruct) -> float:
    assert leaf.sharding is not None
    size = 1
    for axis in leaf.sharding.shard_shape(leaf.shape):
        size *= axis
    return size * jnp.dtype(leaf.dtype).itemsize


def _sum(tree: Any) -> float:
    return float(sum(jax.tree.leaves(tree)))
