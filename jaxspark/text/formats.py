"""The forms in which models think and call tools, by name, and the parser of both."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxspark.text.dsml import MARK, dsml
from jaxspark.text.events import Content, Event, joined
from jaxspark.text.json_calls import hermes, llama3
from jaxspark.text.reader import Parser, Program
from jaxspark.text.thinking import ThinkFormat
from jaxspark.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """How a model calls tools.

    Attributes:
      name: of the form.
      program: reads an answer with calls.
      tokens: control tokens that it looks for.
      bare: whether nothing but its keys tells a call from an answer in JSON.
    """

    name: str
    program: Program
    tokens: tuple[str, ...] = ()
    bare: bool = False


THINKING: Mapping[str, ThinkFormat] = MappingProxyType(
    {
        "deepseek_r1": ThinkFormat(),
        "deepseek_v4": ThinkFormat(newlines=False),
        "qwen3": ThinkFormat(),
    }
)
CALLS: Mapping[str, CallFormat] = MappingProxyType(
    {
        "deepseek_v4": CallFormat(name="deepseek_v4", program=dsml, tokens=(MARK,)),
        "hermes": CallFormat(
            name="hermes", program=hermes, tokens=("<tool_call>", "</tool_call>")
        ),
        "llama3": CallFormat(
            name="llama3", program=llama3, tokens=("<|python_tag|>",), bare=True
        ),
    }
)

# Models that write something else than JSON between the same tags.
_NOT_JSON = ("<function=", "<arg_key>")


def detect(tokenizer: Tokenizer) -> tuple[str | None, str | None]:
    """Names of the forms for thinking and for calls that a tokenizer speaks of.

    They are read off its tokens, and off its chat templates where tokens do not tell.
    """
    template = tokenizer.chat_template or ""
    told = template if isinstance(template, str) else "".join(template.values())

    def knows(text: str) -> bool:
        return tokenizer.core.token_to_id(text) is not None

    if knows(MARK):
        return "deepseek_v4", "deepseek_v4"
    calls = None
    if "<tool_call>" in told and not any(tag in told for tag in _NOT_JSON):
        calls = "hermes"
    elif knows("<|python_tag|>"):
        calls = "llama3"
    if not knows("</think>") and "</think>" not in told:
        return None, calls
    return "deepseek_r1" if knows("<｜Assistant｜>") else "qwen3", calls


class OutputParser:
    """Takes an output's text apart into reasoning, answer and calls.

    Attributes:
      thought: characters of the output up to the end of its think block, the tags
        among them; None while it lasts, 0 where there is none.
    """

    def __init__(
        self,
        thinking: ThinkFormat | None = None,
        calls: CallFormat | None = None,
        *,
        opened: bool = False,
    ):
        """Begins an output.

        Args:
          thinking: how it reasons; None reads think blocks as text.
          calls: how it calls tools; None reads calls as text.
          opened: whether the prompt ended inside a think block.
        """
        self._thinking = None
        self.thought: int | None = 0 if thinking is None else None
        if thinking is not None:
            self._thinking = Parser(thinking.program(opened=opened, over=self._over))
        self._calls = None if calls is None else Parser(calls.program)

    def _over(self, end: int) -> None:
        self.thought = end

    @property
    def held(self) -> int:
        """Characters that arrived and whose meaning is open."""
        return sum(each.held for each in (self._thinking, self._calls) if each)

    def push(self, text: str) -> list[Event]:
        """What became certain with this text."""
        events: list[Event] = [Content(text)]
        if self._thinking:
            events = self._thinking.push(text)
        return self._pass_on(events)

    def finish(self) -> list[Event]:
        """What becomes of the rest, at the end of the text."""
        events = self._pass_on(self._thinking.finish() if self._thinking else [])
        return joined(events + (self._calls.finish() if self._calls else []))

    def _pass_on(self, events: list[Event]) -> list[Event]:
        if not self._calls:
            return joined(events)
        passed: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                passed += self._calls.push(event.text)
            else:
                passed.append(event)
        return joined(passed)
