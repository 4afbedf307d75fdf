"""Guarantee 2 in one call: sampling with speculation is distributed as without.

Tiny random targets whose whole distribution is known: vocabulary 3 for enumeration,
vocabulary 8 for frequencies over many seeds. Every head, block length 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.verdicts import acceptance_probability
from jaxspark.exactness.enumeration import EnumeratedRound
from jaxspark.exactness.plain_law import sequence_log_probs, target_distribution
from jaxspark.exactness.statistics import (
    chi_square,
    first_draft_distribution,
    gumbel_acceptance,
    rejection_acceptance,
    sample_first_tokens,
)
from jaxspark.exactness.tiny_models import BLOCK_LENGTH, Family, tiny_models
from jaxspark.settings import standard_settings

# Repeats itself, so that lookup finds a long match.
PROMPT = (0, 2, 1, 0, 2, 1, 0, 2)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure and the bound it must keep."""

    name: str
    figure: float
    bound: str
    holds: bool

    @classmethod
    def distance(cls, name: str, figure: float) -> "Check":
        """How far an enumerated distribution is from the target's: next to nothing."""
        error = float(figure)
        return cls(name=name, figure=error, bound="<= 1e-6", holds=error <= 1e-6)

    @classmethod
    def p_value(cls, name: str, figure: float) -> "Check":
        """Whether frequencies may come from the target's distribution."""
        return cls(
            name=f"{name}: p-value", figure=figure, bound="> 1e-3", holds=figure > 1e-3
        )


@standard_settings()
def enumeration_checks(
    drafters: Sequence[str] | None = None,
    accept: Callable = acceptance_probability,
    family: Family = "dense",
) -> list[Check]:
    """The whole randomness of a round, vocabulary 3: agreement to 1e-6."""
    target, tried = tiny_models(family, 3, drafters=drafters)
    sampling = Sampling.of(1, temperature=0.8)
    table = sequence_log_probs(target, PROMPT, BLOCK_LENGTH + 1, sampling)
    expected = target_distribution(table)
    checks = []
    for name, drafter in tried.items():
        round_ = EnumeratedRound(
            target, drafter, [PROMPT], table, sampling, accept=accept
        )
        error = np.abs(round_.distribution() - expected).max()
        checks.append(Check.distance(f"enumeration, {name}", error))
    return checks


def frequency_checks(
    samples: int,
    drafters: Sequence[str] | None = None,
    seed: int = 0,
    family: Family = "dense",
) -> list[Check]:
    """First tokens over many seeds, vocabulary 8: chi-square and acceptance rates."""
    target, tried = tiny_models(family, 8, drafters=drafters)
    sampling = Sampling.of(1, temperature=1.0)
    expected = target_distribution(sequence_log_probs(target, PROMPT, 2, sampling))
    p_V = expected.sum(axis=1)
    checks = []
    for name, drafter in tried.items():
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
                checks.append(Check.p_value(f"{label}, {coupling}, {name}", p_value))
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


def run(
    samples: int = 200_000,
    drafters: Sequence[str] | None = None,
    family: Family = "dense",
) -> list[Check]:
    """All of them."""
    enumerated = enumeration_checks(drafters, family=family)
    return enumerated + frequency_checks(samples, drafters, family=family)
