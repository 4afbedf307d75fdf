"""One round of speculative decoding, and the loop over it.

    anchor -> propose -> schedule -> pack -> target (by bucket) -> verify -> commit

`decode_round(state) -> state` is pure; `decode` is `lax.while_loop` over it. There is
no other decode path: plain decoding is a round whose drafter proposes nothing.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.costs import check_buckets
from jaxspark.decoding.couplings import (
    COUPLINGS,
    Coupling,
    DraftSampler,
    Verdict,
    emitted,
    verify,
)
from jaxspark.decoding.outlook import Outlook
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.decoding.state import Counters, DecodeState
from jaxspark.drafters import Proposal
from jaxspark.models import FlatTokens
from jaxspark.settings import standard_settings


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What is fixed when a round is compiled.

    Attributes:
      block_length: most drafts proposed per round and slot.
      coupling: "rejection" or "gumbel", see `couplings`.
      schedule: chooses how much is drafted and what is verified.
      buckets: token counts the target is compiled for, ascending; None takes one that
        holds every draft of every slot. A schedule that knows costs knows its own.
      calibration: of the drafter's confidences; None takes them as they are.
    """

    block_length: int
    coupling: Coupling = "rejection"
    schedule: Scheduler = Fixed()
    buckets: tuple[int, ...] | None = None
    calibration: Calibration | None = None

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise ValueError(
                f"unknown coupling {self.coupling!r}; expected one of {COUPLINGS}"
            )
        if self.coupling not in self.schedule.couplings:
            raise ValueError(
                f"the schedule {type(self.schedule).__name__} lets a draft decide "
                "whether it is verified itself, which changes the distribution of the "
                f"output under coupling {self.coupling!r}; use one of "
                f"{self.schedule.couplings}, or the schedule Lagged"
            )
        if self.schedule.costs is not None and self.buckets is not None:
            raise ValueError(
                "the schedule knows the costs of token buckets of its own, leave out "
                f"buckets {self.buckets}"
            )
        if self.calibration is not None:
            self.calibration.check(self.block_length, self.coupling)

    def check(self, slots: int) -> None:
        """Raises `ValueError` if they do not do for so many slots."""
        for length in self.draft_lengths:
            self.sizes(slots, length)

    @property
    def draft_lengths(self) -> tuple[int, ...]:
        """Numbers of drafts that rounds are compiled for, ascending.

        Raises:
          ValueError: the schedule knows the costs of other blocks.
        """
        lengths = self.schedule.draft_lengths(self.block_length)
        if self.schedule.costs is not None and lengths[-1] != self.block_length:
            raise ValueError(
                f"the schedule knows the costs of draft lengths {lengths}, blocks have "
                f"{self.block_length} drafts"
            )
        return lengths

    def sizes(self, slots: int, draft_length: int | None = None) -> tuple[int, ...]:
        """The token buckets for rounds of `slots` slots that draft so much.

        Whole blocks by default.

        Raises:
          ValueError: they are not ascending, or cannot hold one token per slot.
        """
        draft_length = self.block_length if draft_length is None else draft_length
        costs = self.schedule.costs
        full = slots * (draft_length + 1)
        if costs is not None:
            sizes = costs.drafting(draft_length).sizes
        elif self.buckets is None or not draft_length:
            sizes = (full,)
        else:
            sizes = self.buckets
        check_buckets(sizes)
        if sizes[-1] < slots:
            raise ValueError(
                f"the largest token bucket {sizes[-1]} cannot hold one token of each "
                f"of {slots} slots"
            )
        return sizes


@standard_settings()
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
    rounds = [
        partial(_round, target, drafter, options, length)
        for length in options.draft_lengths
    ]
    if len(rounds) == 1:
        return rounds[0](state)
    forecast = _outlook(state, _earlier(state, options))
    index = options.schedule.draft(forecast, state.schedule.idle_BG)
    return jax.lax.switch(index, rounds, state)


def _round(target, drafter, options, draft_length: int, state: DecodeState):
    """A round that drafts so many tokens for every slot."""
    slots = len(state.lengths_B)
    if draft_length:
        with jax.named_scope("propose"):
            proposal, draft_cache = _propose(
                target, drafter, state, options.coupling, draft_length
            )
        state = replace(state, draft_cache=draft_cache)
    else:
        proposal = Proposal.empty(slots)
    with jax.named_scope("schedule"):
        lengths_B, schedule = schedule_round(state, proposal, options)
    state = replace(
        state,
        schedule=schedule,
        confidence_BG=state.confidence_BG.at[:, :draft_length].set(
            proposal.confidence_BG
        ),
        sharpness_BG=state.sharpness_BG.at[:, :draft_length].set(proposal.sharpness_BG),
    )
    sizes = options.sizes(slots, draft_length)
    return _verified(target, drafter, state, proposal, lengths_B, sizes, options)


def _outlook(state: DecodeState, survival_BG) -> Outlook:
    """Survival beside what may be verified before anything is proposed."""
    room_B = jnp.maximum(state.limits_B - state.lengths_B - 1, 0)
    return state.schedule.outlook(survival_BG, live_B=~state.done_B, room_B=room_B)


def _earlier(state: DecodeState, options: DecodeOptions) -> Float[Array, "n B G"]:
    """Survival of the earlier rounds a schedule may look at."""
    usual_BUG = None
    if options.calibration is not None:
        usual_BUG = options.calibration.usual_survival(
            options.block_length, state.sampling.temperature
        )
    return state.schedule.earlier(options.schedule, usual_BUG)


def _propose(target, drafter, state: DecodeState, coupling: Coupling, length: int):
    draw = DraftSampler(
        coupling,
        state.sampling,
        state.lengths_B - 1,
        target.config.vocab_size,
    )
    return drafter.propose(
        target,
        state.draft_cache,
        state.tokens_BS,
        state.lengths_B,
        draw,
        length,
    )


def schedule_round(
    state: DecodeState, proposal: Proposal, options: DecodeOptions
) -> tuple[Int[Array, " B"], ScheduleState]:
    """Verification lengths of a proposal, and what scheduling remembers of it."""
    memory = state.schedule
    slots, drafted = proposal.tokens_BG.shape
    if not drafted:
        return proposal.lengths_B, memory.after_none()
    if options.calibration is None:
        survival_Bg = jnp.cumprod(jax.nn.sigmoid(proposal.confidence_BG), axis=1)
    else:
        survival_Bg = options.calibration.survival(
            proposal.confidence_BG, proposal.sharpness_BG, state.sampling.temperature
        )
    proposed_Bg = jnp.arange(drafted) < proposal.lengths_B[:, None]
    survival_Bg = jnp.where(proposed_Bg, survival_Bg, 0.0)
    now = _outlook(state, survival_Bg)
    most_B = jnp.minimum(now.most_B, proposal.lengths_B)
    now = replace(now, most_B=most_B, floor_B=jnp.minimum(now.floor_B, most_B))
    earlier_nBG = _earlier(state, options)
    lengths_B = memory.lengths(
        options.schedule,
        now,
        _outlook(state, earlier_nBG),
        options.sizes(slots, drafted)[-1],
    )
    return lengths_B, memory.after_drafts(survival_Bg, earlier_nBG, ~state.done_B)


def _verified(target, drafter, state, proposal, lengths_B, sizes, options):
    """Packs anchors and drafts into the smallest bucket that holds them; commits."""
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

    branches = [branch(size) for size in sizes]
    index = jnp.searchsorted(jnp.array(sizes), jnp.sum(counts_B))
    verdict, target_cache, draft_cache = jax.lax.switch(
        index, branches, state.target_cache, state.draft_cache
    )
    state = replace(state, target_cache=target_cache, draft_cache=draft_cache)
    with jax.named_scope("commit"):
        return commit(state, proposal, lengths_B, verdict)


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
        counters=_count(state, proposal, lengths_B, verdict.accepted_B),
    )


def _count(state, proposal, lengths_B, accepted_B) -> Counters:
    draft_G = jnp.arange(state.confidence_BG.shape[1])
    live_B1 = ~state.done_B[:, None]
    reached_BG = live_B1 & (draft_G < lengths_B[:, None])
    reached_BG &= draft_G <= accepted_B[:, None]
    accepted_BG = live_B1 & (draft_G < accepted_B[:, None])
    counters = state.counters
    drafts = proposal.tokens_BG.shape[1] > 0
    return Counters(
        rounds_B=counters.rounds_B + ~state.done_B,
        reached_BG=counters.reached_BG + reached_BG,
        accepted_BG=counters.accepted_BG + accepted_BG,
        drafted_B=counters.drafted_B + (~state.done_B if drafts else 0),
        verified_B=counters.verified_B + jnp.where(state.done_B, 0, lengths_B),
    )


@partial(jax.jit, static_argnames=("options",), donate_argnames=("state",))
@standard_settings()
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
@standard_settings()
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
