"""Serving: an engine, and the wire that OpenAI's clients speak around its tokens.

A client's body is read (`ChatRequest.read`), understood (`prepare_chat`), and becomes
`Demand`s on an `Engine`. What the engine tells comes back as events, from which an
`Assembler` makes chunks and the answer. `jaxspark.serving.app` puts HTTP around it.
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
from jaxspark.serving.conversation import ToolUse
from jaxspark.serving.demands import Demand
from jaxspark.serving.engine import Engine
from jaxspark.serving.engine_events import (
    Ended,
    EngineEvent,
    Prefilled,
    Sampled,
    Tokens,
)
from jaxspark.serving.errors import ApiError
from jaxspark.serving.observing import Observer, Stats
from jaxspark.serving.other_requests import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from jaxspark.serving.pace import Pace
from jaxspark.serving.prepared import Prepared, prepare_chat, prepare_completion
from jaxspark.serving.responses import DONE, event
from jaxspark.serving.served import Served
from jaxspark.serving.stream import Stream
from jaxspark.serving.waiting import Overloaded, QueueLimits

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
    "Engine",
    "EngineEvent",
    "Observer",
    "Overloaded",
    "Pace",
    "Prefilled",
    "Prepared",
    "QueueLimits",
    "Sampled",
    "Served",
    "Stats",
    "Stream",
    "TokenizeRequest",
    "Tokens",
    "ToolUse",
    "event",
    "prepare_chat",
    "prepare_completion",
]
