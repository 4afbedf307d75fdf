"""Exact enumeration of one speculative round on a tiny vocabulary.

Every random event of a round under `coupling="rejection"` is replaced by its
probabilities: each possible draft block, each acceptance pattern, each correction. The
same functions that decode real models supply them (`Drafter.propose`, `schedule_round`,
the target's pass over anchor and drafts, `Adjuster`, `acceptance_probability`,
`correction_weights`), so what is summed up is the decoder's own arithmetic. A round
that emits fewer than G+1 tokens is completed with plain sampling. The result must be
the target's distribution of the next G+1 tokens, which is worked out one prefix at a
time, with logits adjusted `by_definition`.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxspark.decoding import (
    Adjustment,
    AdjustmentLimits,
    DecodeOptions,
    init_state,
)
from jaxspark.decoding.adjustment_arrays import Adjustments
from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.couplings import CoupledSampler
from jaxspark.decoding.round import adjuster_for, lagged_forecast, schedule_round
from jaxspark.decoding.sampling import Sampling, warp
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.state import DecodeState
from jaxspark.decoding.verdicts import acceptance_probability, correction_weights
from jaxspark.drafters import DraftContext, DraftDistribution, Drawn, Proposal
from jaxspark.exactness.by_definition import (
    adjusted_by_definition,
    masked_by_definition,
)
from jaxspark.models import FlatTokens
from jaxspark.settings import standard_settings

LogProbs = dict[tuple[int, ...], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What enumerated requests do to their logits; by default nothing.

    Attributes:
      adjustment: of all slots.
      output: committed tokens that are output, the newest; the prompt is before them.
      stop_ids: of the requests, for least lengths; nothing ends there.
      limits: what is compiled; one value for many lets them share programs.
      grammar: tells which tokens may come behind an output; None masks nothing.
    """

    adjustment: Adjustment = Adjustment()
    output: int = 0
    stop_ids: tuple[int, ...] = ()
    limits: AdjustmentLimits = AdjustmentLimits()
    grammar: Callable[[Sequence[int]], Collection[int]] | None = None

    def adjusted(self, logits_V: np.ndarray, tokens: Sequence[int], prompt: int):
        """Logits after `tokens`, the first `prompt` of which are no output."""
        output = tokens[prompt:]
        z_V = adjusted_by_definition(
            logits_V, tokens[:prompt], output, self.adjustment, self.stop_ids
        )
        if self.grammar is None:
            return z_V
        return masked_by_definition(z_V, logits_V, self.grammar(output))

    def masks_along(
        self, tokens: Sequence[int], drafts: Sequence[int]
    ) -> UInt[np.ndarray, "1 Q U"]:
        """Bits of the tokens that may come behind `tokens` and each of the drafts."""
        assert self.grammar is not None
        text = [*tokens[len(tokens) - self.output :], *drafts]
        ends = range(len(text) - len(drafts), len(text) + 1)
        rows = [sum(1 << each for each in self.grammar(text[:end])) for end in ends]
        return np.array(rows, np.uint32)[None, :, None]

    def of(self, tokens: Sequence[int], vocab: int) -> Adjustments | None:
        """For one slot with these committed tokens."""
        if not self.limits.anything:
            return None
        return Adjustments.of(
            [self.adjustment],
            self.limits,
            vocab=vocab,
            prompt_lengths=[len(tokens) - self.output],
        )


@standard_settings()
def sequence_log_probs(
    target,
    prompt: Sequence[int],
    length: int,
    sampling: Sampling,
    wanted: Wanted = Wanted(),
) -> LogProbs:
    """Adjusted and warped log p of the next token after every continuation, plainly.

    Returns a table {continuation of `prompt`, shorter than `length`: log p [V]}.
    """
    vocab = target.config.vocab_size
    table: LogProbs = {}
    for n in range(length):
        prefixes = list(itertools.product(range(vocab), repeat=n))
        rows = jnp.array([[*prompt, *prefix] for prefix in prefixes], jnp.int32)
        logits_BV = np.asarray(_next_logits(target, rows))
        adjusted_BV = [
            wanted.adjusted(logits_V, row, len(prompt) - wanted.output)
            for logits_V, row in zip(logits_BV, rows.tolist())
        ]
        own = sampling.at(jnp.zeros((len(rows),), jnp.int32))
        log_p_BV = warp(jnp.array(adjusted_BV, jnp.float32), own)
        table |= dict(zip(prefixes, np.asarray(log_p_BV, np.float64)))
    return table


@jax.jit
def _next_logits(target, rows_BQ) -> Float[Array, "B V"]:
    slots, width = rows_BQ.shape
    begin_B = jnp.zeros((slots,), jnp.int32)
    tokens = FlatTokens.from_rows(rows_BQ, begin_B, jnp.full_like(begin_B, width))
    x_TD, _, _ = target(tokens, target.init_cache(slots, width))
    return target.logits(x_TD).reshape(slots, width, -1)[:, -1]


def target_distribution(table: LogProbs) -> np.ndarray:
    """The target's own distribution of the next tokens, [V, ..., V]."""
    length = 1 + max(map(len, table))
    joint = np.zeros((len(table[()]),) * length)
    for tokens in np.ndindex(joint.shape):
        joint[tokens] = np.exp(sum(table[tokens[:n]][tokens[n]] for n in range(length)))
    return joint


class EnumeratedRound:
    """One speculative round of a request, with all that may be drafted in it.

    Schedules choose how many of the drafts are verified, so what may come of every
    number is worked out once for all of them.

    Attributes:
      block_length: G, drafts proposed for every slot.
      state: what schedules see of the round's beginning; without caches, so that one
        program serves all drafters.
      proposals: all combinations N of the slots' draft blocks, [N, B, ...].
      chance_N: how likely each is.
      outcomes_NK: distribution of the first slot's next G+1 tokens if K = 0..G of its
        drafts are verified, [N, G+1, V, ..., V].
    """

    @standard_settings()
    def __init__(
        self,
        target,
        drafter,
        prompts: Sequence[Sequence[int]],
        table: LogProbs,
        sampling: Sampling,
        *,
        accept: Callable = acceptance_probability,
        wanted: Wanted = Wanted(),
    ):
        """Enumerates the drafts of every slot and what may come of the first's.

        Args:
          target: a model with a vocabulary of a few tokens.
          drafter: any drafter for it.
          prompts: committed tokens of every slot, the last is the anchor. The first
            slot's distribution is asked for; the others compete for what is verified.
          table: `sequence_log_probs` of G+1 tokens after the first prompt.
          sampling: parameters of one slot, for all.
          accept: the acceptance rule; another one than the decoder's shows that the
            comparison can fail.
          wanted: what all slots do to their logits.
        """
        self.block_length = max(map(len, table))
        state = init_state(
            target,
            drafter,
            prompts,
            [len(each) + self.block_length + 1 for each in prompts],
            jax.tree.map(lambda x: jnp.repeat(x, len(prompts)), sampling),
            block_length=self.block_length,
        )
        state = state.rewind(state.lengths_B)
        self.state = replace(state, target_cache=(), draft_cache=())
        slots = [
            list(
                draft_blocks(target, drafter, each, self.block_length, sampling, wanted)
            )
            for each in prompts
        ]
        chosen_BN = np.array(list(np.ndindex(*map(len, slots)))).T
        self.chance_N = np.ones(chosen_BN.shape[1])
        picked = []
        for blocks, chosen_N in zip(slots, chosen_BN):
            proposals = [seen_by_schedules(block.proposal) for block in blocks]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *proposals)
            picked.append(jax.tree.map(itemgetter(chosen_N), stacked))
            self.chance_N *= np.array([block.chance for block in blocks])[chosen_N]
        self.proposals = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *picked)
        own = np.stack([outcomes(table, each, accept) for each in slots[0]])
        self.outcomes_NK = own[chosen_BN[0]]

    @standard_settings()
    def distribution(
        self,
        schedule: Scheduler = Fixed(),
        *,
        calibration: Calibration | None = None,
        earlier_G: Float[Array, " G"] | None = None,
        altered: Callable[[DecodeState], DecodeState] = lambda state: state,
    ) -> np.ndarray:
        """Of the first slot's next G+1 tokens under a schedule, [V, ..., V].

        Args:
          schedule: chooses the verification length.
          calibration: of the drafter's confidences.
          earlier_G: survival in earlier rounds of all slots; None if there were none.
          altered: what else is different for the schedule.
        """
        state = self.state
        if earlier_G is not None:
            remembered = replace(
                state.schedule,
                history_BnG=jnp.broadcast_to(
                    earlier_G, state.schedule.history_BnG.shape
                ),
                has_history_B=jnp.ones_like(state.schedule.has_history_B),
            )
            state = replace(state, schedule=remembered)
        options = DecodeOptions(
            block_length=self.block_length, schedule=schedule, calibration=calibration
        )
        state = altered(state)
        verified_N = np.asarray(_verified_of_first(state, self.proposals, options))
        outcomes_N = self.outcomes_NK[np.arange(len(verified_N)), verified_N]
        return np.tensordot(self.chance_N, outcomes_N, axes=1)


@dataclass(frozen=True)
class ForcedSampler:
    """Draws the tokens it is told to; what it says of them is the decoder's."""

    decoder: CoupledSampler
    forced_G: Int[Array, " G"]
    streams: bool = False

    def __call__(self, logits_BW, j, ids_W) -> Drawn:
        """The j-th of them."""
        return Drawn(
            tokens_B=self.forced_G[j][None],
            log_q_BW=warp(
                self.decoder.adjusted(logits_BW, j, ids_W), self.decoder.sampling
            ),
            certainty_B=self.decoder(logits_BW, j, ids_W).certainty_B,
        )

    def stream(self, logits, j, latent_BR, ids_W):
        """It does not."""
        raise NotImplementedError

    def suggested(self, certainty_BG):
        """What the decoder's suggests."""
        return self.decoder.suggested(certainty_BG)


@dataclass(frozen=True)
class Block:
    """A draft block that can be drawn.

    Attributes:
      drafts: its tokens.
      proposal: the drafts with what they were drawn from.
      log_p_QV: the decoder's log p behind the anchor and each draft.
    """

    drafts: tuple[int, ...]
    proposal: Proposal
    log_p_QV: np.ndarray

    @property
    def chance(self) -> float:
        """How likely these drafts are."""
        return _draft_probability(self.proposal)


def draft_blocks(
    target,
    drafter,
    prompt: Sequence[int],
    block_length: int,
    sampling: Sampling,
    wanted: Wanted = Wanted(),
) -> Iterator[Block]:
    """Each draft block that can be drawn after a prompt."""
    vocab = target.config.vocab_size
    state = init_state(
        target,
        drafter,
        [prompt],
        [len(prompt) + block_length + 1],
        sampling,
        block_length=block_length,
        stop_ids=[wanted.stop_ids],
    )
    state = replace(state.rewind(state.lengths_B), adjustments=wanted.of(prompt, vocab))
    if len(prompt) > 1:
        tokens = FlatTokens.from_rows(
            jnp.array([prompt[:-1]], jnp.int32),
            jnp.zeros((1,), jnp.int32),
            jnp.array([len(prompt) - 1]),
        )
        state = _observed(target, drafter, tokens, state)
    seen, masked = set(), wanted.grammar is not None
    masks_1QU = wanted.masks_along(prompt, ()) if masked else None
    for drafts in itertools.product(range(vocab), repeat=block_length):
        forced_G = jnp.array(drafts, jnp.int32)
        proposal = _proposed(target, drafter, state, forced_G, masks_1QU)
        drafts = tuple(np.asarray(proposal.tokens_BG)[0].tolist())
        # A drafter that does not sample proposes the same block whatever is forced.
        if drafts not in seen and _draft_probability(proposal) > 0:
            seen.add(drafts)
            log_p_QV = _verified_rows(
                target,
                replace(state, draft_cache=()),
                proposal.tokens_BG,
                wanted.masks_along(prompt, drafts) if masked else None,
            )
            yield Block(drafts, proposal, np.asarray(log_p_QV, np.float64))


@jax.jit
def _observed(target, drafter, tokens: FlatTokens, state: DecodeState) -> DecodeState:
    """The state with the caches of tokens of a prompt."""
    _, taps_TmD, target_cache = target(tokens, state.target_cache, taps=drafter.taps)
    draft_cache = drafter.observe(state.draft_cache, taps_TmD, tokens)
    return replace(state, target_cache=target_cache, draft_cache=draft_cache)


@jax.jit
def _proposed(
    target, drafter, state: DecodeState, forced_G, masks_BQU=None
) -> Proposal:
    """The proposal if these drafts are drawn."""
    context = DraftContext.of(state.tokens_BS, state.lengths_B)
    decoder = CoupledSampler(
        "rejection",
        state.sampling,
        context.positions_B,
        target.config.vocab_size,
        adjuster_for(state, masks_BQU),
    )
    sampler = ForcedSampler(decoder, forced_G)
    return drafter.propose(target, state.draft_cache, context, sampler, len(forced_G))[
        0
    ]


@jax.jit
def _verified_rows(
    target, state: DecodeState, drafts_BG, masks_BQU=None
) -> Float[Array, "Q V"]:
    """log p behind the anchor and each draft, as a round verifies them."""
    anchors_B = state.processed_B
    anchor_B1 = jnp.take_along_axis(state.tokens_BS, anchors_B[:, None], axis=1)
    rows_BQ = jnp.concatenate([anchor_B1, drafts_BG], axis=1)
    counts_B = jnp.full_like(anchors_B, rows_BQ.shape[1])
    tokens = FlatTokens.from_rows(rows_BQ, anchors_B, counts_B)
    x_TD, _, _ = target(tokens, state.target_cache)
    logits_TV, adjuster = target.logits(x_TD), adjuster_for(state, masks_BQU)
    if adjuster is not None:
        logits_TV = adjuster.rows(logits_TV, tokens, drafts_BG)
    return warp(logits_TV, state.sampling.at(tokens.slots_T))


def seen_by_schedules(proposal: Proposal) -> Proposal:
    """What schedules look at."""
    return replace(proposal, q=DraftDistribution())


@partial(jax.jit, static_argnames=("options",))
def _verified_of_first(state: DecodeState, proposals: Proposal, options: DecodeOptions):
    """How many drafts of the first slot are verified: the round's own decision, [N]."""
    lagged = lagged_forecast(state, options)

    def verified(proposal):
        verification, _ = schedule_round(state, proposal, lagged, options)
        return verification.lengths_B[0]

    return jax.vmap(verified)(proposals)


def _draft_probability(proposal) -> float:
    return float(np.exp(np.sum(_log_q(proposal))))


def _log_q(proposal) -> np.ndarray:
    return np.asarray(proposal.q.log_prob(proposal.tokens_BG), np.float64)


def outcomes(table, block: Block, accept) -> np.ndarray:
    """Next tokens if the first 0..G of these drafts are verified, [G+1, V, ..., V]."""
    drafts, proposal = block.drafts, block.proposal
    log_p_1G = jnp.array([[block.log_p_QV[j, x] for j, x in enumerate(drafts)]])
    accept_1G = np.asarray(
        accept(log_p_1G, proposal.q.log_prob(proposal.tokens_BG)), np.float64
    )
    length, vocab = len(drafts), len(table[()])
    made = np.zeros((length + 1, *(vocab,) * (length + 1)))

    def add(joint, prefix, chance, rejected):
        if chance:
            next_V = correction(block, len(prefix), rejected, vocab)
            _complete(joint, table, prefix, chance * next_V)

    reached = 1.0
    for n, accepted in enumerate(accept_1G[0]):
        # All of n verified drafts are accepted; or of more, the first n.
        add(made[n], drafts[:n], reached, rejected=False)
        add(made[n + 1 :], drafts[:n], reached * (1 - accepted), rejected=True)
        reached *= accepted
    add(made[length], drafts, reached, rejected=False)
    return made


def correction(block: Block, accepted: int, rejected: bool, vocab: int):
    """Distribution of the token after the accepted drafts."""
    p_1V = jnp.exp(jnp.asarray(block.log_p_QV[accepted], jnp.float32)[None])
    proposal, row_1 = block.proposal, jnp.array([accepted])
    assert isinstance(proposal.q, DraftDistribution)  # of forced drafts
    q_1V = proposal.q.row(proposal.tokens_BG, row_1, vocab)
    weights_1V = correction_weights(p_1V, q_1V, jnp.array([rejected]))
    weights_V = np.asarray(weights_1V[0], np.float64)
    return weights_V / weights_V.sum()


def _complete(joint, table, prefix, weight_V):
    """Adds the emitted prefix and next token, later positions sampled plainly.

    To one distribution or, where they stand along a leading axis, to all.
    """
    n, length = len(prefix), 1 + max(map(len, table))
    for tokens in np.ndindex((len(weight_V),) * length):
        if tokens[:n] == prefix:
            rest = sum(table[tokens[:i]][tokens[i]] for i in range(n + 1, length))
            joint[..., *tokens] += weight_V[tokens[n]] * np.exp(rest)
