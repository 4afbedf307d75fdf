"""From a `Grammar` to a parser: what llguidance reads, and what it says of it."""

import functools
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from jaxspark.grammars.calls import calls_lark
from jaxspark.grammars.grammar import Calls, Grammar, StructuralTags
from jaxspark.grammars.matcher import GrammarError, Matcher
from jaxspark.grammars.tags import tags_lark
from jaxspark.grammars.vocabulary import control, library, quoted, vocabulary
from jaxspark.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Characters of what is wrong with a grammar: they may repeat all of it.
_TOLD = 400
# White space between parts of a JSON text has an end, or some models find none.
_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}


def matcher_of(
    grammar: Grammar,
    tokenizer: Tokenizer | None,
    *,
    vocab: int,
    stop_ids: Collection[int],
) -> Matcher:
    """A grammar at the beginning of an output.

    Args:
      grammar: what the output must obey.
      tokenizer: the target's.
      vocab: ids of the target.
      stop_ids: those that end the output.

    Raises:
      GrammarError: it is none, as llguidance says; or the tokenizer is missing or not
        fit for grammars; or nothing could end the output.
    """
    if tokenizer is None:
        raise GrammarError("a grammar is of text, and the target has no tokenizer")
    if not stop_ids:
        raise GrammarError(
            "a grammar needs a stop token to end with; stop_ids is empty"
        )
    try:
        tokens = vocabulary(tokenizer, vocab)
    except ValueError as error:
        raise GrammarError(str(error)) from error
    parser = _parser(source(grammar, tokens), tokens).deep_copy()
    ends = tokens.eos_tokens
    return Matcher(parser, vocab=vocab, stop_ids=stop_ids, ends=ends)


@functools.lru_cache(maxsize=32)
def _parser(source: str, tokens: "LLTokenizer") -> "LLMatcher":
    """A parser that nobody advances; outputs of one request share it."""
    llguidance = library()
    limits = llguidance.LLParserLimits(verbose_errors=False)
    parser = llguidance.LLMatcher(tokens, source, log_level=0, limits=limits)
    if parser.is_error():
        told = parser.get_error().strip()
        told = told if len(told) <= _TOLD else f"{told[:_TOLD]} ..."
        raise GrammarError(f"the grammar is not valid: {told}")
    return parser


def source(grammar: Grammar, tokens: "LLTokenizer") -> str:
    """What llguidance reads: an answer or calls, a think block before them.

    Raises:
      GrammarError: the value does not fit its kind.
    """
    parts = {"answer": _answer(grammar, tokens)}
    if grammar.thinking is None and grammar.calls is None:
        return json.dumps({"grammars": [*parts.values()]})
    if grammar.calls is not None:
        parts["calls"] = {"lark_grammar": calls_lark(grammar.calls, tokens, schema)}
    either = " | ".join(f"@{name}" for name in parts)
    before, rules = _thinking(grammar, tokens)
    lark = f"start: {before} ({either})\n{rules}"
    named = [part | {"name": name} for name, part in parts.items()]
    return json.dumps({"grammars": [{"lark_grammar": lark}, *named]})


def _thinking(grammar: Grammar, tokens: "LLTokenizer") -> tuple[str, str]:
    """What comes before an answer, and its rules."""
    if grammar.thinking is None:
        return "", ""
    opening = quoted(grammar.thinking.begin)
    opening = control(tokens, grammar.thinking.begin) or opening
    end = control(tokens, grammar.thinking.end)
    if end is not None:
        thought = f"thought: /(?s:.*)/ {end}"
    else:
        thought = f"thought[suffix={quoted(grammar.thinking.end)}]: /(?s:.*)/"
    block = "thought" if grammar.opened else f"({opening} thought)?"
    return f"{block} SPACE", f"SPACE: /\\s{{0,8}}/\n{thought}\n"


def _answer(grammar: Grammar, tokens: "LLTokenizer") -> dict[str, Any]:
    value = grammar.value
    match grammar.kind:
        case "json_object":
            return {"json_schema": {"type": "object", "x-guidance": _JSON}}
        case "json_schema":
            return {"json_schema": schema(value)}
        case "regex":
            [found] = json.loads(
                library().LLMatcher.grammar_from_regex(_text("regex", value))
            )["grammars"]
            return {"lark_grammar": found["lark_grammar"]}
        case "choice":
            if not value or isinstance(value, str):
                raise GrammarError(f"choice must be a list of texts, got {value!r}")
            choices = (quoted(_text("choice", each)) for each in value)
            # One lexeme, however many there are: rules may not begin in so many ways.
            either = " | ".join(dict.fromkeys(choices))
            return {"lark_grammar": f"start: CHOICE\nCHOICE: {either}"}
        case "grammar":
            return {"lark_grammar": _text("grammar", value)}
        case "calls":
            if not isinstance(value, Calls):
                raise GrammarError(f"calls must be `Calls`, got {value!r}")
            return {"lark_grammar": calls_lark(value, tokens, schema)}
        case "structural_tag":
            if not isinstance(value, StructuralTags):
                raise GrammarError(
                    f"structural_tag must be `StructuralTags`, got {value!r}"
                )
            return {"lark_grammar": tags_lark(value, tokens, schema)}
    raise GrammarError(f"unknown kind of grammar {grammar.kind!r}")


def _text(kind: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise GrammarError(f"{kind}: expected a text that is not empty, got {value!r}")
    return value


def schema(value: Any) -> dict[str, Any]:
    """A JSON schema with what llguidance is told beside it.

    Raises:
      GrammarError: it is no object, nor the text of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema is no JSON: {error}") from error
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise GrammarError(f"a JSON schema is an object, got {value!r}")
    own = value.get("x-guidance", {})
    if not isinstance(own, Mapping):
        raise GrammarError(f"x-guidance of a JSON schema is an object, got {own!r}")
    space = {} if "whitespace_flexible" in own else _JSON
    return {**value, "x-guidance": {**space, **own}}
