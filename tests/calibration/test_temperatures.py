"""Sequential temperature scaling finds what was done to confidences."""

from dataclasses import replace

import numpy as np
import pytest

from jaxspark.calibration.rounds import Rounds
from jaxspark.calibration.temperatures import Scaling, assess, fit_temperatures

DONE = np.array([0.5, 1.0, 2.0, 3.0])


def rounds(seed, count=40_000, verified=4):
    """Rounds whose honest confidences were multiplied by DONE."""
    rng = np.random.default_rng(seed)
    honest_NG = rng.normal(1.0, 1.5, (count, 4))
    held_NG = rng.uniform(size=(count, 4)) < 1 / (1 + np.exp(-honest_NG))
    accepted_N = np.cumprod(held_NG[:, :verified], axis=1).sum(axis=1)
    return Rounds(
        request_N=np.arange(count),
        confidence_NG=(honest_NG * DONE).astype(np.float32),
        certainty_NG=np.zeros((count, 4)),
        judged_N=np.minimum(accepted_N + 1, verified),
        accepted_N=accepted_N,
    )


def test_the_temperatures_are_found_and_calibrate_others_rounds():
    fitted = fit_temperatures(rounds(0))
    assert not fitted.biases_G.any() and not fitted.weights_G.any()
    np.testing.assert_allclose(fitted.temperatures_G, DONE, rtol=0.15)
    test = rounds(1)
    before, after = (assess(test, each) for each in (Scaling.identity(4), fitted))
    assert np.mean(before["ece"]) > 0.03 and max(after["ece"]) < 0.01
    assert after["auc_conditional"] == before["auc_conditional"]
    assert sum(after["brier"]) < sum(before["brier"])


def test_a_bias_mends_what_no_temperature_can():
    def shifted(seed):
        each = rounds(seed)
        # Too sure by as much at every draft, and on top of it too loud.
        return replace(each, confidence_NG=each.confidence_NG + 1.5 * DONE)

    fits = [fit_temperatures(shifted(6), biased=biased) for biased in (False, True)]
    np.testing.assert_allclose(fits[1].temperatures_G, DONE, rtol=0.15)
    np.testing.assert_allclose(fits[1].biases_G, -1.5, atol=0.3)
    alone, both = (assess(shifted(7), fit) for fit in fits)
    assert np.mean(alone["ece"]) > 0.03 and max(both["ece"]) < 0.012
    assert both["auc_conditional"] == alone["auc_conditional"]


def told_apart(seed):
    """Rounds of which confidence tells one half, certainty the other."""
    each = rounds(seed, count=8000)
    honest_NG = each.confidence_NG / DONE
    noise_NG = np.random.default_rng(100 + seed).normal(size=honest_NG.shape)
    told_NG = 0.5 * honest_NG + 0.7 * noise_NG
    return replace(each, confidence_NG=honest_NG - told_NG, certainty_NG=told_NG)


def test_sharpness_tells_what_the_head_does_not():
    biased, with_certainty = (
        fit_temperatures(told_apart(8), biased=True, with_certainty=with_certainty)
        for with_certainty in (False, True)
    )
    np.testing.assert_allclose(with_certainty.temperatures_G, 1.0, rtol=0.25)
    np.testing.assert_allclose(with_certainty.weights_G, 1.0, rtol=0.25)
    np.testing.assert_allclose(with_certainty.biases_G, 0.0, atol=0.25)
    without, with_it = (assess(told_apart(9), fit) for fit in (biased, with_certainty))
    gained = np.subtract(with_it["auc_conditional"], without["auc_conditional"])
    assert gained.min() > 0.05 and max(with_it["ece"]) < 0.03


def test_drafters_without_a_head_are_told_by_sharpness_alone():
    headless = told_apart(10)
    headless = replace(headless, confidence_NG=0 * headless.confidence_NG)
    fit = fit_temperatures(headless, biased=True, with_certainty=True)
    assert fit.weights_G.min() > 0.3
    assert min(assess(headless, fit)["auc"]) > 0.6


def test_sharpness_that_misleads_is_left_out():
    wrong = told_apart(11)
    wrong = replace(wrong, certainty_NG=-wrong.certainty_NG)
    assert not fit_temperatures(wrong, biased=True, with_certainty=True).weights_G.any()


def test_calibrated_confidences_are_left_alone():
    honest = rounds(2)
    honest = replace(honest, confidence_NG=honest.confidence_NG / DONE)
    fitted = fit_temperatures(honest)
    np.testing.assert_allclose(fitted.temperatures_G, 1.0, atol=0.1)


def test_what_nobody_judged_is_unknown():
    few = rounds(3, count=100, verified=2)
    survived_NG, known_NG = few.survived()
    all_held_N = few.accepted_N == 2
    assert known_NG[:, :2].all() and not known_NG[all_held_N, 2:].any()
    assert known_NG[~all_held_N].all() and not survived_NG[~all_held_N, 2:].any()


def test_a_draft_that_was_never_verified_cannot_be_fitted():
    all_held = Rounds(
        request_N=np.zeros(3, int),
        confidence_NG=np.zeros((3, 2)),
        certainty_NG=np.zeros((3, 2)),
        judged_N=np.ones(3, int),
        accepted_N=np.ones(3, int),
    )
    with pytest.raises(ValueError, match="draft 2 was never verified in 3 rounds"):
        fit_temperatures(all_held)


def test_survival_never_rises_along_a_block():
    assert np.all(np.diff(Scaling.identity(4).survival(rounds(4, 50))) <= 0)


def test_rounds_come_back_from_a_file(tmp_path):
    path = tmp_path / "rounds.npz"
    rounds(5, 20).save(path)
    for name, array in vars(Rounds.load(path)).items():
        np.testing.assert_array_equal(array, getattr(rounds(5, 20), name))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="holds no recorded rounds"):
        Rounds.load(path)
