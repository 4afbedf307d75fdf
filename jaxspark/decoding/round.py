"""One round of speculative decoding.

    anchor -> propose -> schedule -> pack -> target (by bucket) -> verify -> commit

`decode_round(state) -> state` is pure; `loop` has the programs made of it. A round has
two halves, up to the proposal and from it on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, UInt

from jaxspark.decoding.acceptance import (
    acceptance_logits,
    check_estimator,
    observe,
)
from jaxspark.decoding.adjusted_logits import Adjuster
from jaxspark.decoding.commit import commit
from jaxspark.decoding.couplings import CoupledSampler
from jaxspark.decoding.couplings import verify as verdict_of
from jaxspark.decoding.forecast import Forecast, Verification, smallest_bucket
from jaxspark.decoding.grammar_masks import MaskedAdjuster
from jaxspark.decoding.options import DecodeOptions
from jaxspark.decoding.schedule_state import ScheduleState
from jaxspark.decoding.state import DecodeState, Phase
from jaxspark.decoding.streamed import streams_vocabulary
from jaxspark.drafters import DraftContext, DraftDistribution, Drafter, Proposal
from jaxspark.models import FlatTokens, TargetModel
from jaxspark.parallel.axes import MODEL, SLOTS, max_of
from jaxspark.parallel.rules import path_name
from jaxspark.settings import standard_settings


@standard_settings()
def decode_round(
    target: TargetModel, drafter: Drafter, state: DecodeState, options: DecodeOptions
) -> DecodeState:
    """Drafts, verifies and commits one block for every slot that decodes.

    Each of them gains between 1 and `block_length + 1` tokens.
    """
    if options.block != state.block_length:
        raise ValueError(
            f"options draft {options.block} tokens, the state was made for blocks of "
            f"{state.block_length}"
        )
    check_estimator(state, options)
    lagged = lagged_forecast(state, options)
    lengths = options.draft_lengths
    schedule = state.schedule.informed(options.schedule)
    index = jnp.int32(0)
    if len(lengths) > 1:
        index = max_of(schedule.draft(lagged, state.schedule.rounds_since_BG))
    groups = _verified_alike(lengths, drafter, options)
    rounds = [partial(_round, target, drafter, options, group) for group in groups]
    where = [
        (n, place) for n, group in enumerate(groups) for place in range(len(group))
    ]
    group, place = jnp.array(where)[index]
    return jax.lax.switch(group, rounds, place, state, lagged)


def _verified_alike(
    lengths: tuple[int, ...], drafter: Drafter, options: DecodeOptions
) -> list[tuple[int, ...]]:
    """Draft lengths by the second half of their rounds.

    Under the gumbel coupling that looks at tokens only, and is compiled once for all
    that draft. Rejection asks for what drafts were drawn from, which is as long as they
    are, and too large to be handed on. So is the cache of a drafter that goes token by
    token: XLA for CPUs copies what a loop has written when a branch returns it.
    """
    if options.coupling == "rejection" or not drafter.in_one_pass:
        return [(length,) for length in lengths]
    plain = tuple(length for length in lengths if not length)
    drafting = tuple(length for length in lengths if length)
    return [group for group in (plain, drafting) if group]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafted:
    """What the first half of a round leaves to the second.

    Attributes:
      proposal: the drafts.
      verification: what is verified of them.
    """

    proposal: Proposal
    verification: Verification

    def among(self, longest: int, buckets: Sequence[int]) -> "Drafted":
        """As several draft lengths leave it to a second half that they share.

        Args:
          longest: of the draft lengths.
          buckets: where the second half has each token bucket of this one.
        """
        bucket = jnp.array(buckets)[self.verification.bucket]
        verification = replace(self.verification, bucket=bucket)
        return Drafted(self.proposal.padded(longest), verification)


def drafted_specs(_: Drafted | None = None) -> Drafted:
    """How what the first half leaves is shared out; vocabularies as logits are."""
    axes = {"B": SLOTS, "W": MODEL}

    def everything() -> Drafted:
        q = DraftDistribution(
            log_q_BGW=jnp.zeros((1, 0, 1)),
            ids_W=jnp.zeros((1,), jnp.int32),
            deterministic_B=jnp.zeros((1,), bool),
        )
        proposal = replace(Proposal.empty(1), q=q)
        bucket = jnp.zeros((), jnp.int32)
        return Drafted(proposal, Verification(proposal.lengths_B, bucket))

    def spec(path, leaf) -> PartitionSpec:
        letters = path_name(path).rpartition("_")[2] if leaf.ndim else ""
        return PartitionSpec(*map(axes.get, letters))

    return jax.tree_util.tree_map_with_path(spec, jax.eval_shape(everything))


def _round(
    target, drafter, options, lengths: tuple[int, ...], index, state, lagged
) -> DecodeState:
    """A round that drafts one of some numbers of tokens for every slot."""
    with jax.named_scope("adjust"):
        adjuster = adjuster_for(state)
    sizes = options.all_sizes(state.slots, lengths)

    def half(length: int, state, lagged):
        state, drafted = draft_half(
            target, drafter, options, length, state, lagged, adjuster
        )
        if len(lengths) > 1:
            own = options.sizes(state.slots, length)
            drafted = drafted.among(lengths[-1], [sizes.index(size) for size in own])
        return state, drafted

    halves = [partial(half, length) for length in lengths]
    state, drafted = jax.lax.switch(index, halves, state, lagged)
    return verify_half(target, drafter, options, state, drafted, adjuster, sizes)


def draft_half(
    target: TargetModel,
    drafter: Drafter,
    options: DecodeOptions,
    draft_length: int,
    state: DecodeState,
    lagged: Forecast,
    adjuster: Adjuster | MaskedAdjuster | None,
) -> tuple[DecodeState, Drafted]:
    """The first half of a round: drafts, and decides how many are verified."""
    if draft_length:
        with jax.named_scope("propose"):
            proposal, draft_cache = _propose(
                target, drafter, state, adjuster, options, draft_length
            )
        state = replace(state, draft_cache=draft_cache)
    else:
        proposal = Proposal.empty(state.slots)
    with jax.named_scope("schedule"):
        verification, schedule = schedule_round(state, proposal, lagged, options)
        # The largest of those that shards of slots ask for, which have own tokens.
        bucket = max_of(verification.bucket)
        verification = replace(verification, bucket=bucket)
    state = replace(
        state,
        schedule=schedule,
        confidence_BG=state.confidence_BG.at[:, :draft_length].set(
            proposal.confidence_BG
        ),
        certainty_BG=state.certainty_BG.at[:, :draft_length].set(proposal.certainty_BG),
    )
    return state, Drafted(proposal, verification)


def adjuster_for(
    state: DecodeState, masks_BQU: UInt[Array, "B Q U"] | None = None
) -> Adjuster | MaskedAdjuster | None:
    """Adjusts logits of the state's next round; None where nothing is compiled.

    Args:
      state: the slots.
      masks_BQU: see `MaskedAdjuster`; None masks nothing.
    """
    adjuster = Adjuster.of(
        state.adjustments,
        tokens_BS=state.tokens_BS,
        anchors_B=state.processed_B,
        stop_ids_BX=state.stop_ids_BX,
        live_B=state.live_B,
    )
    if masks_BQU is None:
        return adjuster
    return MaskedAdjuster(
        adjuster=adjuster, masks_BQU=masks_BQU, anchors_B=state.processed_B
    )


def _forecast(state: DecodeState, survival_BG) -> Forecast:
    """Survival, and bounds on drafts: no more than a slot's limit has room for."""
    room_B = jnp.maximum(state.limits_B - state.lengths_B - 1, 0)
    return state.schedule.forecast(
        survival_BG,
        live_B=state.live_B,
        room_B=room_B,
        reading=jnp.sum(state.phase_B == Phase.PREFILLING),
    )


def lagged_forecast(state: DecodeState, options: DecodeOptions) -> Forecast:
    """What is known before anything is drafted, from earlier rounds [n, B, G]."""
    prior_BUG = None
    if options.calibration is not None:
        prior_BUG = options.calibration.prior_survival(
            options.block, state.sampling.temperature
        )
    survival_nBG = state.schedule.lagged_survival(options.schedule, prior_BUG)
    return _forecast(state, survival_nBG)


def _propose(target, drafter, state: DecodeState, adjuster, options, length: int):
    # What the anchor's position is in a slot that decodes. Elsewhere drafts are for
    # nothing, and must not touch cache rows that are valid.
    positions_B = state.processed_B
    sampler = CoupledSampler(
        options.coupling,
        state.sampling,
        positions_B,
        adjuster,
        streams=_streams(target, adjuster),
    )
    context = DraftContext(
        tokens_BS=state.tokens_BS,
        lengths_B=positions_B + 1,
        first_round_B=state.counters.rounds_B == 0,
        pages_BP=state.pages_BP,
    )
    return drafter.propose(target, state.draft_cache, context, sampler, length)


def _streams(target, adjuster: Adjuster | MaskedAdjuster | None) -> bool:
    """Whether logits are not written; masks of grammars are as long as they."""
    if isinstance(adjuster, MaskedAdjuster):
        return False
    return streams_vocabulary(target.config.hidden_size)


def schedule_round(
    state: DecodeState, proposal: Proposal, lagged: Forecast, options: DecodeOptions
) -> tuple[Verification, ScheduleState]:
    """What is verified of a proposal, and what scheduling remembers of it."""
    memory = state.schedule
    slots, drafted = proposal.tokens_BG.shape
    sizes = options.sizes(slots, drafted)
    if not drafted:
        bucket = smallest_bucket(sizes, lagged.anchors)
        return Verification(proposal.lengths_B, bucket), memory.after_none()
    logits_Bg = acceptance_logits(state, proposal, options)
    survival_Bg = jnp.cumprod(jax.nn.sigmoid(logits_Bg), axis=1)
    proposed_Bg = jnp.arange(drafted) < proposal.lengths_B[:, None]
    survival_Bg = jnp.where(proposed_Bg, survival_Bg, 0.0)
    current = _forecast(state, survival_Bg)
    most_B = jnp.minimum(current.max_drafts_B, proposal.lengths_B)
    least_B = jnp.minimum(current.min_drafts_B, most_B)
    current = replace(current, max_drafts_B=most_B, min_drafts_B=least_B)
    schedule = memory.informed(options.schedule)
    verification = schedule(current, lagged.first(drafted), sizes)
    memory = memory.after_drafts(survival_Bg, lagged.survival_BG, state.live_B)
    return verification, memory


def verify_half(
    target: TargetModel,
    drafter: Drafter,
    options: DecodeOptions,
    state: DecodeState,
    drafted: Drafted,
    adjuster: Adjuster | MaskedAdjuster | None,
    sizes: tuple[int, ...],
) -> DecodeState:
    """The second half: packs anchors and drafts, verifies and commits."""
    proposal, verification = drafted.proposal, drafted.verification
    anchors_B, lengths_B = state.processed_B, verification.lengths_B
    anchor_B1 = jnp.take_along_axis(state.tokens_BS, anchors_B[:, None], axis=1)
    rows_BQ = jnp.concatenate([anchor_B1, proposal.tokens_BG], axis=1)
    counts_B = jnp.where(state.live_B, lengths_B + 1, 0)

    def branch(bucket):
        def run(target_cache, draft_cache):
            tokens = FlatTokens.from_rows(
                rows_BQ, anchors_B, counts_B, capacity=bucket, pages_BP=state.pages_BP
            )
            with jax.named_scope("target"):
                x_TD, taps_TmD, target_cache = target(
                    tokens, target_cache, taps=drafter.taps
                )
            with jax.named_scope("observe"):
                draft_cache = drafter.observe(draft_cache, taps_TmD, tokens)
            with jax.named_scope("verify"):
                verdict = verdict_of(
                    options.coupling,
                    target.norm(x_TD),
                    target.head_VD,
                    tokens,
                    proposal,
                    lengths_B,
                    state.sampling,
                    adjuster=adjuster,
                    log_probs=state.keeps_log_probs,
                    likeliest=state.likeliest,
                    streams=_streams(target, adjuster),
                )
            return verdict, target_cache, draft_cache

        return run

    verdict, target_cache, draft_cache = jax.lax.switch(
        verification.bucket,
        [branch(size) for size in sizes],
        state.target_cache,
        state.draft_cache,
    )
    state = replace(state, target_cache=target_cache, draft_cache=draft_cache)
    with jax.named_scope("estimate"):
        state = observe(state, proposal, lengths_B, verdict.accepted_B, options)
    with jax.named_scope("commit"):
        return commit(state, proposal, lengths_B, verdict)
