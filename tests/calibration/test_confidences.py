"""Where survival comes from, by what commands are told; and replays of recordings."""

import numpy as np
import pytest

from jaxspark.calibration.files import MissingCalibration
from jaxspark.calibration.replay import replayed, without_head
from jaxspark.calibration.rounds import Rounds
from jaxspark.calibration.schedules import chosen_confidences
from jaxspark.calibration.temperatures import assess_logits
from jaxspark.decoding import Estimator


def chosen(name, draft):
    calibration, estimator = chosen_confidences(name, draft, "rejection")
    return calibration is not None, estimator is not None


def test_what_was_calibrated_is_used_and_else_acceptance_is_learned(capsys):
    assert chosen("auto", "dspark") == (True, False)
    assert capsys.readouterr().err == ""
    assert chosen("auto", "ngram") == (False, True)
    assert "acceptance is learned while decoding: ngram" in capsys.readouterr().err


def test_both_can_be_asked_for():
    assert chosen("online", "dspark") == (True, True)
    assert chosen("online", "ngram") == (False, True)
    assert chosen("raw", "dspark") == (False, False)
    assert chosen("calibrated", "dspark") == (True, False)
    with pytest.raises(MissingCalibration, match="ngram has no trained confidences"):
        chosen_confidences("calibrated", "ngram", "rejection")


def recorded(random, count, shift):
    """Rounds of a drafter whose confidences are off by so much."""
    logits_NG = random.normal(0.5, 1.0, (count, 3))
    held_NG = random.random((count, 3)) < 1 / (1 + np.exp(-logits_NG))
    accepted_N = np.cumprod(held_NG, axis=1).sum(axis=1)
    return Rounds(
        request_N=np.arange(count) // 50,
        confidence_NG=logits_NG + shift,
        certainty_NG=np.zeros((count, 3)),
        judged_N=np.minimum(accepted_N + 1, 3),
        accepted_N=accepted_N,
    )


@pytest.mark.parametrize("slots", [1, 7])
def test_a_replay_forecasts_what_it_has_learned_so_far(slots):
    rounds = recorded(np.random.default_rng(0), 800, shift=1.5)
    logits_NG, state = replayed(rounds, sampled=True, slots=slots)
    # The first ones cannot know better.
    np.testing.assert_allclose(logits_NG[0], rounds.confidence_NG[0], rtol=1e-5)
    before = np.mean(assess_logits(rounds, rounds.confidence_NG)["ece"])
    after = np.mean(assess_logits(rounds, logits_NG)["ece"])
    assert before > 0.15 and after < before / 3
    assert float(state.shared_BRX[0, 1, 2]) == pytest.approx(-1.5, abs=0.4)


def test_no_forecast_knows_its_own_round():
    rounds = recorded(np.random.default_rng(1), 64, shift=0.0)
    first, _ = replayed(rounds, sampled=True, estimator=Estimator(every=1))
    changed = rounds.accepted_N.copy()
    changed[-1] = 0
    rounds.accepted_N[:], rounds.judged_N[-1] = changed, 1
    second, _ = replayed(rounds, sampled=True, estimator=Estimator(every=1))
    np.testing.assert_array_equal(first, second)


def test_without_a_head_certainty_is_all_there_is():
    rounds = recorded(np.random.default_rng(2), 8, shift=0.0)
    np.testing.assert_array_equal(
        without_head(rounds, (0.5, -0.2)).confidence_NG, np.full((8, 3), -0.2)
    )
