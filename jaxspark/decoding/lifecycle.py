"""How a request enters a slot, is prefilled there, and leaves.

Everything happens in place: admission writes a prompt beside the requests that are
being decoded, and `prefill` advances it by chunks between their rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxspark.decoding.adjustment_arrays import Adjustments
from jaxspark.decoding.adjustments import Adjustment, AdjustmentLimits
from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.state import DecodeState, Phase
from jaxspark.drafters import Drafter
from jaxspark.models import FlatTokens, TargetModel
from jaxspark.models.base import at_slots, with_slots
from jaxspark.models.layers.linear import head_logits
from jaxspark.parallel.axes import SLOTS, any_of, own_slots
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import parameter_specs, replicated_specs, state_specs
from jaxspark.settings import standard_settings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Admission:
    """N requests, checked and ready to be written into slots.

    Attributes:
      tokens_NP: prompts, zeros past their lengths.
      lengths_N: of the prompts.
      limits_N: total length (prompt and output) at which each finishes.
      stop_ids_NX: tokens that end each, padded with -1.
      sampling: parameters of each.
      min_drafts_N: drafts verified in every round that drafts.
      max_drafts_N: most drafts that are.
      adjustments: what they do to their logits; None where the state has no room.
      top_log_probs_N: most likely tokens told beside each output token.
      prompt_log_probs_N: whether log-probabilities of the prompt are told.
      processed_N: first tokens of each whose cache rows are there already.
    """

    tokens_NP: Int[Array, "N P"]
    lengths_N: Int[Array, " N"]
    limits_N: Int[Array, " N"]
    stop_ids_NX: Int[Array, "N X"]
    sampling: Sampling
    min_drafts_N: Int[Array, " N"]
    max_drafts_N: Int[Array, " N"]
    adjustments: Adjustments | None
    top_log_probs_N: Int[Array, " N"]
    prompt_log_probs_N: Bool[Array, " N"]
    processed_N: Int[Array, " N"]

    @classmethod
    @standard_settings()
    def of(
        cls,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Sequence[Sequence[int]] | None = None,
        min_drafts: int | Sequence[int] = 0,
        max_drafts: int | Sequence[int] | None = None,
        adjustments: Sequence[Adjustment] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        top_log_probs: Sequence[int] | None = None,
        prompt_log_probs: Sequence[bool] | None = None,
        processed: Sequence[int] | None = None,
    ) -> "Admission":
        """Requests for slots of `state`, of which only shapes are looked at.

        Args:
          state: that they will be admitted to.
          prompts: token ids, at least one each.
          limits: total length at which each finishes.
          sampling: parameters of `len(prompts)` requests.
          stop_ids: per request, tokens that end it; None for none.
          min_drafts: drafts verified in every round that drafts, for all or for each.
          max_drafts: most drafts verified in a round; None for all.
          adjustments: per request, what is done to its logits; None for nothing.
          prompt_lengths: per request, tokens of `prompts` that no penalty or least
            length takes for output; None for all of them. Fewer for one that goes on.
          top_log_probs: per request, likely tokens told at each place; None for none.
          prompt_log_probs: per request, whether the prompt's are told; None for no.
          processed: first tokens of each prompt whose cache rows are there already, all
            but one at most; None for none.

        Raises:
          ValueError: numbers that are not whole, an empty prompt, one that its limit or
            the capacity cannot hold, more stop ids or adjustments than the state has
            room for, bounds on drafts that contradict each other or the block length,
            or not one of everything per prompt.
        """
        count = len(prompts)
        stop_ids = [()] * count if stop_ids is None else stop_ids
        adjustments = [Adjustment()] * count if adjustments is None else adjustments
        if prompt_lengths is None:
            prompt_lengths = [len(prompt) for prompt in prompts]
        top = [0] * count if top_log_probs is None else top_log_probs
        told = [False] * count if prompt_log_probs is None else prompt_log_probs
        processed = [0] * count if processed is None else processed
        counts = {
            "limits": len(limits),
            "sampling": len(sampling.seed),
            "stop_ids": len(stop_ids),
            "adjustments": len(adjustments),
            "prompt_lengths": len(prompt_lengths),
            "top_log_probs": len(top),
            "prompt_log_probs": len(told),
            "processed": len(processed),
        }
        for name, given in counts.items():
            if not count or given != count:
                raise ValueError(
                    f"{count} prompts, but {name} for {given}; give one each"
                )
        limits_N, block = _whole("limits", limits), state.block_length
        if limits_N.max() + block > state.capacity:
            raise ValueError(
                f"a capacity of {state.capacity} positions cannot hold "
                f"{limits_N.max()} tokens and a block of {block}; it must be at least "
                f"{limits_N.max() + block}"
            )
        width = state.stop_ids_BX.shape[1]
        tokens_NP = np.zeros((count, state.capacity), np.int32)
        stop_ids_NX = np.full((count, width), -1, np.int32)
        for row, (prompt, limit, stops) in enumerate(zip(prompts, limits, stop_ids)):
            if not len(prompt):
                raise ValueError(f"prompt {row} is empty; give at least one token")
            if len(prompt) > limit:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens, more than its limit "
                    f"{limit}"
                )
            if not 0 <= processed[row] < len(prompt):
                raise ValueError(
                    f"{processed[row]} of the {len(prompt)} tokens of prompt {row} are "
                    f"said to be processed; expected 0 to {len(prompt) - 1}"
                )
            if len(stops) > width:
                raise ValueError(
                    f"{len(stops)} stop ids for prompt {row}, the state has room for "
                    f"{width}"
                )
            tokens_NP[row, : len(prompt)] = _whole(f"prompt {row}", prompt)
            stop_ids_NX[row, : len(stops)] = _whole("stop_ids", stops)
        least_N, most_N = _draft_bounds(count, min_drafts, max_drafts, block)
        _check_told(state.likeliest, top, told)
        return cls(
            tokens_NP=jnp.asarray(tokens_NP),
            lengths_N=jnp.array([len(prompt) for prompt in prompts], jnp.int32),
            limits_N=jnp.asarray(limits_N.astype(np.int32)),
            stop_ids_NX=jnp.asarray(stop_ids_NX),
            # The state that takes them over is donated; the caller keeps its own.
            sampling=jax.tree.map(jnp.array, sampling),
            min_drafts_N=jnp.asarray(least_N),
            max_drafts_N=jnp.asarray(most_N),
            adjustments=_adjusting(state.adjustments, adjustments, prompt_lengths),
            top_log_probs_N=jnp.array(top, jnp.int32),
            prompt_log_probs_N=jnp.array(told, bool),
            processed_N=jnp.asarray(np.asarray(processed, np.int32)),
        )


def _adjusting(
    room: Adjustments | None,
    adjustments: Sequence[Adjustment],
    prompt_lengths: Sequence[int],
) -> Adjustments | None:
    """Arrays of adjustments as a state with this room takes them up."""
    if room is None:
        for each in adjustments:
            AdjustmentLimits().check(each)
        return None
    return Adjustments.of(
        adjustments, room.limits, vocab=room.vocab, prompt_lengths=prompt_lengths
    )


def _check_told(
    room: Likeliest | None, top: Sequence[int], prompts: Sequence[bool]
) -> None:
    most = 0 if room is None else room.most
    if max(top) > most:
        raise ValueError(f"{max(top)} likely tokens, the state has room for {most}")
    if any(prompts) and (room is None or not room.keeps_prompts):
        raise ValueError(
            "log-probabilities of prompts are asked for, the state keeps none"
        )


def _draft_bounds(count: int, min_drafts, max_drafts, block_length: int):
    """Both bounds as one number per request."""
    max_drafts = block_length if max_drafts is None else max_drafts
    bounds = {
        "min_drafts": np.asarray(min_drafts),
        "max_drafts": np.asarray(max_drafts),
    }
    for name, bound in bounds.items():
        whole = np.issubdtype(bound.dtype, np.integer)
        if not whole or bound.shape not in ((), (count,)):
            raise ValueError(
                f"{name} must be a whole number or {count} of them (one per prompt), "
                f"got {bound.tolist()}"
            )
    least_N, most_N = (
        np.broadcast_to(each, (count,)).astype(np.int32) for each in bounds.values()
    )
    if np.any((least_N < 0) | (least_N > most_N) | (most_N > block_length)):
        raise ValueError(
            "drafts verified must satisfy 0 <= min_drafts <= max_drafts <= "
            f"{block_length}, got min_drafts {min_drafts} and max_drafts {max_drafts}"
        )
    return least_N, most_N


def _whole(name: str, values: Sequence[int]) -> np.ndarray:
    """The values as an array; NumPy would cut what is no integer without a word."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, got {array.tolist()}")
    return array


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


def _by_slot(_: Bool[Array, " B"]) -> PartitionSpec:
    return PartitionSpec(SLOTS)


@partial(jax.jit, donate_argnames=("state",))
@standard_settings()
@over_mesh(state_specs, _by_slot, out=0)
def release(state: DecodeState, released_B: Bool[Array, " B"]) -> DecodeState:
    """Empties slots, whatever their phase: finished ones, or cancelled. Donates it."""
    count_B = jnp.where(released_B, 0, 1)
    return replace(
        state,
        lengths_B=state.lengths_B * count_B,
        processed_B=state.processed_B * count_B,
        phase_B=jnp.where(released_B, Phase.EMPTY, state.phase_B),
    )


@partial(
    jax.jit,
    static_argnames=("chunk", "together"),
    donate_argnames=("state",),
)
@standard_settings()
@over_mesh(parameter_specs, parameter_specs, state_specs, replicated_specs, out=2)
def prefill(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    max_chunks: Int[Array, ""] | None = None,
    *,
    chunk: int,
    together: int | None = None,
) -> DecodeState:
    """Processes prompts from where each slot has come to, all tokens but the anchors.

    The anchor is left to the first round, which needs its logits; so prefill computes
    no logits, but for prompts whose log-probabilities are told. Donates `state`.

    Args:
      target: the model.
      drafter: observes every token too.
      state: some of whose slots are being prefilled; others are left alone.
      max_chunks: most chunks that each slot advances by; None for all it needs.
      chunk: tokens of a slot that are processed in one pass.
      together: slots that are prefilled in one pass, the first that need it; None takes
        all slots. Passes over a few do not pay for those that decode.
    """
    slots, paged = state.slots, state.pages_BP is not None
    together = slots if together is None else min(together, slots)
    if together == slots:
        slots_N = jnp.arange(slots)
        caches = state.target_cache, state.draft_cache
    else:
        waiting_B = state.phase_B == Phase.PREFILLING
        order_B = jnp.argsort(~waiting_B, stable=True)
        slots_N = jnp.where(waiting_B[order_B], order_B, slots)[:together]
        caches = (state.target_cache, state.draft_cache)
        caches = at_slots(caches, slots_N, paged=paged)
    pages_NP = at_slots(state.pages_BP, slots_N)
    tokens_NS, ends_N, processed_N, phase_N = (
        each.at[slots_N].get(mode="fill", fill_value=0)
        for each in (
            state.tokens_BS,
            state.lengths_B - 1,
            state.processed_B,
            state.phase_B,
        )
    )
    # Slots that need nothing have nothing left.
    ends_N = jnp.where(phase_N == Phase.PREFILLING, ends_N, processed_N)

    def unfinished(carry):
        count, processed_N, *_ = carry
        left = any_of(processed_N < ends_N)
        return left if max_chunks is None else left & (count < max_chunks)

    def step(carry):
        count, processed_N, (target_cache, draft_cache), likeliest = carry
        place_NQ = processed_N[:, None] + jnp.arange(chunk)
        ids_NQ = jnp.take_along_axis(tokens_NS, place_NQ, axis=1, mode="clip")
        counts_N = jnp.clip(ends_N - processed_N, 0, chunk)
        tokens = FlatTokens.from_rows(ids_NQ, processed_N, counts_N, pages_BP=pages_NP)
        x_TD, taps_TmD, target_cache = target(tokens, target_cache, taps=drafter.taps)
        draft_cache = drafter.observe(draft_cache, taps_TmD, tokens)
        if likeliest is not None and likeliest.keeps_prompts:
            with jax.named_scope("prompt_log_probs"):
                likeliest = _told_prompt(
                    target, likeliest, x_TD, tokens, slots_N, tokens_NS
                )
        caches = target_cache, draft_cache
        return count + 1, processed_N + counts_N, caches, likeliest

    _, processed_N, caches, likeliest = jax.lax.while_loop(
        unfinished, step, (jnp.int32(0), processed_N, caches, state.likeliest)
    )
    if together < slots:
        whole = (state.target_cache, state.draft_cache)
        caches = with_slots(whole, slots_N, caches, paged=paged)
    ready_N = (phase_N == Phase.PREFILLING) & (processed_N >= ends_N)
    phase_N = jnp.where(ready_N, Phase.DECODING, phase_N)
    return replace(
        state,
        processed_B=state.processed_B.at[slots_N].set(processed_N, mode="drop"),
        phase_B=state.phase_B.at[slots_N].set(phase_N, mode="drop"),
        target_cache=caches[0],
        draft_cache=caches[1],
        likeliest=likeliest,
    )


def _told_prompt(
    target, likeliest: Likeliest, x_TD, tokens: FlatTokens, slots_N, tokens_NS
) -> Likeliest:
    """With what is told of the tokens behind a pass's rows, where any slot wants it."""
    slots_T = slots_N[tokens.slots_T]
    kept_T = (tokens.slots_T >= 0) & likeliest.of_prompt_B.at[slots_T].get(mode="clip")
    next_T = tokens_NS.at[tokens.slots_T, tokens.positions_T + 1].get(mode="clip")

    def told():
        logits_TV = head_logits(target.norm(x_TD), target.head_VD)
        return likeliest.told_prompt(logits_TV, tokens, slots_T, next_T, kept_T)

    return jax.lax.cond(jnp.any(kept_T), told, lambda: likeliest)


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

    Raises:
      ValueError: see `DecodeState.empty` and `Admission.of`.
    """
    if capacity is None:
        capacity = int(max(_whole("limits", limits), default=0)) + block_length
    state = DecodeState.empty(
        target,
        drafter,
        slots=len(prompts),
        capacity=capacity,
        block_length=block_length,
        stop_ids=max(1, *map(len, stop_ids)) if stop_ids else 1,
        log_probs=log_probs,
        adjustments=AdjustmentLimits.of(adjustments or ()),
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
