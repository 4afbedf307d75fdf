"""Calls of tools as Lark, in the forms that `jaxspark.text.formats` reads.

What frames a call is written as models of its family were trained to; the arguments
obey the tool's schema. A schema's references count from its own root, so each is a
grammar of its own and not a part of a larger one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxspark.grammars.grammar import Calls
from jaxspark.grammars.matcher import GrammarError
from jaxspark.grammars.vocabulary import control, literal, quoted
from jaxspark.text.dsml import MARK

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Makes a schema what llguidance is given.
Prepare = Callable[[Any], dict[str, Any]]


def calls_lark(calls: Calls, tokens: "LLTokenizer", prepare: Prepare) -> str:
    """A grammar of at least one call.

    Args:
      calls: of which tools, in which form.
      tokens: the target's; names of control tokens are these tokens.
      prepare: applied to every schema.

    Raises:
      GrammarError: no tools, or an unknown form.
    """
    functions = [tool["function"] for tool in calls.tools]
    if not functions:
        raise GrammarError("calls: there are no tools to call")
    if calls.form == "deepseek_v4":
        return _dsml(functions, calls.parallel, tokens, prepare)
    if calls.form == "hermes":
        frame = [
            control(tokens, tag) or quoted(tag)
            for tag in ("<tool_call>", "</tool_call>")
        ]
        one = f"{frame[0]} NEWLINE any NEWLINE {frame[1]}"
        start, key = f"{one} (NEWLINE {one})*", "arguments"
    elif calls.form == "llama3":
        one, key = "any", "parameters"
        start = f"{one} (/; ?/ {one})*"
    else:
        raise GrammarError(f"calls: nothing is known of the form {calls.form!r}")
    lines = [f"start: {start if calls.parallel else one}", "NEWLINE: /\\n?/"]
    lines.append(f"any: {_either(functions, 'call')}")
    for place, function in enumerate(functions):
        head = (
            f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": '
        )
        lines.append(f'call{place}: {quoted(head)} arguments{place} "}}"')
        arguments = prepare(_parameters(function))
        lines.append(f"arguments{place}: %json {json.dumps(arguments)}")
    return "\n".join(lines)


def _either(functions: Sequence[Any], name: str) -> str:
    return " | ".join(f"{name}{place}" for place in range(len(functions)))


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    found = {"type": "object", **(function.get("parameters") or {})}
    for key, kind in (("properties", Mapping), ("required", list)):
        if key in found and not isinstance(found[key], kind):
            raise GrammarError(
                f"parameters of the tool {function['name']!r}: {key} is {found[key]!r}"
            )
    return found


def _dsml(
    functions: Sequence[Mapping[str, Any]],
    parallel: bool,
    tokens: "LLTokenizer",
    prepare: Prepare,
) -> str:
    """See `jaxspark.text.dsml`. Parameters come in the order of the schema.

    A text stands there as it is, so of its schema only choices (`enum`, `const`) count.
    """

    def tag(text: str) -> str:
        return literal(tokens, text, mark=MARK)

    block = f"<{MARK}tool_calls>\n", f"</{MARK}tool_calls>"
    lines = [
        f"start: {tag(block[0])} any{'+' if parallel else ''} {tag(block[1])}",
        f"any: {_either(functions, 'call')}",
    ]
    end = f"</{MARK}parameter>\n"
    if control(tokens, MARK) is None:
        lines.append(f"text[suffix={quoted(end)}]: /(?s:.*)/")
    else:
        lines.append(f"text: /(?s:.*)<\\// {tag(end.removeprefix('</'))}")
    for place, function in enumerate(functions):
        root = _parameters(function)
        head = f'<{MARK}invoke name="{function["name"]}">\n'
        parts = [tag(head)]
        for number, (name, value) in enumerate(root.get("properties", {}).items()):
            own = f"parameter{place}_{number}"
            must = name in root.get("required", ())
            parts.append(own if must else f"{own}?")
            lines.append(f"{own}: {_parameter(name, value, root, tag, end, prepare)}")
        parts.append(tag(f"</{MARK}invoke>\n"))
        lines.append(f"call{place}: {' '.join(parts)}")
    return "\n".join(lines)


def _parameter(
    name: str,
    value: Any,
    root: Mapping[str, Any],
    tag: Callable[[str], str],
    end: str,
    prepare: Prepare,
) -> str:
    """One parameter: a text as it is, anything else as JSON."""
    if set(name) & set('"<>\n'):
        raise GrammarError(f"a parameter named {name!r} cannot be written in DSML")
    head = f'<{MARK}parameter name="{name}" string="'
    texts = None
    if isinstance(value, Mapping):
        texts = [value["const"]] if "const" in value else value.get("enum")
    if isinstance(texts, list) and all(isinstance(each, str) for each in texts):
        either = " | ".join(quoted(each) for each in texts)
        return f"{tag(head + 'true">')} ({either}) {tag(end)}"
    if isinstance(value, Mapping) and value.get("type") == "string":
        return f"{tag(head + 'true">')} text"
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    own = {**shared, **value} if isinstance(value, Mapping) else value
    return f"{tag(head + 'false">')} %json {json.dumps(prepare(own))} {tag(end)}"
