"""Cost profiles: which buckets they keep."""

from jaxspark.calibration.profile import worthwhile


def test_buckets_that_take_as_long_as_larger_ones_are_left_out():
    curve = worthwhile(2, (11, 13, 16, 24, 32), (78.0, 85.0, 70.0, 109.0, 108.0))
    assert (curve.draft_length, curve.sizes) == (2, (16, 32))
    assert curve.seconds == (70.0, 108.0)
    assert worthwhile(0, (8,), (1.0,)).sizes == (8,)
