"""Exact enumeration of one speculative round on a tiny vocabulary.

Every random event of a round under `coupling="rejection"` is replaced by its
probabilities: each possible draft block, each acceptance pattern, each correction. The
same functions that decode real models supply them (`Drafter.propose`, `schedule_round`,
the target's forward pass, `acceptance_probability`, `correction_weights`), so what is
summed up is the decoder's own arithmetic. A round that emits fewer than G+1 tokens is
completed with plain sampling. The result must be the target's distribution of the next
G+1 tokens.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.couplings import (
    DraftSampler,
    acceptance_probability,
    correction_weights,
    log_q_of_drafts,
    q_at,
)
from jaxspark.decoding.round import DecodeOptions, schedule_round
from jaxspark.decoding.sampling import Sampling, warp
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.state import DecodeState, init_state
from jaxspark.drafters import Proposal
from jaxspark.models import FlatTokens

LogProbs = dict[tuple[int, ...], np.ndarray]


def sequence_log_probs(
    target, prompt: Sequence[int], length: int, sampling: Sampling
) -> LogProbs:
    """Warped log p of the next token after every continuation, plainly.

    Returns a table {continuation of `prompt`, shorter than `length`: log p [V]}.
    """
    vocab = target.config.vocab_size
    table: LogProbs = {}
    for n in range(length):
        prefixes = list(itertools.product(range(vocab), repeat=n))
        rows = jnp.array([[*prompt, *prefix] for prefix in prefixes], jnp.int32)
        slots, width = rows.shape
        tokens = FlatTokens.from_rows(
            rows, jnp.zeros((slots,), jnp.int32), jnp.full((slots,), width)
        )
        x_DT, _, _ = target(tokens, target.init_cache(slots, width))
        logits_BV = target.logits(x_DT).reshape(slots, width, -1)[:, -1]
        log_p_BV = warp(logits_BV, sampling.at(jnp.zeros((slots,), jnp.int32)))
        table |= dict(zip(prefixes, np.asarray(log_p_BV, np.float64)))
    return table


def target_distribution(table: LogProbs) -> np.ndarray:
    """The target's own distribution of the next tokens, [V, ..., V]."""
    length = 1 + max(map(len, table))
    joint = np.zeros((len(table[()]),) * length)
    for tokens in np.ndindex(joint.shape):
        joint[tokens] = np.exp(sum(table[tokens[:n]][tokens[n]] for n in range(length)))
    return joint


def round_distribution(
    target,
    drafter,
    prompt: Sequence[int],
    table: LogProbs,
    sampling: Sampling,
    *,
    schedule: Scheduler = Fixed(),
    calibration: Calibration | None = None,
    earlier_G: Float[Array, " G"] | None = None,
    beside: Sequence[int] | None = None,
    accept: Callable = acceptance_probability,
) -> np.ndarray:
    """Distribution of the next G+1 tokens when one round is speculative, [V, ..., V].

    Args:
      target: a model with a vocabulary of a few tokens.
      drafter: any drafter for it.
      prompt: committed tokens, the last is the anchor.
      table: `sequence_log_probs` of G+1 tokens after the prompt.
      sampling: parameters of one slot.
      schedule: chooses the verification length.
      calibration: of the drafter's confidences.
      earlier_G: survival in earlier rounds of all slots; None if there were none.
      beside: prompt of another request in the same round, whose drafts are enumerated
        too: it competes for what is verified.
      accept: the acceptance rule; another one than the decoder's shows that the
        comparison can fail.
    """
    block_length, vocab = max(map(len, table)), len(table[()])
    joint = np.zeros((vocab,) * (block_length + 1))
    prompts = [prompt] if beside is None else [prompt, beside]
    options = DecodeOptions(
        block_length=block_length, schedule=schedule, calibration=calibration
    )
    lengths = _Scheduled(target, drafter, prompts, sampling, options, earlier_G)
    mine, *others = (
        list(draft_blocks(target, drafter, each, block_length, sampling))
        for each in prompts
    )
    for (drafts, proposal), *rest in itertools.product(mine, *others):
        proposals = [proposal, *(other for _, other in rest)]
        chance = np.prod([_draft_probability(each) for each in proposals])
        verified = lengths(proposals)
        log_p_1G = jnp.array([[table[drafts[:j]][x] for j, x in enumerate(drafts)]])
        accept_1G = np.asarray(accept(log_p_1G, log_q_of_drafts(proposal)), np.float64)
        for accepted in range(verified + 1):
            rejected = accepted < verified
            weight = chance * np.prod(accept_1G[0, :accepted])
            weight *= 1 - accept_1G[0, accepted] if rejected else 1.0
            if weight:
                prefix = drafts[:accepted]
                next_V = _correction(table, proposal, prefix, rejected, vocab)
                _complete(joint, table, prefix, weight * next_V)
    return joint


def draft_blocks(
    target, drafter, prompt: Sequence[int], block_length: int, sampling: Sampling
) -> Iterator[tuple[tuple[int, ...], Proposal]]:
    """Each draft block that can be drawn, with the proposal that carries its q."""
    vocab = target.config.vocab_size
    limit = len(prompt) + block_length + 1
    state = init_state(
        target, drafter, [prompt], [limit], sampling, block_length=block_length
    )
    target_cache, draft_cache = state.target_cache, state.draft_cache
    if len(prompt) > 1:
        tokens = FlatTokens.from_rows(
            jnp.array([prompt[:-1]], jnp.int32),
            jnp.zeros((1,), jnp.int32),
            jnp.array([len(prompt) - 1]),
        )
        _, taps_mDT, target_cache = target(tokens, target_cache, taps=drafter.taps)
        draft_cache = drafter.observe(draft_cache, taps_mDT, tokens)

    @jax.jit
    def propose(forced_G):
        def draw(logits_BW, j, ids_W):
            sampler = DraftSampler("rejection", sampling, state.lengths_B - 1, vocab)
            *_, sharpness_B = sampler(logits_BW, j, ids_W)
            return forced_G[j][None], warp(logits_BW, sampling), sharpness_B

        return drafter.propose(
            target, draft_cache, state.tokens_BS, state.lengths_B, draw, block_length
        )[0]

    seen = set()
    for drafts in itertools.product(range(vocab), repeat=block_length):
        proposal = propose(jnp.array(drafts, jnp.int32))
        drafts = tuple(np.asarray(proposal.tokens_BG)[0].tolist())
        # A drafter that does not sample proposes the same block whatever is forced.
        if drafts not in seen and _draft_probability(proposal) > 0:
            seen.add(drafts)
            yield drafts, proposal


class _Scheduled:
    """How many drafts of the first slot a round verifies: the round's own decision."""

    def __init__(self, target, drafter, prompts, sampling, options, earlier_G):
        self.options = options
        slots, block_length = len(prompts), options.block_length
        state = init_state(
            target,
            drafter,
            prompts,
            [len(each) + block_length + 1 for each in prompts],
            jax.tree.map(lambda x: jnp.repeat(x, slots), sampling),
            block_length=block_length,
        )
        remembered = state.schedule
        if earlier_G is not None:
            remembered = replace(
                remembered,
                past_BnG=jnp.broadcast_to(earlier_G, remembered.past_BnG.shape),
                seen_B=jnp.ones((slots,), bool),
            )
        # Caches say nothing about it, and without them one program serves all drafters.
        self.state = replace(
            state, schedule=remembered, target_cache=(), draft_cache=()
        )

    def __call__(self, proposals: Sequence[Proposal]) -> int:
        together = Proposal(
            *(
                jnp.concatenate([getattr(each, name) for each in proposals])
                for name in ("tokens_BG", "lengths_B", "confidence_BG", "sharpness_BG")
            )
        )
        return int(_lengths(self.state, together, self.options)[0])


@partial(jax.jit, static_argnames=("options",))
def _lengths(state: DecodeState, proposal: Proposal, options: DecodeOptions):
    return schedule_round(state, proposal, options)[0]


def _draft_probability(proposal) -> float:
    return float(np.exp(np.sum(np.asarray(log_q_of_drafts(proposal), np.float64))))


def _correction(table, proposal, prefix, rejected, vocab):
    """Distribution of the token after the accepted prefix."""
    p_1V = jnp.exp(jnp.asarray(table[prefix])[None])
    q_1V = q_at(proposal, jnp.array([len(prefix)]), vocab)
    weights_V = correction_weights(p_1V, q_1V, jnp.array([rejected]))[0]
    weights_V = np.asarray(weights_V, np.float64)
    return weights_V / weights_V.sum()


def _complete(joint, table, prefix, weight_V):
    """Adds the emitted prefix and next token, later positions sampled plainly."""
    for tokens in np.ndindex(joint.shape):
        n = len(prefix)
        if tokens[:n] == prefix:
            rest = sum(table[tokens[:i]][tokens[i]] for i in range(n + 1, joint.ndim))
            joint[tokens] += weight_V[tokens[n]] * np.exp(rest)
