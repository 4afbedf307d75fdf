"""Propose, schedule, verify, commit: the compiled decode loop and `generate`."""

from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.costs import CostCurve, Costs
from jaxspark.decoding.generate import Completion, generate
from jaxspark.decoding.outlook import Outlook
from jaxspark.decoding.round import DecodeOptions, decode, decode_round, prefill
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
from jaxspark.decoding.state import DecodeState, init_state
from jaxspark.decoding.stream import Request, generate_stream

__all__ = [
    "Calibration",
    "Causal",
    "Completion",
    "CostCurve",
    "Costs",
    "DecodeOptions",
    "DecodeState",
    "Fixed",
    "Free",
    "Lagged",
    "Outlook",
    "Request",
    "Sampling",
    "Scheduler",
    "Threshold",
    "decode",
    "decode_round",
    "generate",
    "generate_stream",
    "init_state",
    "parse_schedule",
    "prefill",
]
