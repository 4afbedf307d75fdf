"""Whatever a request does to its logits, speculation changes neither law nor token.

`jaxspark audit --suite=parameters` has every drafter, schedule, coupling and set of
buckets.
"""

import jax
import pytest

from jaxspark.decoding.adjusted_logits import Adjuster
from jaxspark.exactness import parameters
from jaxspark.exactness.audit_schedules import WISHES, ScheduleAudit, ScheduleCell
from jaxspark.exactness.rejection_under_schedules import LEAKY, schedules_for_rejection
from jaxspark.exactness.suites.schedules import TOLD_ERROR
from jaxspark.exactness.told import parted, told_error

LAGGED = {"lagged": schedules_for_rejection()["lagged"]}


pytestmark = pytest.mark.usefixtures("compiled_soon")


@pytest.mark.parametrize(
    "drafter", [pytest.param("dspark-pruned", marks=pytest.mark.long), "ngram"]
)
def test_sampling_is_exact_by_enumeration(drafter):
    """Drafts of a distribution over part of the vocabulary, and of point masses."""
    checks = parameters.enumeration_checks([drafter], schedules=LAGGED)
    assert len(checks) == len(parameters.CASES)
    assert not [check for check in checks if not check.holds]


def forgets_drafts(self, z_TV, logits_TV, tokens, drafts_BG):
    """What committed tokens alone amount to."""
    return z_TV


def test_enumeration_catches_drafts_that_are_not_counted(monkeypatch):
    monkeypatch.setattr(Adjuster, "_counting_drafts", forgets_drafts)
    jax.clear_caches()
    try:
        cases = ("presence", "frequency", "repetition", "bias")
        checks = parameters.enumeration_checks([LEAKY], cases, schedules={})
    finally:
        jax.clear_caches()
    assert [check.holds for check in checks] == [False, False, False, True]


@pytest.fixture(scope="module")
def audit():
    return ScheduleAudit(
        adjusted=True, drafters=["dspark-gated", "hybrid-asks"], mixes=["stream"],
        couplings=["gumbel"],
    )  # fmt: skip


def test_plain_decoding_does_what_the_definition_says(audit):
    requests, plain = audit.mixes["stream"], audit.plain["stream", "gumbel"]
    assert len(requests) >= len(WISHES)
    outputs = [each.tokens for each in plain]
    assert not list(parted(audit.target, requests, outputs))
    # The check can fail.
    changed = [tokens[::-1] for tokens in outputs]
    assert list(parted(audit.target, requests, changed))
    assert told_error(plain[0], plain[0]) == 0.0 < told_error(plain[0], plain[1])


@pytest.mark.parametrize(
    ("drafter", "schedule"), [("dspark-gated", "fixed"), ("hybrid-asks", "lagged")]
)
def test_not_one_token_changes_nor_what_is_told_of_it(audit, drafter, schedule):
    cell = ScheduleCell(
        drafter=drafter, schedule=schedule, coupling="gumbel", buckets="one"
    )
    result = audit.run(cell, mixes=("stream",))
    assert result.audit.tokens > 100 and result.verified > 0
    assert not result.audit.violations
    assert len(result.audit.near_ties) <= 1
    assert result.told_error <= TOLD_ERROR
