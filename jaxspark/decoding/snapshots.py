"""Rows of rings, taken out of a slot and put into another.

Pages can be shared by slots, rings cannot: what they hold at a position is copied when
a slot has come there, and copied into slots that begin there. Both are exact.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxspark.decoding.state import DecodeState
from jaxspark.models.pages import rings, with_rings
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import replicated_specs, state_specs
from jaxspark.settings import standard_settings


@jax.jit
@standard_settings()
@over_mesh(state_specs, replicated_specs, out=PartitionSpec())
def take_rings(state: DecodeState, slots_N: Int[Array, " N"]) -> list[Any]:
    """The rows that all rings have of N slots."""
    tables = rings((state.target_cache, state.draft_cache))
    return [table.at_slots(slots_N) for table in tables]


@partial(jax.jit, donate_argnames=("state",))
@standard_settings()
@over_mesh(state_specs, replicated_specs, replicated_specs, out=0)
def put_rings(
    state: DecodeState, slots_N: Int[Array, " N"], rows: list[Any]
) -> DecodeState:
    """The state with such rows in N slots; donates `state`."""
    caches = state.target_cache, state.draft_cache
    new = [
        table.with_slots(slots_N, each)
        for table, each in zip(rings(caches), rows, strict=True)
    ]
    target_cache, draft_cache = with_rings(caches, new)
    return replace(state, target_cache=target_cache, draft_cache=draft_cache)
