"""Prompts are read by chunks, in place, between the rounds of those that decode."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxspark.decoding.flattened import unflattens
from jaxspark.decoding.likeliest import Likeliest
from jaxspark.decoding.state import DecodeState, Phase
from jaxspark.drafters import Drafter
from jaxspark.models import FlatTokens, TargetModel
from jaxspark.models.base import at_slots, with_slots
from jaxspark.models.layers.linear import head_logits
from jaxspark.parallel.axes import any_of
from jaxspark.parallel.mesh import over_mesh
from jaxspark.parallel.rules import (
    parameter_specs,
    replicated_specs,
    row_specs,
    state_specs,
)
from jaxspark.settings import standard_settings


@partial(
    jax.jit,
    static_argnames=("chunk", "together"),
    donate_argnames=("state",),
)
@unflattens
@standard_settings()
@over_mesh(
    parameter_specs, parameter_specs, state_specs, replicated_specs, row_specs, out=2
)
def prefill(
    target: TargetModel,
    drafter: Drafter,
    state: DecodeState,
    max_chunks: Int[Array, ""] | None = None,
    reading_B: Bool[Array, " B"] | None = None,
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
      reading_B: slots whose prompts are processed, of those that need it; None takes
        all that do.
      chunk: tokens of a slot that are processed in one pass.
      together: slots of a shard that are prefilled in one pass, the first of them; None
        takes all slots. Passes over a few do not pay for those that decode.
    """
    slots, paged = state.slots, state.pages_BP is not None
    together = slots if together is None else min(together, slots)
    waiting_B = state.phase_B == Phase.PREFILLING
    if reading_B is not None:
        waiting_B &= reading_B
    if together == slots:
        slots_N = jnp.arange(slots)
        caches = state.target_cache, state.draft_cache
    else:
        order_B = jnp.argsort(~waiting_B, stable=True)
        slots_N = jnp.where(waiting_B[order_B], order_B, slots)[:together]
        caches = (state.target_cache, state.draft_cache)
        caches = at_slots(caches, slots_N, paged=paged)
    pages_NP = at_slots(state.pages_BP, slots_N)
    tokens_NS, ends_N, processed_N, reading_N = (
        each.at[slots_N].get(mode="fill", fill_value=0)
        for each in (
            state.tokens_BS,
            state.lengths_B - 1,
            state.processed_B,
            waiting_B,
        )
    )
    # Slots that need nothing have nothing left.
    ends_N = jnp.where(reading_N, ends_N, processed_N)

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
    ready_N = reading_N & (processed_N >= ends_N)
    phase_N = jnp.where(
        ready_N, Phase.DECODING, state.phase_B.at[slots_N].get(mode="clip")
    )
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
