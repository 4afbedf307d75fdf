"""What a round adds to its slots: accepted drafts, the next token, and counts."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxspark.decoding.state import Counters, DecodeState, Phase
from jaxspark.decoding.verdicts import Verdict, emitted
from jaxspark.drafters import Proposal


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
    count_B = jnp.where(state.live_B, count_B, 0).astype(jnp.int32)

    place_BQ = state.lengths_B[:, None] + row_Q
    # Entries that are not committed go out of range and are dropped.
    place_BQ = jnp.where(row_Q < count_B[:, None], place_BQ, state.tokens_BS.shape[1])
    slot_B1 = jnp.arange(len(count_B))[:, None]
    grown_B = state.lengths_B + count_B
    finished_B = state.live_B & (stopped_B | (grown_B >= state.limits_B))
    log_probs_BS = state.log_probs_BS
    if log_probs_BS.shape[1]:
        log_probs_BS = log_probs_BS.at[slot_B1, place_BQ].set(
            verdict.log_probs_BQ, mode="drop"
        )
    accepted_BS = state.accepted_BS
    if accepted_BS.shape[1]:
        is_draft_BQ = row_Q < verdict.accepted_B[:, None]
        accepted_BS = accepted_BS.at[slot_B1, place_BQ].set(is_draft_BQ, mode="drop")
    return replace(
        state,
        tokens_BS=state.tokens_BS.at[slot_B1, place_BQ].set(emitted_BQ, mode="drop"),
        log_probs_BS=log_probs_BS,
        accepted_BS=accepted_BS,
        lengths_B=grown_B,
        processed_B=jnp.where(state.live_B, grown_B - 1, state.processed_B),
        phase_B=jnp.where(finished_B, Phase.FINISHED, state.phase_B),
        likeliest=verdict.likeliest,
        counters=_count(state, proposal, lengths_B, verdict.accepted_B),
    )


def _count(state, proposal, lengths_B, accepted_B) -> Counters:
    draft_G, live_B = jnp.arange(state.block_length), state.live_B
    reached_BG = live_B[:, None] & (draft_G < lengths_B[:, None])
    reached_BG &= draft_G <= accepted_B[:, None]
    accepted_BG = live_B[:, None] & (draft_G < accepted_B[:, None])
    counters = state.counters
    drafted = proposal.tokens_BG.shape[1] > 0
    return Counters(
        rounds_B=counters.rounds_B + live_B,
        reached_BG=counters.reached_BG + reached_BG,
        accepted_BG=counters.accepted_BG + accepted_BG,
        drafted_B=counters.drafted_B + (live_B if drafted else 0),
        drafts_B=counters.drafts_B + jnp.where(live_B, proposal.lengths_B, 0),
        verified_B=counters.verified_B + jnp.where(live_B, lengths_B, 0),
    )
