"""One output on its way to a client: what was said, by which tokens, and how it ended.

Tokens come in blocks of any size and leave in parts that do not depend on it: each
token is read by itself, and a part is sent once it says something and has the tokens
that the client wants at least. A token is told with the part that has its last
character, so what is held back is held back with its log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxspark.generation.completion import FinishReason as EngineReason
from jaxspark.serving.engine_events import Sampled
from jaxspark.serving.prepared import Prepared
from jaxspark.serving.responses import FinishReason
from jaxspark.text import Output
from jaxspark.text.events import Event, joined


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an output ended.

    Attributes:
      reason: in OpenAI's words.
      stop: the stop string, or the token if the client named it.
    """

    reason: FinishReason
    stop: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of an output.

    Attributes:
      events: what it says.
      tokens: those that say it.
      offsets: for each, the characters of the output before it.
      told: tokens of the output up to here.
      reasoning: those of them in its think block.
      ending: how the output ended, in its last part.
    """

    events: Sequence[Event]
    tokens: Sequence[Sampled]
    offsets: Sequence[int]
    told: int
    reasoning: int
    ending: Ending | None = None


class ChoiceReader:
    """Reads one output.

    Attributes:
      ending: once it has ended; what the engine says later is not looked at.
    """

    def __init__(self, prepared: Prepared):
        self.ending: Ending | None = None
        self._prepared = prepared
        self._output = Output(prepared.served.tokenizer, prepared.reading)
        self._sampled: list[Sampled] = []
        self._told = 0
        self._events: list[Event] = []

    def push(self, tokens: Sequence[Sampled]) -> list[Part]:
        """What new tokens say."""
        if self._prepared.prompts_only and self.ending is None:
            return [self._last("length")]
        parts = []
        for sampled in tokens:
            if self.ending is not None:
                break
            self._sampled.append(sampled)
            self._events += self._output.push(sampled.token)
            if self._output.ending is not None:
                parts.append(self._last("stop"))
            elif self._events and self._is_enough():
                parts.append(self._part())
        return parts

    def end(self, reason: EngineReason) -> list[Part]:
        """What is left to say when the engine has ended."""
        if self.ending is not None:
            return []
        self._events += self._output.finish()
        return [self._last(reason)]

    def _is_enough(self) -> bool:
        return self._output.settled - self._told >= self._prepared.interval

    def _part(self, ending: Ending | None = None) -> Part:
        settled = len(self._output.tokens) if ending else self._output.settled
        ends = self._output.ends
        part = Part(
            events=joined(self._events),
            tokens=self._sampled[self._told : settled],
            offsets=[ends[i - 1] if i else 0 for i in range(self._told, settled)],
            told=settled,
            reasoning=min(self._output.reasoning_tokens, settled),
            ending=ending,
        )
        self._events, self._told = [], settled
        return part

    def _last(self, reason: EngineReason) -> Part:
        """The last part; the engine says why where the output did not end by itself."""
        output = self._output
        by = output.ending.by if output.ending else None
        if output.ending is not None:
            reason = "stop"
        told: FinishReason = "abort"
        if reason == "stop":
            calls = output.made > 0 and output.made == output.begun
            told = "tool_calls" if calls else "stop"
        elif reason == "length":
            told = "length"
        if isinstance(by, int) and by not in self._prepared.own_stop_ids:
            by = None
        self.ending = Ending(reason=told, stop=by)
        return self._part(self.ending)
