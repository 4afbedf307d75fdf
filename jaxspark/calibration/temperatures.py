"""Sequential temperature scaling (paper section 3.2.1).

A confidence head is trained on teacher-forced text, so its product over a block drifts
from the rate at which real blocks survive. One temperature per draft, fitted from left
to right, mends that: t_k minimises the calibration error of

    a_k = sigmoid(c_1 / t_1) ... sigmoid(c_k / t_k)

against "the first k drafts were accepted", with t_1 ... t_{k-1} fixed. Each confidence
keeps its order, so ranking at a place is untouched.

A temperature cannot move a head that is too sure or too modest everywhere, as one is
that sampled text surprises after training on greedy answers. A bias per draft can:
sigmoid(c_k / t_k + b_k), with b_k such that forecast and truth agree in the mean.
"""

from dataclasses import asdict

import numpy as np
from jaxtyping import Float

from jaxspark.calibration.reliability import (
    Reliability,
    brier_score,
    calibration_error,
    roc_auc,
)
from jaxspark.calibration.rounds import Rounds

# From sharpening tenfold to flattening tenfold, in steps of 1 %.
GRID = np.exp(np.arange(-231, 232) * 0.01)


def survival(
    confidence_NG: Float[np.ndarray, "N G"],
    temperatures_G: Float[np.ndarray, " G"],
    biases_G: Float[np.ndarray, " G"] | float = 0.0,
) -> Float[np.ndarray, "N G"]:
    """Probability that the first j + 1 drafts are all accepted."""
    return np.cumprod(_sigmoid(confidence_NG / temperatures_G + biases_G), axis=1)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def fit_temperatures(
    rounds: Rounds, *, biased: bool = False
) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """One temperature per draft, by grid search from left to right.

    Args:
      rounds: to fit to.
      biased: whether every temperature of the grid comes with the bias that makes
        forecast and truth agree in the mean.

    Returns:
      temperatures_G: what logits are divided by.
      biases_G: what is added then; zeros unless `biased`.

    Raises:
      ValueError: a draft that no round judged.
    """
    survived_NG, known_NG = rounds.survived()
    temperatures, biases = [], []
    before_N = np.ones(len(rounds))
    for k, confidence_N in enumerate(rounds.confidence_NG.T):
        known_N = known_NG[:, k]
        if not known_N.any():
            raise ValueError(
                f"draft {k + 1} was never verified in {len(rounds)} rounds; collect "
                "rounds that verify whole blocks"
            )
        scaled_KN = confidence_N[known_N] / GRID[:, None]
        earlier_N, happened_N = before_N[known_N], survived_NG[known_N, k]
        bias_K1 = np.zeros((len(GRID), 1))
        if biased:
            bias_K1 = _bias(scaled_KN, earlier_N, happened_N.mean())
        errors_K = calibration_error(
            earlier_N * _sigmoid(scaled_KN + bias_K1), happened_N
        )
        # Of equally good temperatures the one that changes least.
        best = np.lexsort((np.abs(np.log(GRID)), errors_K))[0]
        temperatures.append(GRID[best])
        biases.append(bias_K1[best, 0])
        before_N = before_N * _sigmoid(confidence_N / temperatures[-1] + biases[-1])
    return np.array(temperatures), np.array(biases)


def _bias(scaled_KN, earlier_N, rate: float):
    """For each temperature what makes the mean forecast the rate; by bisection."""
    low_K1 = np.full((len(scaled_KN), 1), -20.0)
    high_K1 = -low_K1
    for _ in range(30):
        middle_K1 = (low_K1 + high_K1) / 2
        forecast_KN = earlier_N * _sigmoid(scaled_KN + middle_K1)
        below_K1 = forecast_KN.mean(axis=1, keepdims=True) < rate
        low_K1 = np.where(below_K1, middle_K1, low_K1)
        high_K1 = np.where(below_K1, high_K1, middle_K1)
    return (low_K1 + high_K1) / 2


def assess(
    rounds: Rounds,
    temperatures_G: Float[np.ndarray, " G"],
    biases_G: Float[np.ndarray, " G"] | float = 0.0,
) -> dict[str, list]:
    """How reliable survival is at each draft, with these temperatures and biases.

    Returns lists over drafts:
      ece: expected calibration error of survival.
      auc: how well survival ranks.
      auc_conditional: how well the draft's own confidence ranks where all before it
        were accepted; no temperature changes it.
      brier: Brier score of survival.
      survived: rate at which the first drafts were all accepted.
      rounds: rounds in which that is known.
      curve: reliability by bin, see `Reliability`.
    """
    forecast_NG = survival(rounds.confidence_NG, temperatures_G, biases_G)
    survived_NG, known_NG = rounds.survived()
    figures: dict[str, list] = {
        name: []
        for name in (
            "ece",
            "auc",
            "auc_conditional",
            "brier",
            "survived",
            "rounds",
            "curve",
        )
    }
    reached_N = np.ones(len(rounds), bool)
    for k in range(forecast_NG.shape[1]):
        known_N = known_NG[:, k]
        forecast_N, survived_N = forecast_NG[known_N, k], survived_NG[known_N, k]
        own_N = known_N & reached_N
        confidence_N = rounds.confidence_NG[own_N, k]
        figures["ece"].append(float(calibration_error(forecast_N[None], survived_N)[0]))
        figures["auc"].append(roc_auc(forecast_N, survived_N))
        figures["auc_conditional"].append(roc_auc(confidence_N, survived_NG[own_N, k]))
        figures["brier"].append(brier_score(forecast_N, survived_N))
        figures["survived"].append(float(survived_N.mean()))
        figures["rounds"].append(int(known_N.sum()))
        figures["curve"].append(asdict(Reliability.of(forecast_N, survived_N)))
        reached_N = reached_N & survived_NG[:, k]
    return figures
