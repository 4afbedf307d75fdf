"""What an answer must obey, in whichever of a client's fields it is said."""

import json
from dataclasses import asdict, replace
from typing import Any

from jaxspark.grammars import Calls, Grammar, StructuralTags, Tag, matcher_of
from jaxspark.serving.conversation import ToolUse
from jaxspark.serving.errors import ApiError
from jaxspark.serving.fields import (
    MOST_GRAMMAR,
    AnyJson,
    JsonOfSchema,
    SamplingFields,
    TextWithTags,
)
from jaxspark.serving.sampling import stop_ids
from jaxspark.serving.served import Served


def grammar_of(
    fields: SamplingFields,
    served: Served,
    *,
    tool_use: ToolUse | None = None,
    opened: bool | None = None,
) -> Grammar | None:
    """What the answer must obey; None for nothing.

    Args:
      fields: what the client said.
      served: of which model.
      tool_use: which tools may, or must, be called.
      opened: whether the prompt ended inside a think block; None where the answer is
        not to think.

    Raises:
      ApiError: it is said more than once, or llguidance cannot do it; says why.
    """
    said, calls = _formats(fields), _calls(tool_use, served)
    if tool_use is not None and tool_use.mode != "auto":
        said.append(("tool_choice", Grammar(kind="calls", value=calls)))
    if not said:
        return None
    param, grammar = said[-1]
    if len(said) > 1:
        raise ApiError(
            f"{said[0][0]} and {param} both say what an answer obeys; leave one out",
            param=param,
        )
    if grammar.kind != "calls" and calls is not None:
        grammar = _or_calls(grammar, calls, served, param)
    if opened is not None:
        grammar = replace(grammar, thinking=served.thinking, opened=opened)
    ends = stop_ids(fields, served)
    where = f"{param} with tools" if grammar.calls else param
    size = len(json.dumps(asdict(grammar)))
    if size > MOST_GRAMMAR:
        raise ApiError(
            f"{where} has {size:,} bytes; at most {MOST_GRAMMAR:,} are taken",
            param=param,
        )
    try:
        matcher_of(grammar, served.tokenizer, vocab=served.vocab_size, stop_ids=ends)
    except ValueError as error:
        raise ApiError(f"{where}: {error}", param=param) from error
    return grammar


def _calls(tool_use: ToolUse | None, served: Served) -> Calls | None:
    """The calls that there may be."""
    if tool_use is None or served.calls is None:
        return None
    tools = [
        each
        for each in tool_use.tools
        if tool_use.name in (None, each["function"]["name"])
    ]
    return Calls(form=served.calls.name, tools=tools, parallel=tool_use.parallel)


def _or_calls(grammar: Grammar, calls: Calls, served: Served, param: str) -> Grammar:
    """An answer or calls, as the model likes.

    Raises:
      ApiError: the one looks like the other.
    """
    if served.calls is None or not served.calls.bare:
        return replace(grammar, calls=calls)
    if grammar.kind == "structural_tag":
        return grammar  # Its text is free, and may be calls.
    raise ApiError(
        f"{param} and tools are both given, and this model calls tools in JSON that "
        'cannot be told from an answer; leave one out, or set tool_choice to "none"',
        param=param,
    )


def _formats(fields: SamplingFields) -> list[tuple[str, Grammar]]:
    """What is said of formats, and where."""
    formats: list[tuple[str, Grammar]] = []
    match fields.response_format:
        case AnyJson():
            formats.append(("response_format", Grammar(kind="json_object")))
        case JsonOfSchema(json_schema=named):
            grammar = Grammar(kind="json_schema", value=named.schema_)
            formats.append(("response_format", grammar))
        case TextWithTags(structures=structures, triggers=triggers):
            tags = [
                Tag(begin=each.begin, schema=each.schema_, end=each.end)
                for each in structures
            ]
            tagged = StructuralTags(structures=tags, triggers=triggers)
            grammar = Grammar(kind="structural_tag", value=tagged)
            formats.append(("response_format", grammar))
    said: Any = fields.structured_outputs
    if said is None:
        return formats
    given = []
    if said.json_ is not None:
        given.append(Grammar(kind="json_schema", value=said.json_))
    if said.regex is not None:
        given.append(Grammar(kind="regex", value=said.regex))
    if said.choice is not None:
        given.append(Grammar(kind="choice", value=tuple(said.choice)))
    if said.grammar is not None:
        given.append(Grammar(kind="grammar", value=said.grammar))
    if len(given) != 1:
        kinds = ", ".join(each.kind for each in given) or "none"
        raise ApiError(
            f"structured_outputs has {kinds}; expected one of json, regex, choice "
            "and grammar",
            param="structured_outputs",
        )
    return [*formats, ("structured_outputs", given[0])]
