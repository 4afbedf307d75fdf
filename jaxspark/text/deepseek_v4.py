"""DeepSeek-V4's conversations as prompts; its checkpoints ship no chat template.

    BEGIN system USER question ASSISTANT <think>reasoning</think>answer END USER ...

Without line breaks between turns, and with these rules (`encoding/README.md` of the
released checkpoints):

- There is no role for tools: their results are parts of a user's turn, in the order in
  which they were called for. Neighbouring user messages are one turn.
- Without reasoning, `</think>` stands right behind ASSISTANT.
- Reasoning of turns before the last user's is left out, and so are developers' messages
  there, unless the conversation has tools, whose use needs it all.
- Arguments of a call that are no JSON are one parameter, `arguments`.
- An effort is a text in front of everything.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxspark.text.deepseek_v4_words import (
    ASSISTANT,
    BEGIN,
    EFFORTS,
    END,
    REMINDER,
    RESPONSE_FORMAT,
    TOOLS,
    USER,
)
from jaxspark.text.dsml import MARK

Message = Mapping[str, Any]
_Turn = dict[str, Any]
# Fields of the released encoder's messages that would change the prompt: arguments say
# what the first three do, and the tokens of quick tasks are written by nobody here.
_REFUSED = ("tools", "response_format", "wo_eos", "content_blocks", "task")


def encode_deepseek_v4(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
    thinking: bool = True,
    enable_thinking: bool = True,
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    edition: str = "0731",
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
) -> str:
    """The prompt of a conversation, with control tokens as text.

    Args:
      messages: objects in OpenAI's form, with roles system, user, assistant, tool,
        developer or latest_reminder; an assistant's may have `reasoning_content` (or
        `reasoning`) and `tool_calls`.
      tools: schemas in OpenAI's form; they go to the first system message, and make one
        if there is none.
      response_format: a JSON schema to name there as well.
      thinking: whether the assistant reasons.
      enable_thinking: the same, as templates of other models call it.
      reasoning_effort: "low", "high" or "max", or one of OpenAI's other words; "none"
        is the same as no thinking.
      drop_thinking: whether reasoning before the last user's turn is left out.
      edition: whose words the effort has, "0731" (also of later checkpoints) or
        "preview".
      add_generation_prompt: whether the assistant's turn is opened at the end, if it is
        not an assistant's already.
      continue_final_message: whether the final, an assistant's, is left open; a text
        names the field to continue, "reasoning_content" or "content".

    Raises:
      ValueError: messages or options that have no encoding; says which.
    """
    efforts = _choice("edition", edition, EFFORTS)
    thinking = thinking and enable_thinking and reasoning_effort != "none"
    opening = ""
    if thinking and reasoning_effort is not None:
        opening = _choice("reasoning_effort", reasoning_effort, efforts)
    turns = _turns(_with_system(messages, tools, response_format))
    last_user = max(
        (i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")),
        default=-1,
    )
    drop = thinking and drop_thinking and not tools
    pieces = [BEGIN, opening]
    for index, turn in enumerate(turns):
        if drop and turn["role"] == "developer" and index < last_user:
            continue
        thinks = thinking and not (drop and index <= last_user)
        is_open = bool(continue_final_message) and index == len(turns) - 1
        field = continue_final_message if is_open else ""
        pieces.append(_written(turn, thinks=thinks, left_open=field))
    final = turns[-1]["role"] if turns else ""
    if continue_final_message and final != "assistant":
        raise ValueError(
            f"the final message, of the role {final!r}, is to be continued; expected "
            "an assistant's"
        )
    if add_generation_prompt and not continue_final_message and final != "assistant":
        pieces.append(ASSISTANT + ("<think>" if thinking else "</think>"))
    return "".join(pieces)


def _choice[T](name: str, value: str, among: Mapping[str, T]) -> T:
    if value not in among:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(among)}")
    return among[value]


def _with_system(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    response_format: Mapping[str, Any] | None,
) -> list[Message]:
    """The messages, tools and formats being told in the first system's."""
    blocks = []
    if tools:
        schemas = [_function(tool, f"tool {i}") for i, tool in enumerate(tools)]
        blocks.append(TOOLS % "\n".join(map(_json, schemas)))
    if response_format:
        blocks.append(RESPONSE_FORMAT % _json(response_format))
    found = list(messages)
    if not blocks:
        return found
    place = next((i for i, m in enumerate(found) if m["role"] == "system"), None)
    if place is None:
        found, place = [{"role": "system", "content": ""}, *found], 0
    text = "\n\n".join([_text(found[place], place), *blocks])
    found[place] = {**found[place], "content": text}
    return found


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    """The messages, those of users and tools folded into users' turns of parts."""
    turns: list[_Turn] = []
    order: dict[str, int] = {}
    for index, message in enumerate(messages):
        if given := [name for name in _REFUSED if message.get(name)]:
            raise ValueError(
                f"message {index} has the field {given[0]!r}, which is not read here; "
                "tools, response_format and continue_final_message are arguments"
            )
        role, text = message["role"], _text(message, index)
        if role in ("user", "tool"):
            if not turns or turns[-1]["role"] != "user":
                turns.append({"role": "user", "parts": [], "order": order})
            call = message.get("tool_call_id") or "" if role == "tool" else None
            turns[-1]["parts"].append((call, text))
        elif role == "assistant":
            calls = message.get("tool_calls") or []
            if calls:
                order = {call.get("id"): place for place, call in enumerate(calls)}
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            turns.append(
                {
                    "role": role,
                    "text": text,
                    "reasoning": reasoning or "",
                    "calls": _calls(calls, f"message {index}"),
                }
            )
        elif role in ("system", "developer", "latest_reminder"):
            turns.append({"role": role, "text": text})
        else:
            raise ValueError(
                f"message {index} has the role {role!r}; DeepSeek-V4 knows system, "
                "user, assistant, tool, developer and latest_reminder"
            )
    return turns


def _written(turn: _Turn, *, thinks: bool, left_open: bool | str) -> str:
    """A turn as the model sees it.

    Args:
      turn: what is said.
      thinks: whether an assistant's turn shows its reasoning.
      left_open: whether it is continued, or after which field.
    """
    role = turn["role"]
    if role == "user":
        return USER + "\n\n".join(_parts(turn["parts"], turn["order"]))
    if role != "assistant":
        before = {"developer": USER, "latest_reminder": REMINDER}
        return before.get(role, "") + turn["text"]
    text = ASSISTANT
    if thinks:
        text += "<think>" + turn["reasoning"]
        if left_open == "reasoning_content":
            return text
    text += "</think>" + turn["text"]
    if left_open:
        return text
    return text + turn["calls"] + END


def _parts(parts: list[tuple[str | None, str]], order: Mapping[str, int]) -> list[str]:
    """A user's texts and results; the latter in the order of the calls."""
    results = iter(
        sorted(
            ((call, text) for call, text in parts if call is not None),
            key=lambda result: order.get(result[0], 0),
        )
    )
    return [
        text if call is None else f"<tool_result>{next(results)[1]}</tool_result>"
        for call, text in parts
    ]


def _calls(calls: Sequence[Mapping[str, Any]], where: str) -> str:
    """Calls in DSML, behind the text of their turn."""
    if not calls:
        return ""
    written = []
    for place, call in enumerate(calls):
        function = _function(call, f"{where}: call {place}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {"arguments": arguments}
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"{where}: the arguments of call {place} are {arguments!r}, expected a "
                "JSON object"
            )
        parameters = "\n".join(_parameter(*each) for each in arguments.items())
        written.append(
            f'<{MARK}invoke name="{function["name"]}">\n{parameters}\n</{MARK}invoke>'
        )
    inside = "\n".join(written)
    return f"\n\n<{MARK}tool_calls>\n{inside}\n</{MARK}tool_calls>"


def _parameter(name: str, value: Any) -> str:
    is_text = isinstance(value, str)
    return (
        f'<{MARK}parameter name="{name}" string="{_json(is_text)}">'
        f"{value if is_text else _json(value)}</{MARK}parameter>"
    )


def _function(owner: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What a tool or a call says of its function."""
    function = owner.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise ValueError(f"{where} is {owner!r}, expected a 'function' with a 'name'")
    return function


def _text(message: Message, index: int) -> str:
    """A message's content, the texts of its parts joined."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            raise ValueError(
                f"message {index} has a part {part!r}; DeepSeek-V4 reads text only"
            )
        texts.append(part["text"])
    return "\n\n".join(texts)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
