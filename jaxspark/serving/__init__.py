"""Serving: the wire that OpenAI's clients speak, around an engine's tokens.

A client's body is read (`ChatRequest.read`), understood (`prepare_chat`), and becomes
`Demand`s on an engine. What the engine tells comes back as events, from which an
`Assembler` makes chunks and the answer. Nothing here computes.
"""

try:
    import pydantic  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "serving needs the package pydantic: pip install 'jaxspark[serve]'"
    ) from error

from jaxspark.serving.chat_answer import ChatAssembler
from jaxspark.serving.chat_request import ChatRequest
from jaxspark.serving.completion_answer import CompletionAssembler
from jaxspark.serving.demands import Demand, Extras, Grammar, ToolUse
from jaxspark.serving.engine_events import (
    Ended,
    EngineEvent,
    Prefilled,
    Sampled,
    Tokens,
)
from jaxspark.serving.errors import ApiError
from jaxspark.serving.other_requests import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from jaxspark.serving.prepared import Prepared, prepare_chat, prepare_completion
from jaxspark.serving.responses import DONE, event
from jaxspark.serving.served import Served

__all__ = [
    "DONE",
    "ApiError",
    "ChatAssembler",
    "ChatRequest",
    "CompletionAssembler",
    "CompletionRequest",
    "Demand",
    "DetokenizeRequest",
    "Ended",
    "EngineEvent",
    "Extras",
    "Grammar",
    "Prefilled",
    "Prepared",
    "Sampled",
    "Served",
    "TokenizeRequest",
    "Tokens",
    "ToolUse",
    "event",
    "prepare_chat",
    "prepare_completion",
]
