"""The paper's appendix A: a schedule that looks at what it decides on changes outputs.

The target says (0.7, 0.3), the drafter (0.5, 0.5). The first draft is expected to hold
with 0.8; the second with 0.9 after token A, never after B. Steps per second are 1, 0.5
and 0.45 at one, two and three tokens. Whoever chooses the best number of tokens by
these confidences verifies both drafts if the first is A, and none if it is B: the
output becomes (0.85, 0.15).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import Causal, CostCurve, Costs, Free, Lagged, Sampling
from jaxspark.decoding.couplings import COUPLINGS
from jaxspark.drafters import DraftDistribution, Proposal
from jaxspark.drafters.base import WithoutContext
from jaxspark.exactness.enumeration import EnumeratedRound
from jaxspark.exactness.plain_law import target_distribution
from jaxspark.exactness.rejection import Check
from jaxspark.settings import standard_settings

A, B = 0, 1
EXAMPLE: Mapping = {
    "p": (0.7, 0.3),
    "q": (0.5, 0.5),
    "confidence": {(): 0.8, (A,): 0.9, (B,): 1e-9},
}
COSTS = Costs((CostCurve(2, (1, 2, 3), (1.0, 1 / 0.5, 1 / 0.45)),))
BIASED = (0.85, 0.15)


@dataclass(frozen=True, kw_only=True)
class LeakySchedule(Free):
    """Lets a draft decide whether it is verified itself, under any coupling."""

    couplings: ClassVar = COUPLINGS


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class ConstantTarget:
    """A target that always says p."""

    p: Sequence[float]
    max_rewind: ClassVar = None

    @property
    def config(self) -> SimpleNamespace:
        """Says how many tokens there are, and that hidden states hold nothing."""
        return SimpleNamespace(vocab_size=len(self.p), hidden_size=1)

    def init_cache(self, slots: int, length: int) -> tuple[()]:
        """It remembers nothing."""
        return ()

    def __call__(self, tokens, cache, *, taps=()):
        """Nothing to say of tokens but that they are there."""
        return jnp.zeros((len(tokens.ids_T), 1)), None, cache

    def logits(self, x_TD):
        """log p for each token."""
        return jnp.broadcast_to(jnp.log(jnp.array(self.p)), (len(x_TD), len(self.p)))


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class TableDrafter(WithoutContext):
    """Draws every draft from q; confidences are a table by the drafts before.

    Attributes:
      q: distribution of each draft.
      confidence: chance by the drafts before, as a tuple.
      block_length: most drafts.
      telling: whether its certainty says which token was drafted; else the decoder's.
    """

    q: Sequence[float]
    confidence: Mapping[tuple[int, ...], float]
    block_length: int
    telling: bool = False
    config: SimpleNamespace = field(default_factory=SimpleNamespace)

    def propose(self, target, cache, context, sampler, block_length):
        """Drafts of one slot, one by one."""
        drafts, log_q, certainty, chances = [], [], [], []
        for j in range(block_length):
            table = jnp.zeros((len(self.q),) * j)
            for before in itertools.product(range(len(self.q)), repeat=j):
                table = table.at[before].set(self.confidence[before])
            chances.append(table[tuple(d[0] for d in drafts)])
            drawn = sampler(jnp.log(jnp.array(self.q))[None], j, None)
            drafts.append(drawn.tokens_B)
            log_q.append(drawn.log_q_BW)
            told_B = jnp.where(drawn.tokens_B == 0, 3.0, -3.0)
            certainty.append(told_B if self.telling else drawn.certainty_B)
        chances = jnp.array(chances)[None]
        return Proposal(
            tokens_BG=jnp.stack(drafts, 1),
            lengths_B=jnp.array([block_length]),
            confidence_BG=jnp.log(chances) - jnp.log1p(-chances),
            certainty_BG=jnp.stack(certainty, 1),
            q=DraftDistribution(jnp.stack(log_q, 1)),
        ), cache


@standard_settings()
def distribution(
    p: Sequence[float],
    q: Sequence[float],
    confidence: Mapping[tuple[int, ...], float],
    schedule,
    *,
    telling: bool = False,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Next tokens after a round of a target that always says p, under rejection.

    Args:
      p: the target's distribution.
      q: the drafter's.
      confidence: see `TableDrafter`; its longest key says the block length.
      schedule: chooses what is verified.
      telling: see `TableDrafter`.
      **options: of `EnumeratedRound.distribution`.

    Returns:
      What comes out of the round, and what should: [V, ..., V].
    """
    length = 1 + max(map(len, confidence))
    prefixes = (
        prefix
        for n in range(length + 1)
        for prefix in itertools.product(range(len(p)), repeat=n)
    )
    table = {prefix: np.log(p) for prefix in prefixes}
    target = ConstantTarget(p)
    drafter = TableDrafter(q, confidence, length, telling)
    sampling = Sampling.of(1, temperature=1.0)
    round_ = EnumeratedRound(target, drafter, [[0]], table, sampling)
    return round_.distribution(schedule, **options), target_distribution(table)


@standard_settings()
def appendix_checks() -> list[Check]:
    """The example, under the schedule it warns of and under those that are lawful."""
    seen, _ = distribution(**EXAMPLE, schedule=LeakySchedule(costs=COSTS))
    error = float(np.abs(seen.sum((1, 2)) - BIASED).max())
    checks = [
        Check(
            name="appendix A, chosen by its own confidences: from (0.85, 0.15)",
            figure=error,
            bound="<= 1e-6",
            holds=error <= 1e-6,
        )
    ]
    for kind in (Causal, Lagged):
        errors = []
        for earlier in (None, (0.8, 0.72), (0.8, 0.0)):
            history = None if earlier is None else jnp.array(earlier)
            seen, true = distribution(
                **EXAMPLE, schedule=kind(costs=COSTS), earlier_G=history
            )
            errors.append(np.abs(seen - true).max())
        name = f"appendix A, {kind.__name__.lower()}: from the target"
        checks.append(Check.distance(name, max(errors)))
    return checks
