"""Cost profiles: which buckets they keep, and where they can be measured."""

import pytest

from jaxspark.calibration.profile import measure_costs, pareto_buckets
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
