"""Statistical tests of sampling with the decoder itself, random numbers included.

Enumeration (`enumeration`) proves the arithmetic of a round; these tests sample many
rounds and compare frequencies with the exact distribution, and the share of accepted
drafts with the coupling's formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import chdtrc

from jaxspark.decoding import DecodeOptions, init_state, prefill
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.loop import decode, draft, verify
from jaxspark.decoding.sampling import Sampling
from jaxspark.drafters import DraftDistribution
from jaxspark.exactness.draft_blocks import draft_blocks
from jaxspark.exactness.wanted import Wanted
from jaxspark.settings import standard_settings


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """Two output tokens of many independent requests of one prompt.

    Attributes:
      counts: how often each pair was emitted, [V, V].
      acceptance: share of requests whose first draft was accepted.
      samples: number of requests.
    """

    counts: np.ndarray
    acceptance: float
    samples: int


@standard_settings()
def sample_first_tokens(
    target,
    drafter,
    prompt: Sequence[int],
    *,
    coupling: Coupling,
    samples: int,
    temperature: float = 1.0,
    block_length: int = 2,
    slots: int = 500,
    seed: int = 0,
    wanted: Wanted = Wanted(),
) -> FirstTokens:
    """Decodes two tokens of `samples` requests with seeds of their own."""
    vocab = target.config.vocab_size
    options = DecodeOptions(block_length=block_length, coupling=coupling)
    counts = np.zeros((vocab, vocab), np.int64)
    accepted = 0
    limit = len(prompt) + 2
    for batch in range(samples // slots):
        seeds = (seed + batch * slots + np.arange(slots)) % 2**32
        state = init_state(
            target,
            drafter,
            [prompt] * slots,
            [limit] * slots,
            Sampling.of(slots, temperature=temperature, seed=seeds),
            block_length=block_length,
            adjustments=[wanted.adjustment] * slots,
            prompt_lengths=[len(prompt) - wanted.output] * slots,
        )
        state = prefill(target, drafter, state, chunk=16)
        if wanted.grammar is None:
            state = decode(target, drafter, state, jnp.int32(2), options=options)
        else:
            for _ in range(2):
                state = _masked_round(target, drafter, state, wanted, options)
        tokens_BS, counters = jax.device_get((state.tokens_BS, state.counters))
        first_B, second_B = tokens_BS[:, len(prompt) : limit].T
        np.add.at(counts, (first_B, second_B), 1)
        # Two tokens leave room for one draft in the first round, none in the second.
        accepted += int(counters.accepted_BG[:, 0].sum())
    total = samples // slots * slots
    return FirstTokens(counts=counts, acceptance=accepted / total, samples=total)


def _masked_round(target, drafter, state, wanted: Wanted, options):
    """A round in halves, all slots under the grammar."""
    tokens_BS, lengths_B = jax.device_get((state.tokens_BS, state.lengths_B))
    texts = [row[:end].tolist() for row, end in zip(tokens_BS, lengths_B)]
    first_BQU = np.concatenate([wanted.masks_along(each, ()) for each in texts])
    state, drafted = draft(
        target, drafter, state, jnp.asarray(first_BQU[:, 0]), options=options
    )
    drafts_BG = np.asarray(drafted.proposal.tokens_BG).tolist()
    masks_BQU = np.concatenate(
        [wanted.masks_along(*each) for each in zip(texts, drafts_BG)]
    )
    return verify(
        target, drafter, state, drafted, jnp.asarray(masks_BQU), options=options
    )


@standard_settings()
def first_draft_distribution(
    target, drafter, prompt: Sequence[int], block_length: int, sampling: Sampling
) -> np.ndarray:
    """q of a block's first draft after a prompt, over the target's vocabulary, [V]."""
    blocks = draft_blocks(target, drafter, prompt, block_length, sampling)
    proposal = next(blocks).proposal
    row_1, vocab = jnp.array([0]), target.config.vocab_size
    assert isinstance(proposal.q, DraftDistribution)  # of forced drafts
    q_1V = proposal.q.row(proposal.tokens_BG, row_1, vocab)
    return np.asarray(q_1V[0], np.float64)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of Pearson's test; categories expected less than 5 times are pooled."""
    counts, expected = counts.ravel(), probabilities.ravel() * counts.sum()
    if counts[expected == 0].sum():
        return 0.0  # something impossible happened
    rare = expected < 5
    if expected[rare].sum():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        counts, expected = counts[~rare], expected[~rare]
    statistic = np.sum((counts - expected) ** 2 / expected)
    freedom = max(len(counts) - 1, 1)
    return float(chdtrc(freedom, statistic))


def rejection_acceptance(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """P(accept) = sum_v min(p_v, q_v) = 1 - TV(p, q) (Leviathan et al. 2023)."""
    return float(np.minimum(p_V, q_V).sum())


def gumbel_acceptance(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """P(both pick the same) = sum_v 1 / sum_u max(p_u/p_v, q_u/q_v) (Daliri et al.)."""
    both = (p_V > 0) & (q_V > 0)
    return float(
        sum(
            1 / np.maximum(p_V / p_V[v], q_V / q_V[v]).sum()
            for v in np.flatnonzero(both)
        )
    )
