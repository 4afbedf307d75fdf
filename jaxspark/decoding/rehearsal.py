"""Rounds that are led into a branch of the loop, to time it or to have run it once.

A compiled loop has a branch for every draft length and token bucket, and devices put
work off until the first round that takes one: a CPU links a branch's code then (half a
second for a model of 30 layers), a GPU loads its kernels.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxspark.decoding.state import DecodeState, Phase
from jaxspark.parallel.mesh import over_mesh, slots_per_shard
from jaxspark.parallel.rules import replicated_specs, row_specs, state_specs
from jaxspark.settings import standard_settings

# Rounds since any other number of drafts was proposed.
_LONG_AGO = 2**30


def lead(
    state: DecodeState, lengths_B: Sequence[int], *, draft_length: int, size: int
) -> DecodeState:
    """A state whose next round takes one branch, whatever the schedule.

    It verifies as many drafts of all slots as fill the bucket next to their anchors.
    What scheduling knew is lost. Donates `state`.

    Args:
      state: slots that have been decoded.
      lengths_B: earlier lengths that they go back to, see `DecodeState.rewind`; slots
        with none stay out.
      draft_length: drafts that are proposed, where the schedule has a choice.
      size: of the token bucket.
    """
    own = slots_per_shard(state.slots)
    place_B = np.arange(state.slots) % own
    drafts_B = (max(size - own, 0) + place_B) // own
    # A bucket that cannot hold them all is for a few.
    kept_B = np.where(place_B < size, lengths_B, 0)
    return _led(
        state,
        jnp.asarray(kept_B, jnp.int32),
        jnp.asarray(drafts_B, jnp.int32),
        jnp.int32(draft_length),
    )


@partial(jax.jit, donate_argnames=("state",))
@standard_settings()
@over_mesh(state_specs, row_specs, row_specs, replicated_specs, out=0)
def _led(
    state: DecodeState,
    lengths_B: Int[Array, " B"],
    drafts_B: Int[Array, " B"],
    draft_length: Int[Array, ""],
) -> DecodeState:
    schedule = state.schedule
    length_G = jnp.arange(state.block_length) + 1
    # With nothing known to survive, only what is due to be probed is drafted.
    since_G = jnp.int32(_LONG_AGO) * (length_G == draft_length)
    schedule = replace(
        schedule,
        min_drafts_B=drafts_B,
        max_drafts_B=drafts_B,
        history_BnG=jnp.zeros_like(schedule.history_BnG),
        rounds_since_BG=jnp.broadcast_to(since_G, schedule.rounds_since_BG.shape),
    )
    return replace(
        state,
        lengths_B=lengths_B,
        processed_B=jnp.maximum(lengths_B - 1, 0),
        phase_B=jnp.int32(Phase.DECODING) * (lengths_B > 0),
        schedule=schedule,
    )
