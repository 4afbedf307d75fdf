"""Sequential temperature scaling (paper section 3.2.1), with certainty and a bias.

A confidence head is trained on teacher-forced text, so its product over a block drifts
from the rate at which real blocks survive. One temperature per draft, fitted from left
to right, corrects that: t_k minimizes the calibration error of

    a_k = sigmoid(c_1 / t_1) ... sigmoid(c_k / t_k)

against "the first k drafts were accepted", with t_1 ... t_{k-1} fixed. Each confidence
keeps its order, so ranking at a position is unchanged.

A temperature cannot fix uniform over- or underconfidence, as when a head trained on
greedy answers meets sampled text. A bias per draft can: sigmoid(c_k / t_k + b_k), with
b_k such that forecast and outcome agree in the mean. Calibration error can then no
longer choose t_k, because a constant forecast of the mean has none; the Brier score
does.

Neither improves the ranking. The certainty of a draft, s_k, can: a logistic regression
combines it with the head's logit, and the result is scaled and shifted as before.
"""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize

from jaxspark.calibration.reliability import (
    Reliability,
    brier_score,
    calibration_error,
    roc_auc,
)
from jaxspark.calibration.rounds import Rounds

# From sharpening tenfold to flattening tenfold, in steps of 1 %; of 5 % beside a bias.
GRID = np.exp(np.arange(-230, 231) * 0.01)
BIASED_GRID = GRID[::5]
# Confidence and certainty never count against a draft; confidence always a little, for
# it is what temperatures divide.
LEAST = (0.01, 0.0)
# Pull of a regression's weights towards 0, which keeps them finite.
RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is done to confidences c and certainty s: sigmoid(c / t + w s + b).

    Attributes:
      temperatures_G: t, by draft.
      weights_G: w.
      biases_G: b.
    """

    temperatures_G: Float[np.ndarray, " G"]
    weights_G: Float[np.ndarray, " G"]
    biases_G: Float[np.ndarray, " G"]

    @classmethod
    def identity(cls, block_length: int) -> "Scaling":
        """Takes confidences as they are."""
        zeros_G = np.zeros(block_length)
        return cls(temperatures_G=zeros_G + 1, weights_G=zeros_G, biases_G=zeros_G)

    def logits(self, rounds: Rounds) -> Float[np.ndarray, "N G"]:
        """Of P(draft j accepted | all before it accepted)."""
        scaled_NG = rounds.confidence_NG / self.temperatures_G
        return scaled_NG + rounds.certainty_NG * self.weights_G + self.biases_G

    def survival(self, rounds: Rounds) -> Float[np.ndarray, "N G"]:
        """Probability that the first j + 1 drafts are all accepted."""
        return np.cumprod(_sigmoid(self.logits(rounds)), axis=1)

    def lists(self) -> dict[str, list[float]]:
        """Its numbers, for a file."""
        return {name.removesuffix("_G"): x.tolist() for name, x in vars(self).items()}


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def fit_temperatures(
    rounds: Rounds, *, biased: bool = False, with_certainty: bool = False
) -> Scaling:
    """One temperature per draft, by grid search from left to right.

    Args:
      rounds: to fit to.
      biased: whether every temperature of the grid comes with the bias that makes
        forecast and truth agree in the mean, and the best Brier score is taken; zeros
        and the least calibration error otherwise.
      with_certainty: whether certainty counts, as much as a logistic regression says.

    Raises:
      ValueError: a draft that no round judged.
    """
    survived_NG, known_NG = rounds.survived()
    found: list[tuple[float, float, float]] = []
    before_N, reached_N = np.ones(len(rounds)), np.ones(len(rounds), bool)
    for k in range(rounds.confidence_NG.shape[1]):
        known_N = known_NG[:, k]
        if not known_N.any():
            raise ValueError(
                f"draft {k + 1} was never verified in {len(rounds)} rounds; collect "
                "rounds that verify whole blocks"
            )
        signals_2N = np.stack([rounds.confidence_NG[:, k], rounds.certainty_NG[:, k]])
        own_N = known_N & reached_N
        share_2 = np.array([1.0, 0.0])
        if with_certainty:
            share_2 = _regression(signals_2N[:, own_N], survived_NG[own_N, k])
        signal_N = share_2 @ signals_2N
        fit = _biased if biased else _unbiased
        temperature, bias = fit(
            signal_N[known_N], before_N[known_N], survived_NG[known_N, k]
        )
        found.append((temperature / share_2[0], share_2[1] / temperature, bias))
        before_N = before_N * _sigmoid(signal_N / temperature + bias)
        reached_N = reached_N & survived_NG[:, k]
    temperatures_G, weights_G, biases_G = np.array(found).T
    return Scaling(
        temperatures_G=temperatures_G, weights_G=weights_G, biases_G=biases_G
    )


def _unbiased(signal_N, earlier_N, happened_N) -> tuple[float, float]:
    """The temperature of one draft, after those before it; bias 0."""
    forecast_KN = earlier_N * _sigmoid(signal_N / GRID[:, None])
    errors_K = calibration_error(forecast_KN, happened_N)
    # Of equally good temperatures the one that changes least.
    best = np.lexsort((np.abs(np.log(GRID)), errors_K))[0]
    return float(GRID[best]), 0.0


def _biased(signal_N, earlier_N, happened_N) -> tuple[float, float]:
    """Temperature and bias of one draft, after those before it."""
    scaled_KN = signal_N / BIASED_GRID[:, None]
    bias_K1 = _bias(scaled_KN, earlier_N, happened_N.mean())
    error_KN = earlier_N * _sigmoid(scaled_KN + bias_K1) - happened_N
    best = np.argmin(np.sum(error_KN**2, axis=1))
    return float(BIASED_GRID[best]), float(bias_K1[best, 0])


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


def _regression(
    signals_XN: Float[np.ndarray, "X N"], happened_N: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, " X"]:
    """Weights of a logistic regression with intercept, none below `LEAST`."""
    count = max(len(happened_N), 1)

    def loss(weights):
        *weight_X, intercept = weights
        logit_N = np.array(weight_X) @ signals_XN + intercept
        nats = np.sum(np.logaddexp(0, logit_N) - happened_N * logit_N) / count
        error_N = (_sigmoid(logit_N) - happened_N) / count
        slope = np.append(signals_XN @ error_N, error_N.sum())
        return nats + RIDGE / 2 * weights @ weights, slope + RIDGE * weights

    bounds = [(least, None) for least in LEAST] + [(None, None)]
    start = np.array([1.0, 0.0, 0.0])
    return minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B").x[:-1]


def assess(rounds: Rounds, scaling: Scaling) -> dict[str, list]:
    """How reliable survival is at each draft, scaled so; see `assess_logits`."""
    return assess_logits(rounds, scaling.logits(rounds))


def assess_logits(
    rounds: Rounds, logits_NG: Float[np.ndarray, "N G"]
) -> dict[str, list]:
    """How reliable survival is at each draft, forecast so.

    Args:
      rounds: what happened.
      logits_NG: of P(draft j accepted | all before it accepted).

    Returns lists over drafts:
      ece: expected calibration error of survival.
      auc: how well survival ranks.
      auc_conditional: how well the draft's own logit ranks where all before it were
        accepted; no temperature or bias changes it.
      brier: Brier score of survival.
      survived: rate at which the first drafts were all accepted.
      rounds: rounds in which that is known.
      curve: reliability by bin, see `Reliability`.
    """
    forecast_NG = np.cumprod(_sigmoid(logits_NG), axis=1)
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
        figures["ece"].append(float(calibration_error(forecast_N[None], survived_N)[0]))
        figures["auc"].append(roc_auc(forecast_N, survived_N))
        figures["auc_conditional"].append(
            roc_auc(logits_NG[own_N, k], survived_NG[own_N, k])
        )
        figures["brier"].append(brier_score(forecast_N, survived_N))
        figures["survived"].append(float(survived_N.mean()))
        figures["rounds"].append(int(known_N.sum()))
        figures["curve"].append(asdict(Reliability.of(forecast_N, survived_N)))
        reached_N = reached_N & survived_NG[:, k]
    return figures
