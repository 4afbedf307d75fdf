"""Output keeps its distribution while acceptance is learned between rounds."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxspark.decoding import Sampling, Threshold
from jaxspark.exactness.audit_schedules import scheduler
from jaxspark.exactness.estimated_rounds import VOCAB, EnumeratedRounds
from jaxspark.exactness.rejection_under_schedules import COSTS
from jaxspark.exactness.tiny_models import tiny_models

SAMPLING = Sampling.of(1, temperature=0.8)


@pytest.fixture(scope="module")
def models():
    return tiny_models("dense", VOCAB, drafters=("eagle3", "dspark-gated"))


def telling(block):
    """With a certainty that tells the drafted token."""
    told_BG = block.proposal.q.log_prob(block.proposal.tokens_BG)
    told_BG += 2.0 * (block.proposal.tokens_BG == 0)
    proposal = replace(
        block.proposal, certainty_BG=told_BG, confidence_BG=jnp.zeros_like(told_BG)
    )
    return replace(block, proposal=proposal)


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["eagle3", "dspark-gated"])
def test_the_law_of_two_rounds_is_the_target_s(models, drafter):
    target, made = models
    rounds = EnumeratedRounds(target, made[drafter], SAMPLING)
    moved = {}
    for name in ("threshold:0.3", "causal", "lagged"):
        schedule = scheduler(name, COSTS)
        seen = rounds.under(schedule)
        assert seen.conditional_error <= 1e-6, name
        assert seen.joint_error <= 1e-6, name
        moved[name] = seen.moved
    # What was learned cuts blocks otherwise.
    assert max(moved.values()) > 0.1, moved


@pytest.mark.long
def test_a_certainty_that_tells_the_draft_biases_the_second_round(models):
    target, made = models
    rounds = EnumeratedRounds(target, made["eagle3"], SAMPLING, telling)
    seen = rounds.under(Threshold(0.5))
    assert seen.conditional_error > 1e-2 and seen.joint_error > 1e-2
