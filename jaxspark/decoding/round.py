"""One round of speculative decoding, and the loop over it.

    anchor -> propose -> schedule -> pack -> target (by bucket) -> verify -> commit

`decode_round(state) -> state` is pure; `decode` is `lax.while_loop` over it. There is
no other decode path: plain decoding is a round whose drafter proposes nothing.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspark.decoding.couplings import (
    COUPLINGS,
    Coupling,
    DraftSampler,
    Verdict,
    emitted,
    verify,
)
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.state import Counters, DecodeState
from jaxspark.drafters import Proposal
from jaxspark.models import FlatTokens


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What is fixed when a round is compiled.

    Attributes:
      block_length: drafts proposed per round.
      coupling: "rejection" or "gumbel", see `couplings`.
      schedule: chooses verification lengths.
      buckets: token counts the target is compiled for, ascending; None compiles only
        one, which holds every draft of every slot.
    """

    block_length: int
    coupling: Coupling = "rejection"
    schedule: Scheduler = Fixed()
    buckets: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise ValueError(
                f"unknown coupling {self.coupling!r}; expected one of {COUPLINGS}"
            )

    def sizes(self, slots: int) -> tuple[int, ...]:
        """The token buckets for `slots` slots.

        Raises:
          ValueError: they are not ascending, or cannot hold every draft of every slot.
        """
        full = slots * (self.block_length + 1)
        sizes = (full,) if self.buckets is None else self.buckets
        if not sizes or any(a >= b for a, b in zip(sizes, sizes[1:])):
            raise ValueError(f"token buckets must be ascending, got {sizes}")
        if sizes[-1] < full:
            raise ValueError(
                f"the largest token bucket {sizes[-1]} cannot hold {slots} slots of "
                f"{self.block_length + 1} tokens; it must be at least {full}"
            )
        return sizes


def decode_round(
    target, drafter, state: DecodeState, options: DecodeOptions
) -> DecodeState:
    """Drafts, verifies and commits one block for every slot that is not done.

    Each live slot gains between 1 and `block_length + 1` tokens.
    """
    expected = state.confidence_BG.shape[1]
    if options.block_length != expected:
        raise ValueError(
            f"options draft {options.block_length} tokens, the state was made for "
            f"blocks of {expected}"
        )
    draw = DraftSampler(
        options.coupling,
        state.sampling,
        state.lengths_B - 1,
        target.config.vocab_size,
    )
    with jax.named_scope("propose"):
        proposal, draft_cache = drafter.propose(
            target,
            state.draft_cache,
            state.tokens_BS,
            state.lengths_B,
            draw,
            options.block_length,
        )
    with jax.named_scope("schedule"):
        lengths_B = _verify_lengths(state, proposal, options)
    state = replace(state, draft_cache=draft_cache)
    verdict, target_cache, draft_cache = _verify_in_bucket(
        target, drafter, state, proposal, lengths_B, options
    )
    state = replace(
        state,
        target_cache=target_cache,
        draft_cache=draft_cache,
        confidence_BG=proposal.confidence_BG,
    )
    with jax.named_scope("commit"):
        return commit(state, proposal, lengths_B, verdict)


def _verify_lengths(state, proposal, options):
    """Drafts worth verifying: scheduled, proposed, and within the slot's budget."""
    room_B = state.limits_B - state.lengths_B - 1
    lengths_B = options.schedule(proposal.confidence_BG)
    lengths_B = jnp.minimum(jnp.minimum(lengths_B, proposal.lengths_B), room_B)
    return jnp.where(state.done_B, 0, jnp.maximum(lengths_B, 0))


def _verify_in_bucket(target, drafter, state, proposal, lengths_B, options):
    """Packs anchors and drafts into the smallest bucket that holds them; verifies."""
    anchors_B = state.lengths_B - 1
    anchor_B1 = jnp.take_along_axis(state.tokens_BS, anchors_B[:, None], axis=1)
    rows_BQ = jnp.concatenate([anchor_B1, proposal.tokens_BG], axis=1)
    counts_B = jnp.where(state.done_B, 0, lengths_B + 1)

    def branch(bucket):
        def run(target_cache, draft_cache):
            tokens = FlatTokens.from_rows(rows_BQ, anchors_B, counts_B, capacity=bucket)
            with jax.named_scope("target"):
                x_DT, taps_mDT, target_cache = target(
                    tokens, target_cache, taps=drafter.taps
                )
                logits_TV = target.logits(x_DT)
            with jax.named_scope("observe"):
                draft_cache = drafter.observe(draft_cache, taps_mDT, tokens)
            with jax.named_scope("verify"):
                verdict = verify(
                    options.coupling,
                    logits_TV,
                    tokens,
                    proposal,
                    lengths_B,
                    state.sampling,
                    log_probs=state.log_probs_BS.shape[1] > 0,
                )
            return verdict, target_cache, draft_cache

        return run

    sizes = options.sizes(len(counts_B))
    branches = [branch(size) for size in sizes]
    index = jnp.searchsorted(jnp.array(sizes), jnp.sum(counts_B))
    return jax.lax.switch(index, branches, state.target_cache, state.draft_cache)


def commit(
    state: DecodeState,
    proposal: Proposal,
    lengths_B: Int[Array, " B"],
    verdict: Verdict,
) -> DecodeState:
    """Appends accepted drafts and the next token, up to a stop token or the limit."""
    emitted_BQ = emitted(proposal.tokens_BG, verdict.accepted_B, verdict.next_B)
    Q = emitted_BQ.shape[1]
    row_Q = jnp.arange(Q)
    is_stop_BQ = jnp.any(emitted_BQ[..., None] == state.stop_ids_BX[:, None], axis=-1)
    is_stop_BQ &= row_Q <= verdict.accepted_B[:, None]
    stopped_B = jnp.any(is_stop_BQ, axis=1)
    until_stop_B = jnp.argmax(is_stop_BQ, axis=1) + 1
    count_B = jnp.where(stopped_B, until_stop_B, verdict.accepted_B + 1)
    count_B = jnp.where(state.done_B, 0, count_B).astype(jnp.int32)

    place_BQ = state.lengths_B[:, None] + row_Q
    # Entries that are not committed go out of range and are dropped.
    place_BQ = jnp.where(row_Q < count_B[:, None], place_BQ, state.tokens_BS.shape[1])
    slot_B1 = jnp.arange(len(count_B))[:, None]
    lengths_new_B = state.lengths_B + count_B
    log_probs_BS = state.log_probs_BS
    if log_probs_BS.shape[1]:
        log_probs_BS = log_probs_BS.at[slot_B1, place_BQ].set(
            verdict.log_probs_BQ, mode="drop"
        )
    return replace(
        state,
        tokens_BS=state.tokens_BS.at[slot_B1, place_BQ].set(emitted_BQ, mode="drop"),
        log_probs_BS=log_probs_BS,
        lengths_B=lengths_new_B,
        done_B=state.done_B | stopped_B | (lengths_new_B >= state.limits_B),
        counters=_count(state, lengths_B, verdict.accepted_B),
    )


def _count(state, lengths_B, accepted_B) -> Counters:
    draft_G = jnp.arange(state.confidence_BG.shape[1])
    live_B1 = ~state.done_B[:, None]
    reached_BG = live_B1 & (draft_G < lengths_B[:, None])
    reached_BG &= draft_G <= accepted_B[:, None]
    accepted_BG = live_B1 & (draft_G < accepted_B[:, None])
    counters = state.counters
    return Counters(
        rounds_B=counters.rounds_B + ~state.done_B,
        reached_BG=counters.reached_BG + reached_BG,
        accepted_BG=counters.accepted_BG + accepted_BG,
    )


@partial(jax.jit, static_argnames=("options",), donate_argnames=("state",))
def decode(
    target, drafter, state: DecodeState, max_rounds: Int[Array, ""], *, options
) -> DecodeState:
    """Rounds until every slot is done or `max_rounds` have run; donates `state`."""

    def unfinished(carry):
        count, state = carry
        return (count < max_rounds) & ~jnp.all(state.done_B)

    def body(carry):
        count, state = carry
        return count + 1, decode_round(target, drafter, state, options)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


@partial(jax.jit, static_argnames=("chunk",), donate_argnames=("state",))
def prefill(target, drafter, state: DecodeState, *, chunk: int) -> DecodeState:
    """Processes all prompt tokens but the anchors, `chunk` per slot at a time.

    The anchor is left to the first round, which needs its logits; so prefill computes
    no logits at all. Donates `state`.
    """
    pending_B = jnp.where(state.done_B, 0, state.lengths_B - 1)
    slots = len(pending_B)

    def body(carry):
        begin, target_cache, draft_cache = carry
        place_Q = begin + jnp.arange(chunk)
        ids_BQ = state.tokens_BS.at[:, place_Q].get(mode="fill", fill_value=0)
        starts_B = jnp.full((slots,), begin)
        counts_B = jnp.clip(pending_B - begin, 0, chunk)
        tokens = FlatTokens.from_rows(ids_BQ, starts_B, counts_B)
        _, taps_mDT, target_cache = target(tokens, target_cache, taps=drafter.taps)
        draft_cache = drafter.observe(draft_cache, taps_mDT, tokens)
        return begin + chunk, target_cache, draft_cache

    start = (jnp.int32(0), state.target_cache, state.draft_cache)
    _, target_cache, draft_cache = jax.lax.while_loop(
        lambda carry: carry[0] < jnp.max(pending_B), body, start
    )
    return replace(state, target_cache=target_cache, draft_cache=draft_cache)
