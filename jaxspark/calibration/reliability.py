"""How good a forecast of acceptance is: calibration, ranking, and the error of both.

A forecast p of an event y is *calibrated* when the event happens at a rate p wherever p
was said (expected calibration error, Guo et al. 2017); it *ranks* well when events get
higher forecasts than non-events (area under the ROC curve); the Brier score is the mean
of (p - y)^2 and wants both.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

BINS = 20


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What was forecast and what happened, by bin of the forecast (equal widths).

    Attributes:
      forecast: mean forecast of each bin that has any.
      happened: rate of events in it.
      count: forecasts in it.
    """

    forecast: list[float]
    happened: list[float]
    count: list[int]

    @classmethod
    def of(
        cls, forecast_N: Float[np.ndarray, " N"], happened_N: Bool[np.ndarray, " N"]
    ) -> "Reliability":
        """The reliability curve of forecasts in [0, 1]."""
        count, forecast, happened = _bins(forecast_N[None], happened_N)
        used = count[0] > 0
        return cls(
            forecast=(forecast[0, used] / count[0, used]).tolist(),
            happened=(happened[0, used] / count[0, used]).tolist(),
            count=count[0, used].astype(int).tolist(),
        )


def calibration_error(
    forecast_KN: Float[np.ndarray, "K N"], happened_N: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, " K"]:
    """Expected calibration error of K rival forecasts of the same events.

    The mean over forecasts of |mean forecast - rate of events| in their bin; NaN
    without events to judge by.
    """
    count, forecast, happened = _bins(forecast_KN, happened_N)
    if not len(happened_N):
        return np.full(len(forecast_KN), np.nan)
    return np.abs(forecast - happened).sum(axis=1) / len(happened_N)


def _bins(forecast_KN, happened_N):
    """Forecasts, their sum and the number of events in each bin, [K, BINS] each."""
    rivals = len(forecast_KN)
    bin_KN = np.clip((forecast_KN * BINS).astype(int), 0, BINS - 1)
    bin_KN += BINS * np.arange(rivals)[:, None]

    def sums(weight_KN=None):
        weights = None if weight_KN is None else np.ravel(weight_KN)
        total = np.bincount(bin_KN.ravel(), weights, minlength=rivals * BINS)
        return total.reshape(rivals, BINS)

    happened_KN = np.broadcast_to(happened_N.astype(float), forecast_KN.shape)
    return sums(), sums(forecast_KN), sums(happened_KN)


def roc_auc(
    forecast_N: Float[np.ndarray, " N"], happened_N: Bool[np.ndarray, " N"]
) -> float:
    """Probability that an event got a higher forecast than a non-event.

    Equal forecasts count half; NaN where only one of the two kinds is seen.
    """
    events = int(happened_N.sum())
    others = len(happened_N) - events
    if not events or not others:
        return float("nan")
    _, place_N, count = np.unique(forecast_N, return_inverse=True, return_counts=True)
    # Mean rank of each distinct forecast (Mann and Whitney 1947).
    rank = np.cumsum(count) - (count - 1) / 2
    above = rank[place_N][happened_N].sum() - events * (events + 1) / 2
    return float(above / (events * others))


def brier_score(
    forecast_N: Float[np.ndarray, " N"], happened_N: Bool[np.ndarray, " N"]
) -> float:
    """Mean squared difference between forecast and event."""
    return float(np.mean((forecast_N - happened_N) ** 2)) if len(forecast_N) else np.nan
