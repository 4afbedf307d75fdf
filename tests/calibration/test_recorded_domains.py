"""Recordings of several domains as one: what `bench --suite=estimator` replays."""

import numpy as np

from jaxspark.benchmark.estimated import in_turn_by_length, joined, taken
from jaxspark.calibration.rounds import Rounds


def recording(requests, confidence):
    count = len(requests)
    return Rounds(
        request_N=np.array(requests),
        confidence_NG=np.full((count, 2), confidence),
        certainty_NG=np.zeros((count, 2)),
        judged_N=np.ones(count, int),
        accepted_N=np.zeros(count, int),
    )


def test_requests_of_two_recordings_keep_apart():
    both = joined([recording([0, 1, 1], 1.0), recording([0, 0, 1], 2.0)])
    assert both.request_N.tolist() == [0, 1, 1, 2, 2, 3]
    assert both.confidence_NG[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_domainsin_turn_by_length_end_together_whatever_their_lengths():
    order_N = in_turn_by_length(np.array([0, 6, 9]))
    assert sorted(order_N.tolist()) == list(range(9))
    both = joined([recording([0] * 6, 1.0), recording([0] * 3, 2.0)])
    mixed = taken(both, order_N)
    assert mixed.confidence_NG[:, 0].tolist() == [1, 2, 1, 1, 2, 1, 1, 2, 1]
