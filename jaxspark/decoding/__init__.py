"""Propose, schedule, verify, commit: the compiled decode loop."""

from jaxspark.decoding.adjustments import Adjustment, AdjustmentLimits
from jaxspark.decoding.admission import Admission
from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.costs import CostCurve, Costs
from jaxspark.decoding.estimator import Estimator
from jaxspark.decoding.forecast import Forecast, Verification
from jaxspark.decoding.lifecycle import admit, init_state, release
from jaxspark.decoding.likeliest import LikeliestLimits
from jaxspark.decoding.loop import decode, draft, verify
from jaxspark.decoding.options import DecodeOptions
from jaxspark.decoding.prefilling import prefill
from jaxspark.decoding.round import decode_round
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule import (
    Causal,
    Fixed,
    Free,
    Lagged,
    Scheduler,
    Threshold,
    parse_schedule,
)
from jaxspark.decoding.snapshots import put_rings, take_rings
from jaxspark.decoding.state import DecodeState, Phase

__all__ = [
    "Adjustment",
    "AdjustmentLimits",
    "Admission",
    "Calibration",
    "Causal",
    "CostCurve",
    "Costs",
    "DecodeOptions",
    "DecodeState",
    "Estimator",
    "Fixed",
    "Forecast",
    "Free",
    "Lagged",
    "LikeliestLimits",
    "Phase",
    "Sampling",
    "Scheduler",
    "Threshold",
    "Verification",
    "admit",
    "decode",
    "decode_round",
    "draft",
    "init_state",
    "parse_schedule",
    "prefill",
    "put_rings",
    "release",
    "take_rings",
    "verify",
]
