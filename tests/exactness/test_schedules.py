"""The guarantees under every schedule (launch/audit.py --suite=schedules runs all).

Frequencies of the compiled round are in `jaxspark audit --suite=settings`, which
continuous integration runs; that they can fail is shown here.
"""

import jax.numpy as jnp
import pytest

from jaxspark.decoding import Forecast
from jaxspark.exactness import rejection_under_schedules
from jaxspark.exactness.appendix import LeakySchedule
from jaxspark.exactness.audit_schedules import grid_of_schedules
from jaxspark.exactness.suites.schedules import QUICK

LEAKY = {"leaky": LeakySchedule(costs=rejection_under_schedules.COSTS)}


def test_rejection_sampling_is_exact_where_requests_compete():
    checks = rejection_under_schedules.enumeration_checks(["leaky"])
    assert len(checks) == 6 and all(check.holds for check in checks), checks


def test_it_is_exact_where_they_compete_with_a_real_drafter():
    lawful = rejection_under_schedules.schedules_for_rejection()
    chosen = {"lagged": lawful["lagged"]}
    checks = rejection_under_schedules.enumeration_checks(["hybrid-copies"], chosen)
    assert len(checks) == 1 and checks[0].holds, checks


def test_enumeration_finds_a_schedule_that_looks_ahead():
    [check] = rejection_under_schedules.enumeration_checks(["leaky"], LEAKY)
    assert check.figure > 1e-3 and not check.holds


@pytest.mark.long
def test_frequencies_find_it_too():
    # The second learns on the way, which moves what the schedule looks at.
    check, _ = rejection_under_schedules.frequency_checks(20_000, LEAKY)
    assert check.figure < 1e-6 and not check.holds


def test_what_was_drafted_decides_how_much_is_drafted_next():
    lagged = rejection_under_schedules.schedules_for_rejection()["lagged"]
    for survival, length in (((0.8, 0.76), 2), ((0.8, 0.0008), 1), ((0.1, 0.0), 0)):
        outlook = Forecast.of(jnp.array([survival] * 2))
        pick = lagged.draft(outlook, jnp.zeros((2, 2), int))
        assert rejection_under_schedules.COSTS.draft_lengths[int(pick)] == length


def test_the_grid_has_every_choice_and_its_part_most():
    whole, part = (
        grid_of_schedules(),
        grid_of_schedules(every=QUICK),
    )
    # Free is refused with rejection sampling; one drafter meets all sets of buckets.
    assert len(whole) == (8 + 3) * (2 * 7 - 1) and len(set(whole)) == len(whole)
    for name in ("drafter", "schedule", "coupling"):
        met = {(getattr(cell, name), cell.buckets) for cell in whole}
        assert len(met) == 3 * len({getattr(cell, name) for cell in whole}), name
    assert {cell.drafter for cell in part} == {cell.drafter for cell in whole}
    assert len({cell.schedule for cell in part}) >= 5
