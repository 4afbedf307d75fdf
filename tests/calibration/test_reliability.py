"""Calibration error, ranking and Brier score against their definitions."""

import itertools

import numpy as np
import pytest

from jaxspark.calibration.reliability import (
    Reliability,
    brier_score,
    calibration_error,
    roc_auc,
)


def draws(seed, count=400):
    rng = np.random.default_rng(seed)
    forecast_N = rng.uniform(size=count).round(2)
    return forecast_N, rng.uniform(size=count) < forecast_N**1.5


def test_calibration_error_by_hand():
    forecast_N = np.array([0.11, 0.13, 0.52, 1.0])
    happened_N = np.array([False, True, True, True])
    # Bins 0.10-0.15, 0.50-0.55 and the last one.
    error = abs(0.24 - 1) / 4 + 0.48 / 4 + 0.0
    np.testing.assert_allclose(
        calibration_error(forecast_N[None], happened_N), [error], atol=1e-12
    )


def test_rival_forecasts_are_judged_each_on_its_own():
    forecast_N, happened_N = draws(0)
    rivals_KN = np.stack([forecast_N, forecast_N**1.5, np.full(400, 0.4)])
    alone = [calibration_error(each[None], happened_N)[0] for each in rivals_KN]
    np.testing.assert_allclose(calibration_error(rivals_KN, happened_N), alone)
    assert alone[1] < alone[0]


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_share_of_pairs_in_order(seed):
    forecast_N, happened_N = draws(seed, 60)
    pairs = itertools.product(forecast_N[happened_N], forecast_N[~happened_N])
    share = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    np.testing.assert_allclose(roc_auc(forecast_N, happened_N), share)


def test_auc_needs_both_kinds():
    assert np.isnan(roc_auc(np.array([0.1, 0.2]), np.array([True, True])))


def test_brier_score_is_least_for_the_truth():
    forecast_N, happened_N = draws(1)
    truth = brier_score(forecast_N**1.5, happened_N)
    assert truth < brier_score(forecast_N, happened_N)
    assert truth < brier_score(np.full(400, happened_N.mean()), happened_N)


def test_a_reliability_curve_has_the_bins_that_were_used():
    curve = Reliability.of(np.array([0.12, 0.14, 0.9]), np.array([True, False, True]))
    np.testing.assert_allclose(curve.forecast, [0.13, 0.9])
    assert (curve.happened, curve.count) == ([0.5, 1.0], [2, 1])
