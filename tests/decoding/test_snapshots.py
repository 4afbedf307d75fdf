"""Rows of rings go from one slot to another, and no other row changes."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspark.decoding import DecodeState
from jaxspark.decoding.snapshots import Snapshot, put_rings, take_rings
from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.models.pages import rings
from jaxspark.parallel.mesh import make_mesh, place
from jaxspark.parallel.rules import state_specs

SLOTS = 8


def rows_of(state):
    """Of every ring, on the host, slots first."""
    caches = state.target_cache, state.draft_cache
    leaves = jax.tree.leaves(rings(caches))
    return [np.moveaxis(np.array(leaf), 1, 0) for leaf in leaves]


def filled(random):
    """A state of slots whose rings say who they are."""

    def pair():
        target, drafters = tiny_models("deepseek_v4", 16, drafters=["mtp"], shards=4)
        return target, drafters["mtp"]

    # Nobody decodes, so the models need no numbers.
    state = DecodeState.empty(
        *nnx.eval_shape(pair), slots=SLOTS, capacity=256, block_length=2, pages=3
    )
    noise = jax.tree.map(
        lambda x: random.integers(0, 100, x.shape).astype(x.dtype), state
    )
    return place(noise, state_specs)


@pytest.mark.parametrize("mesh", ["", "data:2,expert:2"])
def test_a_slot_gets_the_rows_of_another_of_its_shard(random, mesh):
    shards = 4 if mesh else 1
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:shards])):
        state = filled(random)
        before = rows_of(state)
        assert before
        blank = take_rings(state, 0)
        for shard in range(shards):
            begin = shard * SLOTS // shards
            kept = Snapshot.of(take_rings(state, begin + 1), shard)
            held = {piece.device for pieces in kept.parts for piece in pieces}
            assert len(held) == 1
            state = put_rings(state, begin, kept.whole(blank))
            for rows in before:
                rows[begin] = rows[begin + 1]
        for rows, expected in zip(rows_of(state), before, strict=True):
            np.testing.assert_array_equal(rows, expected)
