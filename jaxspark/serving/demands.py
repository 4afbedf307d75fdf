"""What the engine is asked for: requests with everything a client can want.

`SamplingParams` has what the compiled loop takes. What it does not take yet is carried
beside it in `Extras`, so that an engine either obeys all of it or refuses it by name
(`Extras.asked_for`); nothing is dropped in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxspark.generation import Request

GrammarKind = Literal[
    "json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"
]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What every answer must obey.

    Attributes:
      kind: the form of `value`.
      value: a schema, an expression, a tuple of choices, a grammar; None for any JSON
        object.
    """

    kind: GrammarKind
    value: Any = None


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


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What `SamplingParams` does not have yet; by default nothing.

    Attributes:
      grammar: what the answer must obey.
      tool_use: which tools it may or must call; None where there are none.
    """

    grammar: Grammar | None = None
    tool_use: ToolUse | None = None

    def asked_for(self) -> list[str]:
        """Names of what differs from the default, and changes what is sampled or told.

        Tools that may be called, none having to be, ask nothing of the engine.
        """
        plain = Extras()
        names = [
            each.name
            for each in fields(self)
            if getattr(self, each.name) != getattr(plain, each.name)
        ]
        if self.tool_use is not None and self.tool_use.mode == "auto":
            names.remove("tool_use")
        return names


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One output that the engine is asked for.

    Attributes:
      group: the id of the client's request; outputs of a group share prompts.
      choice: its number among them.
      request: the prompt's tokens and how they are continued.
      extras: what else is wanted.
      priority: lower ones go first.
      deadline_s: seconds from its arrival after which it is given up; None waits.
      cache_salt: prefixes are shared only among requests with the same; None is one
        too.
    """

    group: str
    choice: int
    request: Request
    extras: Extras = Extras()
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str | None = None
