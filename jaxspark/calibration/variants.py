"""Variants of confidence scaling, fitted and assessed side by side."""

from collections.abc import Mapping

from jaxspark.calibration.rounds import Rounds, typical_blocks
from jaxspark.calibration.temperatures import Scaling, assess, fit_temperatures
from jaxspark.decoding import Calibration
from jaxspark.decoding.couplings import Coupling

VARIANTS: dict[str, dict[str, bool]] = {
    "temperatures": {},
    "biases": {"biased": True},
    "certainty": {"biased": True, "with_certainty": True},
}


def fit_variants(
    fit: Rounds, test: Rounds
) -> tuple[dict[str, Scaling], dict[str, dict]]:
    """Fits every variant to some rounds and assesses it on others.

    Returns:
      scalings: by variant; "before" leaves confidences as they are.
      figures: by variant, of `assess`.
    """
    block_length = fit.confidence_NG.shape[1]
    scalings = {"before": Scaling.identity(block_length)} | {
        name: fit_temperatures(fit, **options) for name, options in VARIANTS.items()
    }
    return scalings, {name: assess(test, each) for name, each in scalings.items()}


def as_calibration(
    coupling: Coupling, fitted: Mapping[float, tuple[Scaling, Rounds]]
) -> Calibration:
    """The calibration that decoding uses.

    Args:
      coupling: "rejection" or "gumbel".
      fitted: by sampling temperature, a scaling and the rounds it was fitted to;
        typical blocks of them stand for requests that have had no round.
    """
    rows = [scaling.lists() for scaling, _ in fitted.values()]
    blocks = (
        typical_blocks(scaling.survival(rounds)).tolist()
        for scaling, rounds in fitted.values()
    )
    return Calibration(
        coupling=coupling,
        fitted_at=tuple(fitted),
        temperatures=tuple(tuple(row["temperatures"]) for row in rows),
        biases=tuple(tuple(row["biases"]) for row in rows),
        weights=tuple(tuple(row["weights"]) for row in rows),
        prior_blocks=tuple(tuple(map(tuple, each)) for each in blocks),
    )
