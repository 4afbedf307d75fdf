"""Parsers that read as if their whole text lay before them, and get it in pieces.

A parser is a *program*: a generator that takes text from a `Reader`, emits events, and
yields where it cannot go on without more text. It decides by the text alone, never by
where a piece ended, so every chunking of a text gives the same events (neighbours
joined). Losing nothing is a matter of one rule: a program that tries something sets a
*mark*, and what turns out to be nothing goes from the mark on into the answer.
"""

from collections.abc import Callable, Generator

from jaxspark.text.events import Content, Event, joined

# Yields where it needs more text, and returns a value to its caller.
type Steps[T] = Generator[None, None, T]
type Program = Callable[["Reader"], Steps[None]]
Sink = Callable[[str], None]

SPACE = " \t\r\n"


class Reader:
    """The text of a program: what is read, what is held, what came out.

    Attributes:
      ended: whether no more text comes.
      events: emitted and not yet collected.
    """

    def __init__(self) -> None:
        self.ended = False
        self.events: list[Event] = []
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._forgotten = 0

    @property
    def position(self) -> int:
        """Characters read, from the beginning of the text."""
        return self._forgotten + self._at

    @property
    def held(self) -> int:
        """Characters that arrived and whose meaning is open."""
        return len(self._text) - (self._at if self._mark is None else self._mark)

    @property
    def marked(self) -> bool:
        """Whether a mark is set."""
        return self._mark is not None

    def add(self, text: str) -> None:
        """More text."""
        done = self._at if self._mark is None else self._mark
        self._text = self._text[done:] + text
        self._at -= done
        self._forgotten += done
        self._mark = None if self._mark is None else 0

    def emit(self, event: Event) -> None:
        """Says something for certain."""
        self.events.append(event)

    def content(self, text: str) -> None:
        """Emits text of the answer."""
        self.emit(Content(text))

    # Marks.

    def set_mark(self) -> None:
        """From here on, text is held until it is clear what it is."""
        self._mark = self._at

    def clear_mark(self) -> None:
        """What was read since the mark is understood."""
        self._mark = None

    def rewind(self) -> None:
        """Reads again from the mark."""
        assert self._mark is not None
        self._at, self._mark = self._mark, None

    def give_up(self) -> None:
        """What was read since the mark is text of the answer."""
        assert self._mark is not None
        self.content(self._text[self._mark : self._at])
        self._mark = None

    # Reading.

    def take(self, count: int) -> str:
        """The next characters, which must have arrived."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        return taken

    def put_back(self, count: int) -> None:
        """The last characters, read since the last piece came, are not read."""
        self._at -= count

    def peek(self, count: int = 1) -> Steps[str]:
        """The next characters, fewer only at the end of the text."""
        while len(self._text) - self._at < count and not self.ended:
            yield
        return self._text[self._at : self._at + count]

    def accept(self, *literals: str) -> Steps[bool]:
        """Whether one of the literals comes next; it is then read."""
        while True:
            if self._text.startswith(literals, self._at):
                self._at += next(
                    len(each)
                    for each in literals
                    if self._text.startswith(each, self._at)
                )
                return True
            rest = self._text[self._at :]
            if self.ended or not any(each.startswith(rest) for each in literals):
                return False
            yield

    def span(self, characters: str, *, other: bool = False) -> Steps[str]:
        """The next characters that are all (or all not) among these."""
        end = self._at
        while True:
            while end < len(self._text) and (self._text[end] in characters) != other:
                end += 1
            if end < len(self._text) or self.ended:
                return self.take(end - self._at)
            read = end - self._at
            yield
            end = self._at + read

    def plain(self, stops: str, sink: Sink) -> Steps[None]:
        """Hands text on to `sink` as it comes, up to one of these characters."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] not in stops:
                end += 1
            sink(self.take(end - self._at))
            if end < len(self._text) or self.ended:
                return
            yield

    def space(self) -> Steps[None]:
        """Reads white space."""
        yield from self.span(SPACE)

    def until(
        self, markers: tuple[str, ...], sink: Sink, *, before: str = ""
    ) -> Steps[str | None]:
        """Hands text on to `sink` up to the first marker, which is read.

        Args:
          markers: what to look for; none may begin inside another.
          sink: gets the text before it.
          before: characters that belong to a marker where they stand right before it.

        Returns:
          the marker, with the mark set in front of it and of such characters; None at
          the end of the text.
        """
        while True:
            places = [(self._text.find(each, self._at), each) for each in markers]
            found = min((place for place in places if place[0] >= 0), default=None)
            end = len(self._text) if found is None else found[0]
            if found is None and not self.ended:
                end -= self._unfinished(markers)
            text = self._text[self._at : end]
            if found is not None or not self.ended:
                text = text.rstrip(before) if before else text
            sink(text)
            self._at += len(text)
            if found is not None:
                self._mark = self._at
                self._at = found[0] + len(found[1])
                return found[1]
            if self.ended:
                return None
            yield

    def _unfinished(self, markers: tuple[str, ...]) -> int:
        """Length of the longest end of the text that begins a marker."""
        longest = max(map(len, markers), default=0)
        for start in range(
            max(self._at, len(self._text) - longest + 1), len(self._text)
        ):
            if any(each.startswith(self._text[start:]) for each in markers):
                return len(self._text) - start
        return 0


class Parser:
    """Runs a program over a text that arrives in pieces."""

    def __init__(self, program: Program):
        self._reader = Reader()
        self._steps = program(self._reader)

    @property
    def held(self) -> int:
        """Characters that arrived and whose meaning is open."""
        return self._reader.held

    def push(self, text: str) -> list[Event]:
        """What became certain with this text."""
        self._reader.add(text)
        next(self._steps, None)
        events, self._reader.events = self._reader.events, []
        return joined(events)

    def finish(self) -> list[Event]:
        """What becomes of the rest, at the end of the text."""
        self._reader.ended = True
        return self.push("")
