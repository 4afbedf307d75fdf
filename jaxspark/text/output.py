"""What a request's tokens say, token by token, up to the stop.

One place decides where an output ends, so that its text, tokens, log-probabilities and
usage are cut alike (as in microsoft/onnxruntime-genai#2528): the tokens that are kept
are those up to and including the one that completes a stop string, or that is a stop
token. Their text ends before the stop. What comes after is never seen.

Tokens are taken one at a time, however many a round of decoding accepts at once, so the
size of the rounds cannot be seen in what comes out.
"""

import os
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxspark.text.events import CallBegins, CallEnds, Event, joined
from jaxspark.text.formats import CallFormat, OutputParser, ThinkFormat
from jaxspark.text.stops import StopFinder
from jaxspark.text.stream import TextStream
from jaxspark.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the tokens of one request are read.

    Attributes:
      stop: strings that end the text.
      include_stop: whether the text has the one that did.
      stop_ids: tokens that end it.
      min_tokens: a stop string that is complete in fewer tokens is text.
      skip_special: whether control tokens are left out of the text.
      thinking: how the model reasons; None leaves think blocks in the answer.
      opened: whether the prompt ended inside a think block.
      calls: how the model calls tools; None leaves calls in the answer.
      one_call: whether the output ends with its first whole call.
    """

    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_ids: Collection[int] = ()
    min_tokens: int = 0
    skip_special: bool = True
    thinking: ThinkFormat | None = None
    opened: bool = False
    calls: CallFormat | None = None
    one_call: bool = False

    @property
    def shown(self) -> tuple[str, ...]:
        """Control tokens that are text for the parsers that look for them."""
        tags = (self.thinking.begin, self.thinking.end) if self.thinking else ()
        return tags + (self.calls.tokens if self.calls else ())


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why an output ended by itself.

    Attributes:
      by: the stop string, the stop token, or None for the one call asked for.
    """

    by: str | int | None


class Output:
    """Reads the tokens of one request.

    Attributes:
      tokens: those that are kept.
      ends: for each, the characters of the text up to its last one; tokens that bring
        characters together end together.
      ending: set once the output has ended by itself; push no more.
      begun: calls that were begun.
      made: calls that are whole.
    """

    def __init__(self, tokenizer: Tokenizer, options: ReadOptions = ReadOptions()):
        self.options = options
        self.tokens: list[int] = []
        self.ends: list[int] = []
        self.ending: Ending | None = None
        self.begun = self.made = 0
        self._tokenizer = tokenizer
        self._text = self._stream()
        self._stops = StopFinder(options.stop, include=options.include_stop)
        self._parser = OutputParser(
            options.thinking, options.calls, opened=options.opened
        )
        # Characters that came, and the first token that may bring the next ones.
        self._seen = 0
        self._silent = 0

    @property
    def settled(self) -> int:
        """Tokens, from the first, whose every character is out or understood.

        Their log-probabilities may be sent beside what came out.
        """
        certain = self._seen - self._stops.held - self._parser.held
        count = len(self.ends)
        while count and self.ends[count - 1] > certain:
            count -= 1
        return count

    @property
    def reasoning_tokens(self) -> int:
        """Tokens that end inside the think block."""
        thought = self._parser.thought
        if thought is None:
            return len(self.tokens)
        return bisect_right(self.ends, thought) if thought else 0

    def push(self, token: int) -> list[Event]:
        """What becomes certain with the next token."""
        if self.ending is not None:
            raise ValueError("the output has ended; nothing follows it")
        if token in self.options.stop_ids:
            events = self.finish()
            if self.ending is None:
                self.tokens.append(token)
                self.ends.append(self._seen)
                self.ending = Ending(by=token)
            return events
        self.tokens.append(token)
        self.ends.append(self._seen + 1)  # For now: further on.
        piece = self._text.push([token])
        return self._read(piece) if piece else []

    def finish(self) -> list[Event]:
        """What was held back, where the tokens end without a stop."""
        if self.ending is not None:
            return []
        events = self._read(self._text.flush())
        if self.ending is None:
            events += self._parse(self._stops.finish())
        if self.ending is None:
            events += self._counted(self._parser.finish())
        return joined(events)

    def _read(self, piece: str) -> list[Event]:
        """Reads text that came with the last tokens."""
        self._seen += len(piece)
        self.ends[self._silent :] = [self._seen] * (len(self.ends) - self._silent)
        early = self._early(len(piece))
        certain = self._stops.push(piece[:early], armed=False)
        events = self._parse(certain + self._stops.push(piece[early:]))
        found = self._stops.found
        if found is not None and self.ending is None:
            kept = self._completing(found.end)
            del self.tokens[kept:], self.ends[kept:]
            events += self._counted(self._parser.finish())
            self.ending = self.ending or Ending(by=found.stop)
        self._silent = len(self.ends)
        return joined(events)

    def _parse(self, text: str) -> list[Event]:
        return self._counted(self._parser.push(text) if text else [])

    def _counted(self, events: list[Event]) -> list[Event]:
        """The events; those behind the one call asked for are dropped."""
        for place, event in enumerate(events):
            self.begun += isinstance(event, CallBegins)
            self.made += isinstance(event, CallEnds)
            if self.made and self.options.one_call:
                self.ending = self.ending or Ending(by=None)
                return events[: place + 1]
        return events

    def _early(self, new: int) -> int:
        """How many of the last `new` characters are there before `min_tokens` tokens.

        A stop that ends among them is text.
        """
        before = self.options.min_tokens - 1
        if len(self.tokens) <= before:
            return new
        if self._silent >= before:
            return 0
        shared = os.path.commonprefix(
            [self._whole(before), self._whole(len(self.tokens))]
        )
        return min(max(len(shared) - (self._seen - new), 0), new)

    def _completing(self, end: int) -> int:
        """How many tokens it takes to have the first `end` characters for certain.

        Mostly all so far. But tokens that are held back come together, and then a stop
        may end in an early one of them.
        """
        first = min(self._silent, len(self.tokens) - 1)
        texts = [self._whole(count) for count in range(first + 1, len(self.tokens))]
        whole = self._whole(len(self.tokens)) if texts else ""
        for count, text in enumerate(texts, first + 1):
            if len(text) >= end and text[:end] == whole[:end]:
                return count
        return len(self.tokens)

    def _stream(self) -> TextStream:
        skip, shown = self.options.skip_special, self.options.shown
        return TextStream(self._tokenizer, skip_special=skip, shown=shown)

    def _whole(self, count: int) -> str:
        stream = self._stream()
        return stream.push(self.tokens[:count]) + stream.flush()
