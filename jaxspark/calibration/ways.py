"""Ways to scale confidences, from none to all that `temperatures` has, side by side."""

from collections.abc import Mapping

from jaxspark.calibration.rounds import Rounds, typical_blocks
from jaxspark.calibration.temperatures import Scaling, assess, fit_temperatures
from jaxspark.decoding import Calibration
from jaxspark.decoding.couplings import Coupling

WAYS: dict[str, dict[str, bool]] = {
    "temperatures": {},
    "biases": {"biased": True},
    "sharpness": {"biased": True, "sharpened": True},
}


def fit_all(fit: Rounds, test: Rounds) -> tuple[dict[str, Scaling], dict[str, dict]]:
    """Every way, and confidences as they are, fitted to some rounds.

    Returns:
      scalings: by way, "before" first.
      figures: by way what `assess` says of them on the other rounds.
    """
    block_length = fit.confidence_NG.shape[1]
    scalings = {"before": Scaling.identity(block_length)} | {
        way: fit_temperatures(fit, **options) for way, options in WAYS.items()
    }
    return scalings, {way: assess(test, each) for way, each in scalings.items()}


def as_calibration(
    coupling: Coupling, fitted: Mapping[float, tuple[Scaling, Rounds]]
) -> Calibration:
    """What decoding needs: by sampling temperature a scaling and what it was fitted to.

    Typical blocks of those rounds stand for a request that has had none.
    """
    rows = [scaling.lists() for scaling, _ in fitted.values()]
    usual = (
        typical_blocks(scaling.survival(rounds)).tolist()
        for scaling, rounds in fitted.values()
    )
    return Calibration(
        coupling=coupling,
        fitted_at=tuple(fitted),
        temperatures=tuple(tuple(row["temperatures"]) for row in rows),
        biases=tuple(tuple(row["biases"]) for row in rows),
        weights=tuple(tuple(row["weights"]) for row in rows),
        usual=tuple(tuple(map(tuple, blocks)) for blocks in usual),
    )
