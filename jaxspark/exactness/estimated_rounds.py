"""Guarantee 2 while acceptance is learned: two rounds, enumerated one after the other.

What a first round shows of acceptance decides how a second one is cut. Here every
course of a first round of two requests is followed: both draft blocks, every number of
drafts accepted, every next token. After each the estimator learns as the decoder's
does, to the full, and the second round is enumerated with what it has learned. The law
of the first request's tokens must be the target's, whatever the first round was
(conditionally), and over both (jointly).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import DecodeOptions, Estimator, Sampling, Scheduler, init_state
from jaxspark.decoding.acceptance import observe
from jaxspark.decoding.logistic import Prior
from jaxspark.decoding.round import lagged_forecast, schedule_round
from jaxspark.decoding.state import DecodeState
from jaxspark.decoding.verdicts import acceptance_probability
from jaxspark.drafters import Proposal
from jaxspark.exactness.draft_blocks import Block, draft_blocks
from jaxspark.exactness.enumeration import correction, outcomes, seen_by_schedules
from jaxspark.exactness.plain_law import sequence_log_probs, target_distribution
from jaxspark.exactness.rejection import Check
from jaxspark.exactness.tiny_models import BLOCK_LENGTH, Family, tiny_models
from jaxspark.settings import standard_settings

# Learns from every round, and believes what it sees.
CREDULOUS = Estimator(
    every=1,
    blocks=1,
    prior=Prior(
        mean=(1.0, 0.0, 0.0), precision=(0.05, 0.05, 0.05), place_precision=0.05
    ),
)
# Of one length, so that both are compiled for at once.
PROMPTS = ((0, 1, 1, 0, 1, 1, 0, 1), (1, 1, 0, 1, 0, 0, 1, 0))
VOCAB = 2

# Without a head and with one, whose drafts depend on those before them.
DRAFTERS: dict[Family, tuple[str, ...]] = {
    "dense": ("eagle3", "dspark-gated"),
    "deepseek_v4": ("mtp", "deepseek_v4_dspark"),
}

Altered = Callable[[Block], Block]


@dataclass(frozen=True)
class Course:
    """What may become of a slot in a round.

    Attributes:
      accepted: drafts accepted.
      emitted: those and the next token.
      chance: of it.
    """

    accepted: int
    emitted: tuple[int, ...]
    chance: float


@dataclass(frozen=True)
class TwoRounds:
    """What came of an enumeration.

    Attributes:
      conditional_error: largest difference from the target's law of the tokens after
        the first round, whatever that was.
      joint_error: likewise of the first tokens, over both rounds.
      moved: share of second proposals that are verified at another length than they
        would be had nothing been learned; with 0 nothing is shown.
    """

    conditional_error: float
    joint_error: float
    moved: float


class EnumeratedRounds:
    """Two rounds of two requests; what does not depend on schedules is kept.

    Attributes:
      target: a model with a vocabulary of `VOCAB` tokens.
      drafter: any drafter for it.
      sampling: parameters of one slot, for both.
      altered: what is different about blocks; something that may not be shows that the
        comparison can fail.
    """

    def __init__(
        self,
        target,
        drafter,
        sampling: Sampling,
        altered: Altered = lambda block: block,
    ):
        self.target, self.drafter = target, drafter
        self.sampling, self.altered = sampling, altered
        # By what was put out in the first round.
        self.blocks = cache(self._blocks)
        self.pairs = cache(self._pairs)
        self.law = cache(self._law)
        self.courses = cache(self._courses)

    @standard_settings()
    def under(
        self, schedule: Scheduler, *, estimator: Estimator = CREDULOUS
    ) -> TwoRounds:
        """Both rounds under a schedule.

        Args:
          schedule: chooses the verification lengths.
          estimator: learns from the first round.
        """
        options = DecodeOptions(
            block_length=BLOCK_LENGTH, schedule=schedule, estimator=estimator
        )
        state = self._start(estimator)
        first, chance_N = self.pairs((), ())
        verified_NB, schedules = _scheduled(state, first, options)
        others = len(self.blocks(1, ()))
        histories = [
            (n, a, b, chance_N[n] * a.chance * b.chance)
            for n, (own, other) in enumerate(np.asarray(verified_NB).tolist())
            for a in self.courses(0, n // others, own)
            for b in self.courses(1, n % others, other)
        ]
        learned = _learned(
            state,
            schedules,
            first,
            verified_NB,
            jnp.array([n for n, *_ in histories]),
            jnp.array([[a.accepted, b.accepted] for _, a, b, _ in histories]),
            options,
        )
        seconds = [self.pairs(a.emitted, b.emitted) for _, a, b, _ in histories]
        proposals = jax.tree.map(lambda *x: np.stack(x), *(each for each, _ in seconds))
        verified_HN = np.asarray(_scheduled_after(learned, proposals, options))
        unlearned = _unlearned(state, learned, len(histories))
        otherwise_HN = np.asarray(_scheduled_after(unlearned, proposals, options))

        length = BLOCK_LENGTH + 2
        joint, conditional_error = np.zeros((VOCAB,) * length), 0.0
        for (_, a, b, chance), (_, chance_N), verified_N in zip(
            histories, seconds, verified_HN
        ):
            expected, outcomes_MK = self.law(a.emitted)
            own_N = np.arange(len(chance_N)) // len(self.blocks(1, b.emitted))
            seen = np.tensordot(chance_N, outcomes_MK[own_N, verified_N], axes=1)
            conditional_error = max(conditional_error, np.abs(seen - expected).max())
            rest = length - len(a.emitted)
            joint[a.emitted] += chance * seen.sum(axis=tuple(range(rest, seen.ndim)))
        table = sequence_log_probs(self.target, PROMPTS[0], length, self.sampling)
        return TwoRounds(
            conditional_error=float(conditional_error),
            joint_error=float(np.abs(joint - target_distribution(table)).max()),
            moved=float(np.mean(verified_HN != otherwise_HN)),
        )

    def _blocks(self, slot: int, emitted: tuple[int, ...]) -> list[Block]:
        """All that a slot may draft after that."""
        prompt = (*PROMPTS[slot], *emitted)
        drawn = draft_blocks(
            self.target, self.drafter, prompt, BLOCK_LENGTH, self.sampling
        )
        return [self.altered(block) for block in drawn]

    def _pairs(self, *emitted: tuple[int, ...]) -> tuple[Proposal, np.ndarray]:
        """All pairs of blocks [N, B, ...], and how likely each is."""
        pairs = list(itertools.product(*map(self.blocks, (0, 1), emitted)))
        proposals = [
            [jax.device_get(seen_by_schedules(block.proposal)) for block in pair]
            for pair in pairs
        ]
        both = [jax.tree.map(lambda *x: np.concatenate(x), *each) for each in proposals]
        chances = [a.chance * b.chance for a, b in pairs]
        return jax.tree.map(lambda *x: np.stack(x), *both), np.array(chances)

    def _law(self, emitted: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The target's own law after that, and that of each block and length."""
        prompt = (*PROMPTS[0], *emitted)
        table = sequence_log_probs(self.target, prompt, BLOCK_LENGTH + 1, self.sampling)
        each = [
            outcomes(table, block, acceptance_probability)
            for block in self.blocks(0, emitted)
        ]
        return target_distribution(table), np.stack(each)

    def _courses(self, slot: int, index: int, verified: int) -> list[Course]:
        """All that may become of a first block of which so many are verified."""
        return list(courses(self.blocks(slot, ())[index], verified))

    def _start(self, estimator: Estimator) -> DecodeState:
        """What schedules and estimators see, without caches."""
        state = init_state(
            self.target,
            self.drafter,
            PROMPTS,
            [len(each) + 4 * BLOCK_LENGTH for each in PROMPTS],
            jax.tree.map(lambda x: jnp.repeat(x, len(PROMPTS)), self.sampling),
            block_length=BLOCK_LENGTH,
            estimator=estimator,
        )
        state = state.rewind(state.lengths_B)
        return replace(state, target_cache=(), draft_cache=())


@standard_settings()
def enumeration_checks(
    drafter: str, schedules: Mapping[str, Scheduler], family: Family = "dense"
) -> list[Check]:
    """Both rounds' laws to 1e-6 under each schedule; and that learning mattered."""
    target, made = tiny_models(family, VOCAB, drafters=[drafter])
    rounds = EnumeratedRounds(target, made[drafter], Sampling.of(1, temperature=0.8))
    checks, moved = [], 0.0
    for name, schedule in schedules.items():
        seen = rounds.under(schedule)
        label = f"two rounds with an estimator, {drafter}, {name}"
        error = max(seen.conditional_error, seen.joint_error)
        checks.append(Check.distance(label, error))
        moved = max(moved, seen.moved)
    return [
        *checks,
        Check(
            name=f"blocks cut otherwise by what was learned, {drafter}",
            figure=moved,
            bound="> 0.1",
            holds=moved > 0.1,
        ),
    ]


def courses(block: Block, verified: int) -> Iterator[Course]:
    """All that may become of a block of which so many drafts are verified."""
    log_p_1G = jnp.array([[block.log_p_QV[j, x] for j, x in enumerate(block.drafts)]])
    log_q_1G = block.proposal.q.log_prob(block.proposal.tokens_BG)
    accept_G = np.asarray(acceptance_probability(log_p_1G, log_q_1G), np.float64)[0]
    reached = 1.0
    for n in range(verified + 1):
        rejected = n < verified
        chance = reached * (1 - accept_G[n]) if rejected else reached
        if chance > 0:
            next_V = correction(block, n, rejected, VOCAB)
            for token in np.flatnonzero(next_V).tolist():
                emitted = (*block.drafts[:n], token)
                yield Course(n, emitted, float(chance * next_V[token]))
        if rejected:
            reached *= accept_G[n]


@partial(jax.jit, static_argnames=("options",))
def _scheduled(state: DecodeState, proposals: Proposal, options: DecodeOptions):
    """Verification lengths of each proposal [N, B], and what scheduling remembers."""
    lagged = lagged_forecast(state, options)

    def scheduled(proposal):
        verification, schedule = schedule_round(state, proposal, lagged, options)
        return verification.lengths_B, schedule

    return jax.vmap(scheduled)(proposals)


@partial(jax.jit, static_argnames=("options",))
def _learned(
    state, schedules, proposals, verified_NB, at_H, accepted_HB, options
) -> DecodeState:
    """The state after each history, [H, ...]."""

    def after(n, accepted_B):
        schedule, proposal = jax.tree.map(lambda x: x[n], (schedules, proposals))
        ended = replace(state, schedule=schedule)
        return observe(ended, proposal, verified_NB[n], accepted_B, options)

    return jax.vmap(after)(at_H, accepted_HB)


def _unlearned(state: DecodeState, learned: DecodeState, count: int) -> DecodeState:
    """The states after each history, with the estimator as it was."""
    estimator = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (count, *x.shape)), state.estimator
    )
    return replace(learned, estimator=estimator)


@partial(jax.jit, static_argnames=("options",))
def _scheduled_after(states: DecodeState, proposals: Proposal, options: DecodeOptions):
    """Verification lengths of the first slot's drafts, [H, N]."""

    def after(state, own):
        return _scheduled(state, own, options)[0][:, 0]

    return jax.vmap(after)(states, proposals)
