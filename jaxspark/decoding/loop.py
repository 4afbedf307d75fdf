"""The programs of decoding: the loop over rounds, and the two halves of one.

`decode` is `lax.while_loop` over `decode_round`. There is no other decode path: plain
decoding is a round whose drafter proposes nothing. Between the halves a host can say
which tokens may come along the drafts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from jaxspark.decoding.acceptance import check_estimator
from jaxspark.decoding.flattened import unflattens
from jaxspark.decoding.options import DecodeOptions
from jaxspark.decoding.round import (
    Drafted,
    adjuster_for,
    decode_round,
    draft_half,
    drafted_specs,
    lagged_forecast,
    verify_half,
)
from jaxspark.decoding.state import DecodeState
from jaxspark.drafters import Drafter
from jaxspark.models import TargetModel
from jaxspark.parallel.axes import any_of, sum_of
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import (
    parameter_specs,
    replicated_specs,
    row_specs,
    state_specs,
)
from jaxspark.settings import standard_settings


@partial(jax.jit, static_argnames=("options",), donate_argnames=("state",))
@unflattens
@standard_settings()
@over_mesh(
    parameter_specs,
    parameter_specs,
    state_specs,
    replicated_specs,
    replicated_specs,
    out=2,
)
def decode(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    max_rounds: Int[Array, ""],
    max_finished: Int[Array, ""] | None = None,
    *,
    options: DecodeOptions,
) -> DecodeState:
    """Rounds until no slot decodes, or as bounded; donates `state`.

    Args:
      target: the model.
      drafter: what proposes.
      state: the slots; those that do not decode stay as they are.
      max_rounds: most rounds.
      max_finished: returns once as many slots are finished, so that a host can refill
        them; None goes on.
      options: resolved, see `DecodeOptions.resolve`.
    """

    def unfinished(carry):
        count, state = carry
        go_on = (count < max_rounds) & any_of(state.live_B)
        if max_finished is None:
            return go_on
        return go_on & (sum_of(state.finished_B) < max_finished)

    def body(carry):
        count, state = carry
        return count + 1, decode_round(target, drafter, state, options)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


@partial(jax.jit, static_argnames=("options",), donate_argnames=("state",))
@standard_settings()
@over_mesh(
    parameter_specs,
    parameter_specs,
    state_specs,
    row_specs,
    out=(2, drafted_specs()),
)
def draft(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    masks_BU: UInt[Array, "B U"],
    *,
    options: DecodeOptions,
) -> tuple[DecodeState, Drafted]:
    """The first half of a round by itself, a whole block; donates `state`.

    Args:
      target: the model.
      drafter: what proposes.
      state: the slots.
      masks_BU: bits of the tokens that may come next, for the first drafts.
      options: resolved, see `DecodeOptions.resolve`.
    """
    check_estimator(state, options)
    lagged = lagged_forecast(state, options)
    with jax.named_scope("adjust"):
        adjuster = adjuster_for(state, masks_BU[:, None])
    length = max(options.draft_lengths)
    return draft_half(target, drafter, options, length, state, lagged, adjuster)


@partial(jax.jit, static_argnames=("options",), donate_argnames=("state",))
@standard_settings()
@over_mesh(
    parameter_specs,
    parameter_specs,
    state_specs,
    drafted_specs,
    row_specs,
    out=2,
)
def verify(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    drafted: Drafted,
    masks_BQU: UInt[Array, "B Q U"],
    *,
    options: DecodeOptions,
) -> DecodeState:
    """The second half by itself; donates `state`.

    Args:
      target: the model.
      drafter: what proposed.
      state: the slots as `draft` left them.
      drafted: what it proposed.
      masks_BQU: bits of the tokens that may come behind each anchor and each draft;
        only these are put out.
      options: those of `draft`.
    """
    with jax.named_scope("adjust"):
        adjuster = adjuster_for(state, masks_BQU)
    sizes = options.sizes(state.slots, max(options.draft_lengths))
    return verify_half(target, drafter, options, state, drafted, adjuster, sizes)
