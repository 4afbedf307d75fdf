"""Guarantee 2: sampling with speculation is distributed as the target, provably."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxspark.decoding import Fixed, Sampling, verdicts
from jaxspark.exactness import rejection
from jaxspark.exactness.enumeration import EnumeratedRound
from jaxspark.exactness.plain_law import sequence_log_probs, target_distribution
from jaxspark.exactness.statistics import chi_square
from jaxspark.exactness.tiny_models import tiny_models

DRAFTERS = (
    "ngram",
    "dflash",
    "dspark-vanilla",
    "dspark-gated",
    "dspark-rnn",
    "dspark-pruned",
    "eagle3",
    "hybrid-copies",
    "hybrid-asks",
)
# Enough to find the biased rule below; `jaxspark audit` draws twenty times as many.
SAMPLES = 10_000


def too_generous(log_p_BG, log_q_BG):
    """A biased rule: accepts more than min(1, p/q)."""
    return jnp.minimum(1.0, jnp.exp(0.5 * (log_p_BG - log_q_BG)))


def assert_all_hold(checks):
    assert checks
    assert not [check for check in checks if not check.holds]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_round_is_exact_by_enumeration(name):
    assert_all_hold(rejection.enumeration_checks([name]))


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [dict(temperature=1.5), dict(temperature=0.0), dict(temperature=1.0, top_p=0.6)],
    ids=str,
)
def test_a_round_is_exact_under_any_length_and_warp(settings, length):
    target, drafters = tiny_models("dense", 3)
    drafter = drafters["dspark-rnn"]
    sampling, prompt = Sampling.of(1, **settings), rejection.PROMPT
    table = sequence_log_probs(target, prompt, 3, sampling)
    round_ = EnumeratedRound(target, drafter, [prompt], table, sampling)
    seen = round_.distribution(Fixed(length))
    np.testing.assert_allclose(seen, target_distribution(table), atol=1e-6)


def test_enumeration_catches_a_biased_rule():
    checks = rejection.enumeration_checks(["dspark-gated"], accept=too_generous)
    assert [check.figure > 1e-3 and not check.holds for check in checks] == [True]


@pytest.mark.parametrize(
    "name", [pytest.param("dspark-gated", marks=pytest.mark.long), "ngram"]
)
def test_frequencies_of_first_tokens_and_acceptance_formulas(name):
    """Drafts of a distribution, and of point masses."""
    assert_all_hold(rejection.frequency_checks(SAMPLES, [name]))


def test_frequencies_catch_a_biased_rule(monkeypatch):
    monkeypatch.setattr(verdicts, "acceptance_probability", too_generous)
    jax.clear_caches()
    try:
        checks = rejection.frequency_checks(SAMPLES, ["dspark-gated"])
    finally:
        jax.clear_caches()
    failed = [check.name for check in checks if not check.holds]
    assert any("token" in name and "rejection" in name for name in failed)
    assert not any("gumbel" in name for name in failed)


def test_chi_square_accepts_the_truth_and_rejects_a_shift():
    random = np.random.default_rng(0)
    truth = np.array([0.5, 0.3, 0.15, 0.05])
    counts = random.multinomial(100_000, truth)
    assert chi_square(counts, truth) > 1e-3
    expected = scipy.stats.chisquare(counts, truth * 100_000).pvalue
    np.testing.assert_allclose(chi_square(counts, truth), expected, rtol=1e-4)
    assert chi_square(counts, np.array([0.48, 0.32, 0.15, 0.05])) < 1e-6
    assert chi_square(np.array([10, 0, 1]), np.array([0.9, 0.1, 0.0])) == 0.0
