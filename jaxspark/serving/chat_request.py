"""`POST /v1/chat/completions`: what a client asks for."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from jaxspark.serving.fields import (
    MOST_LISTED,
    MOST_LOG_PROBS,
    SamplingFields,
    Text,
    Wire,
)

type FunctionName = Annotated[str, StringConstraints(pattern=r"^[\w.:/-]{1,128}$")]
type Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Wire):
    """A part of a message; others than text are refused."""

    type: Literal["text"]
    text: str


class CalledFunction(Wire):
    """What was called, with what."""

    name: FunctionName
    arguments: str


class ToolCall(Wire):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


def _is_text(value: Any) -> str:
    return "@text" if isinstance(value, str) else "@parts"


type MessageContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextPart], Tag("@parts")],
    Discriminator(_is_text),
]


class ChatMessage(Wire):
    """A message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: MessageContent | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Clients send back what they got, with fields that say nothing.
    refusal: str | None = None
    annotations: list[Any] | None = None


class Function(Wire):
    """A function that may be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    """A function by name."""

    name: FunctionName


class NamedTool(Wire):
    """A tool by name."""

    type: Literal["function"]
    function: NamedFunction


def _is_word(value: Any) -> str:
    return "@word" if isinstance(value, str) else "@named"


type ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@word")]
    | Annotated[NamedTool, Tag("@named")],
    Discriminator(_is_word),
]


class ChatRequest(SamplingFields):
    """A conversation, and how it is continued."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBS)
    tools: list[Tool] | None = Field(None, max_length=MOST_LISTED)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    # Others are refused.
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
