"""A grammar as users write it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxspark.text.thinking import ThinkFormat

GrammarKind = Literal[
    "json_object",
    "json_schema",
    "regex",
    "choice",
    "grammar",
    "calls",
    "structural_tag",
]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Calls of tools, at least one.

    Attributes:
      form: how they are written, a name of `jaxspark.text.formats.CALLS`.
      tools: those that may be called, in OpenAI's form.
      parallel: whether there may be several.
    """

    form: str
    tools: Sequence[Mapping[str, Any]]
    parallel: bool = True


@dataclass(frozen=True, kw_only=True)
class Tag:
    """JSON within a text.

    Attributes:
      begin: the text before it, which begins with a trigger.
      schema: what it obeys, an object or its text.
      end: the text behind it.
    """

    begin: str
    schema: Any
    end: str


@dataclass(frozen=True, kw_only=True)
class StructuralTags:
    """Free text in which a trigger is followed by the rest of a structure.

    Attributes:
      structures: that there may be, any number of times.
      triggers: texts, or names of control tokens.
    """

    structures: Sequence[Tag]
    triggers: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    r"""What an output must obey; its stop tokens end it only where it is complete.

        Grammar(kind="json_schema", value={"type": "array", "maxItems": 3})
        Grammar(kind="regex", value=r"[0-9]{4}-[0-9]{2}")

    Attributes:
      kind: the form of `value`.
      value: a JSON schema as an object or as text, a regular expression that the whole
        output matches (in the syntax of Rust's regex), a sequence of choices, a grammar
        in llguidance's dialect of Lark, `Calls` or `StructuralTags`; None for any JSON
        object.
      thinking: how the output may think before what obeys; None for not at all.
      opened: whether the prompt ended inside a think block, so that it must.
      calls: what the output may be instead; None for nothing else.
    """

    kind: GrammarKind
    value: Any = None
    thinking: ThinkFormat | None = None
    opened: bool = False
    calls: Calls | None = None
