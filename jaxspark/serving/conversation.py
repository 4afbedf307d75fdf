"""Conversations: from messages to tokens, and which tools may be called."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxspark.errors import CheckpointError
from jaxspark.serving.chat_request import ChatMessage, ChatRequest, Tool
from jaxspark.serving.errors import ApiError, wrong
from jaxspark.serving.other_requests import TokenizeRequest
from jaxspark.serving.served import Served


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Which tools may, or must, be called.

    Attributes:
      mode: "auto" leaves it to the model; "required" wants some call, "named" that of
        `name`.
      name: the one tool that must be called.
      tools: schemas in OpenAI's form.
      parallel: whether several may be called in one answer.
    """

    mode: Literal["auto", "required", "named"]
    name: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    parallel: bool = True


def tool_use(request: ChatRequest, served: Served) -> ToolUse | None:
    """Which tools may be called; None if none may.

    Raises:
      ApiError: a choice among tools that are not there, or a model without tools.
    """
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ApiError(f"tools has {repeated[0]!r} more than once", param="tools")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(
                "tool_choice wants a call, and there are no tools; give some",
                param="tool_choice",
            )
        return None
    if choice == "none":
        return None
    if served.calls is None:
        raise ApiError(
            f"tools are given, and {served.name} is not known to call any",
            param="tools",
        )
    named = None if choice is None or isinstance(choice, str) else choice.function.name
    if named is not None and named not in names:
        raise wrong("tool_choice", named, f"one of the tools, {', '.join(names)}")
    return ToolUse(
        mode="named" if named else "required" if choice == "required" else "auto",
        name=named,
        tools=tuple(_schema(tool) for tool in tools),
        parallel=request.parallel_tool_calls is not False,
    )


def chat_ids(request: ChatRequest | TokenizeRequest, served: Served) -> list[int]:
    """A conversation's tokens.

    Raises:
      ApiError: the model's template does not take it.
    """
    variables = dict(request.chat_template_kwargs or {})
    if isinstance(request, ChatRequest) and request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
        if request.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    if taken := served.tokenizer.reserved & variables.keys():
        raise ApiError(
            f"chat_template_kwargs has {min(taken)!r}, which clients cannot set; "
            "expected variables of the template's own",
            param="chat_template_kwargs",
        )
    resume = bool(request.continue_final_message)
    if resume and request.add_generation_prompt:
        raise ApiError(
            "add_generation_prompt and continue_final_message are both true; an answer "
            "is begun or continued",
            param="continue_final_message",
        )
    try:
        ids = served.tokenizer.chat(
            [as_plain(each, i) for i, each in enumerate(request.messages or [])],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=resume,
            tools=[_schema(tool) for tool in request.tools or []] or None,
            **variables,
        )
    except (CheckpointError, ValueError) as error:
        raise ApiError(str(error), param="messages") from error
    served.check_tokens("messages", ids)
    return ids


def as_plain(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as templates know it: one text, arguments as objects.

    Arguments that broke off, as they do where an output was too long, stay text.
    "developer" is OpenAI's newer word for "system". Templates know only the older one,
    and many would leave such a message out without a word.

    Raises:
      ApiError: the arguments of a call are JSON, but no object.
    """
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role}
    if message.content is not None:
        plain["content"] = text_of(message)
    reasoning = message.reasoning_content or message.reasoning
    for key, value in (
        ("name", message.name),
        ("tool_call_id", message.tool_call_id),
        ("reasoning_content", reasoning),
    ):
        if value is not None:
            plain[key] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(
                        call.function.arguments,
                        f"messages[{index}].tool_calls[{place}].function.arguments",
                    ),
                },
            }
            for place, call in enumerate(message.tool_calls)
        ]
    return plain


def text_of(message: ChatMessage) -> str:
    """What a message says, its parts as one text."""
    content = message.content or ""
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content


def _arguments(text: str, param: str) -> dict[str, Any] | str:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict):
        raise wrong(param, text, "a JSON object in a string")
    return value


def _schema(tool: Tool) -> dict[str, Any]:
    return tool.model_dump(exclude_none=True)
