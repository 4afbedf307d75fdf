"""What clients are sent, in OpenAI's form with vLLM's extras.

Fields that were not set are not sent; null is said where OpenAI says it.
"""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "abort"]
# JSON has no infinity; OpenAI's least log-probability.
LEAST_LOG_PROB = -9999.0


class Sent(BaseModel):
    """An object that is sent."""

    def json_text(self) -> str:
        """As JSON."""
        return self.model_dump_json(exclude_unset=True)

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return self.model_dump(exclude_unset=True)


def event(data: Sent | dict[str, Any] | str) -> str:
    """A server-sent event (WHATWG HTML, 9.2)."""
    if isinstance(data, dict):
        data = Body(**data)
    return f"data: {data.json_text() if isinstance(data, Sent) else data}\n\n"


DONE = event("[DONE]")


class Body(Sent, extra="allow"):
    """Any object."""


class PromptDetails(Sent):
    """Of a prompt's tokens."""

    cached_tokens: int


class CompletionDetails(Sent):
    """Of an output's tokens."""

    reasoning_tokens: int


class Usage(Sent):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogProb(Sent):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogProb(TopLogProb):
    """A token of the output."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(Sent):
    """Log-probabilities of a chat's output."""

    content: list[TokenLogProb]


class CompletionLogProbs(Sent):
    """Log-probabilities of a completion's output, and of its echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class SentFunction(Sent):
    """What is called; in a chunk, more of it."""

    name: str | None = None
    arguments: str | None = None


class SentCall(Sent):
    """A call of a tool; in a chunk, more of it."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: SentFunction | None = None


class Message(Sent):
    """An answer, or in a chunk more of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[SentCall] | None = None


class ChatChoice(Sent):
    """One answer of several."""

    index: int
    message: Message | None = None
    delta: Message | None = None
    logprobs: ChatLogProbs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    drafted: list[bool] | None = None


class CompletionChoice(Sent):
    """One continuation of several."""

    index: int
    text: str
    logprobs: CompletionLogProbs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    drafted: list[bool] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Answer(Sent):
    """What both kinds of answers, and their chunks, begin with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None = None
    usage: Usage | None = None


class ChatAnswer(Answer):
    """A chat's answer, or a chunk of it."""

    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionAnswer(Answer):
    """A completion's answer, or a chunk of it."""

    choices: list[CompletionChoice]
