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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxspark.decoding import DecodeOptions, init_state
from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.round import lagged_forecast, schedule_round
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.state import DecodeState
from jaxspark.decoding.verdicts import acceptance_probability, correction_weights
from jaxspark.drafters import DraftDistribution, Proposal
from jaxspark.exactness.draft_blocks import Block, draft_blocks
from jaxspark.exactness.plain_law import LogProbs
from jaxspark.exactness.wanted import Wanted
from jaxspark.settings import standard_settings


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
            )
            state = replace(state, schedule=remembered)
        options = DecodeOptions(
            block_length=self.block_length, schedule=schedule, calibration=calibration
        )
        state = altered(state)
        verified_N = np.asarray(_verified_of_first(state, self.proposals, options))
        outcomes_N = self.outcomes_NK[np.arange(len(verified_N)), verified_N]
        return np.tensordot(self.chance_N, outcomes_N, axes=1)


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
