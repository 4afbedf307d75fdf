"""Rows of rings, taken out of a slot and put into another.

Pages can be shared by slots, rings cannot: what they hold at a position is copied when
a slot has come there, and copied into slots that begin there. Both are exact.

On a mesh a slot's rows are with its shard and stay there: the programs give and take
rows for one slot of every shard, of which only those of one mean anything, and what is
kept of them are the arrays on that shard's devices.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxspark.decoding.state import DecodeState
from jaxspark.models.pages import rings, with_rings
from jaxspark.parallel.axes import SLOTS, own_slots
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import replicated_specs, state_specs
from jaxspark.settings import standard_settings

# The axis of slots in tables of rings, see `LayerRows`.
_AXIS = 1


@dataclass(frozen=True)
class Snapshot:
    """The rings of one slot, on the devices of its shard.

    Attributes:
      parts: of each array the pieces that lie on devices of this process.
    """

    parts: list[list[jax.Array]]

    @classmethod
    def of(cls, rows: list[Any], shard: int) -> Self:
        """What one shard has of `take_rings`; the rest can be freed."""

        def kept(leaf):
            if leaf.sharding.num_devices == 1:
                return [leaf]
            return [
                piece.data
                for piece in leaf.addressable_shards
                if (piece.index[_AXIS].start or 0) == shard
            ]

        return cls([kept(leaf) for leaf in jax.tree.leaves(rows)])

    def whole(self, blank: list[Any]) -> list[Any]:
        """As `put_rings` takes them; those of other shards are `blank`'s."""

        def joined(leaf, pieces):
            if leaf.sharding.num_devices == 1:
                return pieces[0]
            own = {piece.device: piece for piece in pieces}
            return jax.make_array_from_single_device_arrays(
                leaf.shape,
                leaf.sharding,
                [own.get(each.device, each.data) for each in leaf.addressable_shards],
            )

        leaves, tree = jax.tree.flatten(blank)
        return jax.tree.unflatten(tree, map(joined, leaves, self.parts))


@jax.jit
@standard_settings()
@over_mesh(state_specs, replicated_specs, out=PartitionSpec(None, SLOTS))
def take_rings(state: DecodeState, slot: Int[Array, ""]) -> list[Any]:
    """The rows that all rings have of a slot; other shards give any of theirs."""
    tables = rings((state.target_cache, state.draft_cache))
    slot_1 = own_slots(slot[None], state.slots)
    return [table.at_slots(slot_1) for table in tables]


@partial(jax.jit, donate_argnames=("state",))
@standard_settings()
@over_mesh(state_specs, replicated_specs, state_specs, out=0)
def put_rings(state: DecodeState, slot: Int[Array, ""], rows: list[Any]) -> DecodeState:
    """The state with such rows in a slot; other shards stay. Donates `state`."""
    caches = state.target_cache, state.draft_cache
    slot_1 = own_slots(slot[None], state.slots)
    new = [
        table.with_slots(slot_1, each)
        for table, each in zip(rings(caches), rows, strict=True)
    ]
    target_cache, draft_cache = with_rings(caches, new)
    return replace(state, target_cache=target_cache, draft_cache=draft_cache)
