"""What an estimator has learned, for people: coefficients, and how right it was."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxspark.calibration.reliability import calibration_error
from jaxspark.decoding.estimator import EstimatorState

REGIMES = ("greedy", "sampled")


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What was learned of one kind of slots.

    Attributes:
      confidence: what the logit of confidence counts for.
      certainty: what draft certainty does.
      intercepts: what is added, by place in a block.
    """

    confidence: float
    certainty: float
    intercepts: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was learned of acceptance, as of the last fit.

    Attributes:
      blocks: remembered.
      regressions: by kind of slots, "greedy" and "sampled".
      calibration_error: expected calibration error of survival in the blocks
        remembered, each forecast by what was known before it, in the mean over places
        where anything was verified; None without blocks.
    """

    blocks: int
    regressions: dict[str, Regression]
    calibration_error: float | None

    @classmethod
    def of(cls, state: EstimatorState) -> "Estimate":
        """Of a state, as far as it is on this process; waits for the device."""
        state = jax.tree.map(_here, state)
        regressions = {}
        for regime, (shared_X, places_G) in zip(
            REGIMES, zip(state.shared_BRX[0], state.places_BRG[0])
        ):
            confidence, certainty, intercept = shared_X.tolist()
            regressions[regime] = Regression(
                confidence=confidence,
                certainty=certainty,
                intercepts=tuple((intercept + places_G).tolist()),
            )
        judged_N = state.judged_Bn.ravel()
        played_N = judged_N > 0
        judged_N, accepted_N = judged_N[played_N], state.accepted_Bn.ravel()[played_N]
        block = state.forecast_BnG.shape[-1]
        forecast_NG = state.forecast_BnG.reshape(-1, block)[played_N]
        survival_NG = np.cumprod(forecast_NG, axis=1)
        draft_G = np.arange(block)
        survived_NG = draft_G < accepted_N[:, None]
        rejected_N1 = (accepted_N < judged_N)[:, None]
        known_NG = rejected_N1 | (draft_G < judged_N[:, None])
        errors = [
            calibration_error(survival_NG[known_N, j][None], survived_NG[known_N, j])[0]
            for j, known_N in enumerate(known_NG.T)
            if known_N.any()
        ]
        return cls(
            blocks=len(judged_N),
            regressions=regressions,
            calibration_error=float(np.mean(errors)) if errors else None,
        )


def _here(x: jax.Array) -> np.ndarray:
    """The part of an array that this process has, by slots."""
    if x.is_fully_addressable:
        return np.asarray(x)
    # Shards along other axes than that of slots hold the same.
    shards = {each.index[0].start: each.data for each in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
