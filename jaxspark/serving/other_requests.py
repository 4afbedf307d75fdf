"""`POST /v1/completions`, `/tokenize` and `/detokenize`: what a client asks for."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from jaxspark.serving.chat_request import ChatMessage, Tool
from jaxspark.serving.fields import (
    MOST_CHOICES,
    MOST_LISTED,
    MOST_LOG_PROBS,
    SamplingFields,
    Text,
    Token,
    Wire,
)


def _prompts(value: Any) -> Any:
    """One prompt, a text or tokens, as a list of it."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and not isinstance(value[0], str | list):
        return [value]
    return value


def _is_text(value: Any) -> str:
    return "@text" if isinstance(value, str) else "@tokens"


type Prompt = Annotated[
    Annotated[str, Tag("@text")]
    | Annotated[list[Token], Field(min_length=1), Tag("@tokens")],
    Discriminator(_is_text),
]


class CompletionRequest(SamplingFields):
    """Prompts, and how they are continued."""

    prompt: Annotated[
        list[Prompt],
        BeforeValidator(_prompts),
        Field(min_length=1, max_length=MOST_CHOICES),
    ]
    # 0 only tells of a prompt, which must be echoed.
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBS)


class TokenizeRequest(Wire):
    """A text or a conversation whose tokens are wanted."""

    model: Text | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MOST_LISTED)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Wire):
    """Tokens whose text is wanted."""

    model: Text | None = None
    tokens: list[Token]
