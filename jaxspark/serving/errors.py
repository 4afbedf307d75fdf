"""What goes wrong, in the form in which OpenAI's clients expect to be told.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Messages name the field, the value and what would be right.
"""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

# Fields of OpenAI's that are refused by name, unless they say what is done anyway,
# because ignoring them would change what a client gets without a word; with what to do
# instead.
REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use structured_outputs with json",
    "guided_regex": "use structured_outputs with regex",
    "guided_choice": "use structured_outputs with choice",
    "guided_grammar": "use structured_outputs with grammar",
    "audio": "only text can be generated",
    "modalities": "only text can be generated",
    "prediction": "drafts are the server's own",
    "web_search_options": "the server has no search; offer one as a tool",
    "suffix": "text cannot be filled in, only continued",
    "best_of": "ask for n answers and choose",
    "use_beam_search": "ask for n answers and choose",
    "truncate_prompt_tokens": "shorten the prompt before it is sent",
    "chat_template": "the model's own is used; chat_template_kwargs are its variables",
    "verbosity": "say in the prompt how long answers should be",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
      status: of HTTP.
      message: what was wrong, and what would be right.
      type: OpenAI's class of it.
      param: the field.
      code: OpenAI's word for it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(param: str, value: Any, expected: str) -> ApiError:
    """A field whose value cannot be."""
    return ApiError(f"{param} is {shown(value)}; expected {expected}", param=param)


def shown(value: Any) -> str:
    """A value as errors show it: never long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def explained(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """A body that does not fit its schema, by its first fault."""
    details = error.errors(include_url=False)
    first = details[0]
    param = path(first["loc"])
    name = str(first["loc"][-1]) if first["loc"] else ""
    code = None
    if first["type"] == "extra_forbidden":
        code = "unknown_parameter"
        message = f"{param}: there is no such field" + _unknown(name, schema, first)
    elif first["type"] == "missing":
        code = "missing_required_parameter"
        message = f"{param}: the field is missing"
    elif first["type"] == "json_invalid":
        message, param = f"the body is no JSON: {first['msg']}", ""
    else:
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        said = said[:1].lower() + said[1:]
        message = f"{param or 'the body'}: {said}, got {shown(first['input'])}"
        if advice := REFUSED.get(str(first["loc"][0]) if first["loc"] else ""):
            message += f"; {advice}"
    if len(details) > 1:
        others = dict.fromkeys(path(each["loc"]) for each in details[1:])
        others.pop(param, None)
        if others:
            message += f" (also wrong: {', '.join([*others][:5])})"
    return ApiError(message, param=param or None, code=code)


def _unknown(name: str, schema: type[BaseModel], detail: Any) -> str:
    if len(detail["loc"]) > 1:
        return ""
    if name in REFUSED:
        return f" here; {REFUSED[name]}"
    close = difflib.get_close_matches(name, schema.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def path(loc: tuple[int | str, ...]) -> str:
    """A place in a body, as in `messages[0].content`."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("@"):  # The alternatives of a union.
            name = part if len(part) <= 60 else f"{part[:60]}..."
            text += f".{name}" if text else name
    return text
