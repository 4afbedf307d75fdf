"""How a request enters a slot and leaves it, in place beside those being decoded.

In between it is read (`prefilling`) and decoded (`round`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxspark.decoding.adjustments import Adjustment, AdjustmentLimits
from jaxspark.decoding.admission import Admission, whole_numbers
from jaxspark.decoding.estimator import Estimator
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.state import DecodeState, Phase
from jaxspark.drafters import Drafter
from jaxspark.models import TargetModel
from jaxspark.parallel.axes import own_slots
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import replicated_specs, row_specs, state_specs
from jaxspark.settings import standard_settings


@partial(jax.jit, donate_argnames=("state",))
@standard_settings()
@over_mesh(state_specs, replicated_specs, replicated_specs, out=0)
def admit(
    state: DecodeState, slots_N: Int[Array, " N"], admission: Admission
) -> DecodeState:
    """Writes N requests into slots; numbers past the last slot are skipped.

    Nothing of the request before remains but the survival history, if both sample at
    one temperature (see `ScheduleState.admit`). Donates `state`.
    """

    def put(old_B, new_N):
        return old_B.at[slots_N].set(new_N, mode="drop")

    slots_N = own_slots(slots_N, state.slots)
    lengths_N, width = admission.lengths_N, admission.tokens_NP.shape[1]
    complete_N = lengths_N >= admission.limits_N
    phase_N = jnp.where(
        complete_N,
        Phase.FINISHED,
        jnp.where(
            lengths_N - 1 > admission.processed_N, Phase.PREFILLING, Phase.DECODING
        ),
    )
    before = state.sampling.temperature.at[slots_N].get(mode="clip")
    schedule = state.schedule.admit(
        slots_N,
        min_drafts_N=admission.min_drafts_N,
        max_drafts_N=admission.max_drafts_N,
        same_temperature_N=before == admission.sampling.temperature,
    )
    tokens_BS = state.tokens_BS.at[slots_N, :width].set(
        admission.tokens_NP, mode="drop"
    )
    likeliest = state.likeliest
    if likeliest is not None:
        likeliest = replace(
            likeliest,
            wanted_B=put(likeliest.wanted_B, admission.top_log_probs_N),
            of_prompt_B=put(likeliest.of_prompt_B, admission.prompt_log_probs_N),
        )
    return replace(
        state,
        tokens_BS=tokens_BS,
        lengths_B=put(state.lengths_B, lengths_N),
        processed_B=put(state.processed_B, admission.processed_N),
        limits_B=put(state.limits_B, admission.limits_N),
        phase_B=put(state.phase_B, phase_N.astype(jnp.int32)),
        stop_ids_BX=put(state.stop_ids_BX, admission.stop_ids_NX),
        sampling=jax.tree.map(put, state.sampling, admission.sampling),
        confidence_BG=put(state.confidence_BG, 0.0),
        certainty_BG=put(state.certainty_BG, 0.0),
        schedule=schedule,
        counters=jax.tree.map(lambda old_B: put(old_B, 0), state.counters),
        adjustments=jax.tree.map(put, state.adjustments, admission.adjustments),
        likeliest=likeliest,
    )


@partial(jax.jit, donate_argnames=("state",))
@standard_settings()
@over_mesh(state_specs, row_specs, out=0)
def release(state: DecodeState, released_B: Bool[Array, " B"]) -> DecodeState:
    """Empties slots, whatever their phase: finished ones, or cancelled. Donates it."""
    count_B = jnp.where(released_B, 0, 1)
    return replace(
        state,
        lengths_B=state.lengths_B * count_B,
        processed_B=state.processed_B * count_B,
        phase_B=jnp.where(released_B, Phase.EMPTY, state.phase_B),
    )


@standard_settings()
def init_state(
    target: TargetModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    *,
    block_length: int,
    stop_ids: Sequence[Sequence[int]] | None = None,
    capacity: int | None = None,
    log_probs: bool = False,
    min_drafts: int | Sequence[int] = 0,
    max_drafts: int | Sequence[int] | None = None,
    adjustments: Sequence[Adjustment] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    estimator: Estimator | None = None,
) -> DecodeState:
    """A state with one slot for each of `prompts`, admitted and not yet prefilled.

    Args:
      target: for its caches.
      drafter: for its caches.
      prompts: token ids per slot, at least one each.
      limits: total length (prompt and output) at which each slot finishes.
      sampling: parameters of `len(prompts)` slots.
      block_length: most drafts per round.
      stop_ids: per slot, tokens that end it.
      capacity: S; at least the largest limit plus `block_length`, which is the default.
      log_probs: whether to keep log-probabilities.
      min_drafts: drafts verified in every round that drafts, for all or per slot.
      max_drafts: most drafts verified in a round; None: all.
      adjustments: per slot, what is done to its logits; None for nothing.
      prompt_lengths: see `Admission.of`.
      estimator: that of the options it will be decoded with.

    Raises:
      ValueError: see `DecodeState.empty` and `Admission.of`.
    """
    if capacity is None:
        capacity = int(max(whole_numbers("limits", limits), default=0)) + block_length
    state = DecodeState.empty(
        target,
        drafter,
        slots=len(prompts),
        capacity=capacity,
        block_length=block_length,
        stop_ids=max(1, *map(len, stop_ids)) if stop_ids else 1,
        log_probs=log_probs,
        adjustments=AdjustmentLimits.of(adjustments or ()),
        estimator=estimator,
    )
    admission = Admission.of(
        state,
        prompts,
        limits,
        sampling,
        stop_ids=stop_ids,
        min_drafts=min_drafts,
        max_drafts=max_drafts,
        adjustments=adjustments,
        prompt_lengths=prompt_lengths,
    )
    return admit(state, jnp.arange(len(prompts)), admission)
