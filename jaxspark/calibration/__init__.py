"""Are confidences right, what does a round cost: what scheduling rests on."""

from jaxspark.calibration.measuring import measure_costs, with_measured_costs
from jaxspark.calibration.profile import CostProfile
from jaxspark.calibration.rounds import Rounds, record_rounds
from jaxspark.calibration.temperatures import assess, fit_temperatures

__all__ = [
    "CostProfile",
    "Rounds",
    "assess",
    "fit_temperatures",
    "measure_costs",
    "record_rounds",
    "with_measured_costs",
]
