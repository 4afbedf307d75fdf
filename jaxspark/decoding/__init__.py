"""Propose, schedule, verify, commit: the compiled decode loop and `generate`."""

from jaxspark.decoding.generate import Completion, generate
from jaxspark.decoding.round import DecodeOptions, decode, decode_round, prefill
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule import Fixed, Scheduler
from jaxspark.decoding.state import DecodeState, init_state
from jaxspark.decoding.stream import Request, generate_stream

__all__ = [
    "Completion",
    "DecodeOptions",
    "DecodeState",
    "Fixed",
    "Request",
    "Sampling",
    "Scheduler",
    "decode",
    "decode_round",
    "generate",
    "generate_stream",
    "init_state",
    "prefill",
]
