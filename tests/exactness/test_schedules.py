"""The guarantees under every schedule (launch/audit.py --suite=schedules runs all)."""

import jax.numpy as jnp
import pytest

from jaxspark.decoding import Forecast
from jaxspark.exactness import rejection_under_schedules
from jaxspark.exactness.appendix import LeakySchedule
from jaxspark.exactness.audit_schedules import grid_of_schedules
from jaxspark.exactness.suites.schedules import QUICK

LEAKY = {"leaky": LeakySchedule(costs=rejection_under_schedules.COSTS)}


@pytest.mark.parametrize("drafter", ["leaky", "hybrid-copies"])
def test_rejection_sampling_is_exact_where_requests_compete(drafter):
    checks = rejection_under_schedules.enumeration_checks([drafter])
    assert len(checks) == 6 and all(check.holds for check in checks), checks


def test_enumeration_finds_a_schedule_that_looks_ahead():
    [check] = rejection_under_schedules.enumeration_checks(["leaky"], LEAKY)
    assert check.figure > 1e-3 and not check.holds


def test_frequencies_find_it_too():
    [check] = rejection_under_schedules.frequency_checks(20_000, LEAKY)
    assert check.figure < 1e-6 and not check.holds


def test_frequencies_of_the_compiled_round_are_right():
    lawful = rejection_under_schedules.schedules_for_rejection()
    chosen = {"lagged": lawful["lagged"]}
    checks = rejection_under_schedules.frequency_checks(20_000, chosen)
    assert all(check.holds for check in checks), checks


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
