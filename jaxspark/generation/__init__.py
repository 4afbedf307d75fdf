"""Requests in, completions out: hosts of the compiled decode loop."""

from jaxspark.generation.batch import ContinuousBatch, Update
from jaxspark.generation.completion import Completion
from jaxspark.generation.generate import generate, generate_stream
from jaxspark.generation.request import Request, RequestError, SamplingParams

__all__ = [
    "Completion",
    "ContinuousBatch",
    "Request",
    "RequestError",
    "SamplingParams",
    "Update",
    "generate",
    "generate_stream",
]
