"""Guarantee 2 in one call: sampling with speculation is distributed as without.

Tiny random targets whose whole distribution is known: vocabulary 3 for enumeration,
vocabulary 8 for frequencies over many seeds. Every head, block length 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flax import nnx

from jaxspark.decoding.couplings import Coupling, acceptance_probability
from jaxspark.decoding.sampling import Sampling
from jaxspark.drafters import (
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    Eagle3Config,
    Eagle3Drafter,
    NgramDrafter,
    hybrid,
)
from jaxspark.drafters.heads import HEAD_TYPES
from jaxspark.evaluation.enumeration import (
    round_distribution,
    sequence_log_probs,
    target_distribution,
)
from jaxspark.evaluation.statistics import (
    chi_square,
    first_draft_distribution,
    gumbel_acceptance,
    rejection_acceptance,
    sample_first_tokens,
)
from jaxspark.models import DenseConfig, DenseDecoder

BLOCK_LENGTH = 2
# Repeats itself, so that lookup finds a long match.
PROMPT = (0, 2, 1, 0, 2, 1, 0, 2)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure and the bound it must keep."""

    name: str
    figure: float
    bound: str
    holds: bool


def tiny_target(vocab_size: int, seed: int = 0, layers: int = 2) -> DenseDecoder:
    """A random decoder whose distributions are far from uniform."""
    config = DenseConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return DenseDecoder(config, rngs=nnx.Rngs(seed))


def tiny_drafters(
    target: DenseDecoder, seed: int = 1, block_length: int = BLOCK_LENGTH
) -> dict[str, Drafter]:
    """One drafter of every kind for a tiny target, random weights."""
    vocab, layers = target.config.vocab_size, target.config.num_hidden_layers

    def dspark(head: str | None, draft_vocab_size: int | None = None):
        config = DSparkConfig(
            backbone=target.config,
            block_size=block_length,
            target_layer_ids=(-1, 0),
            mask_token_id=vocab - 1,
            num_target_layers=layers,
            markov_rank=4 if head else 0,
            markov_head_type=head or "vanilla",
            enable_confidence_head=head is not None,
            confidence_head_with_markov=head is not None,
            draft_vocab_size=draft_vocab_size,
        )
        return DSparkDrafter(config, rngs=nnx.Rngs(seed))

    def lookup(longest: int) -> NgramDrafter:
        return NgramDrafter(block_length=block_length, shortest=1, longest=longest)

    return {
        "ngram": lookup(4),
        "dflash": dspark(None),
        **{f"dspark-{head}": dspark(head) for head in HEAD_TYPES},
        "dspark-pruned": dspark("vanilla", vocab - 1),
        "eagle3": Eagle3Drafter(
            Eagle3Config(
                backbone=replace(target.config, num_hidden_layers=1, qk_norm=True),
                ttt_length=block_length,
                target_layer_ids=tuple(range(layers)),
                num_target_layers=layers,
            ),
            rngs=nnx.Rngs(seed),
        ),
        # A match of the prompt's length is followed, one of a single token is not.
        "hybrid-copies": hybrid(lookup(4), dspark("gated", vocab - 1)),
        "hybrid-asks": hybrid(lookup(1), dspark("gated", vocab - 1)),
    }


def enumeration_checks(
    drafters: Sequence[str] | None = None, accept: Callable = acceptance_probability
) -> list[Check]:
    """The whole randomness of a round, vocabulary 3: agreement to 1e-6."""
    target = tiny_target(3)
    sampling = Sampling.of(1, temperature=0.8)
    table = sequence_log_probs(target, PROMPT, BLOCK_LENGTH + 1, sampling)
    expected = target_distribution(table)
    checks = []
    for name, drafter in tiny_drafters(target).items():
        if drafters is not None and name not in drafters:
            continue
        seen = round_distribution(
            target, drafter, PROMPT, table, sampling, accept=accept
        )
        error = float(np.abs(seen - expected).max())
        checks.append(
            Check(
                name=f"enumeration, {name}",
                figure=error,
                bound="<= 1e-6",
                holds=error <= 1e-6,
            )
        )
    return checks


def frequency_checks(
    samples: int, drafters: Sequence[str] | None = None, seed: int = 0
) -> list[Check]:
    """First tokens over many seeds, vocabulary 8: chi-square and acceptance rates."""
    target = tiny_target(8)
    sampling = Sampling.of(1, temperature=1.0)
    expected = target_distribution(sequence_log_probs(target, PROMPT, 2, sampling))
    p_V = expected.sum(axis=1)
    checks = []
    for name, drafter in tiny_drafters(target).items():
        if drafters is not None and name not in drafters:
            continue
        q_V = first_draft_distribution(target, drafter, PROMPT, BLOCK_LENGTH, sampling)
        formulas: dict[Coupling, float] = {
            "rejection": rejection_acceptance(p_V, q_V),
            "gumbel": gumbel_acceptance(p_V, q_V),
        }
        for coupling, formula in formulas.items():
            drawn = sample_first_tokens(
                target, drafter, PROMPT, coupling=coupling, samples=samples, seed=seed
            )
            for label, counts, exact in (
                ("first token", drawn.counts.sum(axis=1), p_V),
                ("first two tokens", drawn.counts, expected),
            ):
                p_value = chi_square(counts, exact)
                checks.append(
                    Check(
                        name=f"{label}, {coupling}, {name}: p-value",
                        figure=p_value,
                        bound="> 1e-3",
                        holds=p_value > 1e-3,
                    )
                )
            # Point-mass drafts meet the noise of the target alone: same formulas.
            error = abs(drawn.acceptance - formula)
            bound = 4 * np.sqrt(formula * (1 - formula) / drawn.samples)
            checks.append(
                Check(
                    name=f"acceptance, {coupling}, {name}: "
                    f"{drawn.acceptance:.4f} against {formula:.4f}",
                    figure=error,
                    bound=f"<= {bound:.2g}",
                    holds=bool(error <= bound),
                )
            )
    return checks


def run(samples: int = 200_000) -> list[Check]:
    """All of them."""
    return enumeration_checks() + frequency_checks(samples)
