"""Measured costs: which buckets they keep, where and how long rounds are timed."""

import itertools

import pytest

from jaxspark.calibration import measuring
from jaxspark.calibration.measuring import measure_costs, pareto_buckets
from tests import zoo


def test_buckets_that_take_as_long_as_larger_ones_are_left_out():
    curve = pareto_buckets(2, (11, 13, 16, 24, 32), (78.0, 85.0, 70.0, 109.0, 108.0))
    assert (curve.draft_length, curve.sizes) == (2, (16, 32))
    assert curve.seconds == (70.0, 108.0)
    assert pareto_buckets(0, (8,), (1.0,)).sizes == (8,)


def test_one_request_with_little_room_is_measured_too():
    model = zoo.target()
    drafter = zoo.drafter("dspark-vanilla", model)
    options = {"block_length": 2, "buckets": (3,), "capacity": 32}
    profile = measure_costs(model, drafter, slots=1, **options, repeats=1)
    assert profile.costs.draft_lengths == (0, 1, 2)
    with pytest.raises(ValueError, match="1 rounds of 4 drafts need more cache posit"):
        measure_costs(model, drafter, slots=1, block_length=4, capacity=8)


@pytest.mark.parametrize("seconds, rounds", [(0.001, 4), (0.08, 2), (3.0, 1)])
def test_long_rounds_are_timed_one_by_one(seconds, rounds, monkeypatch):
    """A fake clock; all runs but the two that find out how long rounds are."""
    asked, clock = [], itertools.count()
    compiled = measuring.compiled

    def counting(run):
        def counted(model, drafter, state, count, **options):
            asked.append(int(count))
            return compiled(run)(model, drafter, state, count, **options)

        return counted

    monkeypatch.setattr(measuring, "compiled", counting)
    # What lies between two looks at it is a run of as many rounds.
    monkeypatch.setattr(measuring, "perf_counter", lambda: next(clock) * 4 * seconds)
    model = zoo.target()
    drafter = zoo.drafter("dspark-vanilla", model)
    measure_costs(
        *(model, drafter), slots=4, block_length=1, buckets=(8,), capacity=64, repeats=1
    )
    assert asked[:2] == [4, 4] and len(asked) > 2
    assert set(asked[2:]) == {rounds}
