"""JSON read as it arrives, handed on as it was written (RFC 8259).

Only well-formed text passes: the reader stops in front of the first character that no
JSON value could have there, so what was handed on is always the beginning of one.
"""

import json
import re

from jaxspark.text.reader import SPACE, Reader, Sink, Steps

# Deeper values are refused: nothing sensible has them, and readers recurse.
MAX_DEPTH = 64
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONTROL = "".join(map(chr, range(32)))


def value(reader: Reader, sink: Sink, depth: int = 0) -> Steps[bool]:
    """Reads one value without white space before it; whether it is one."""
    first = yield from reader.peek()
    if first in ("{", "["):
        return (yield from _container(reader, sink, depth + 1))
    if first == '"':
        return (yield from _string(reader, sink))
    if first and first in "-0123456789":
        return (yield from _number(reader, sink))
    for word in ("true", "false", "null"):
        if (yield from reader.accept(word)):
            sink(word)
            return True
    return False


def text(reader: Reader) -> Steps[str | None]:
    """Reads a string and decodes it; None if the next thing is none."""
    parts: list[str] = []
    whole = yield from _string(reader, parts.append)
    return json.loads("".join(parts)) if whole else None


def space(reader: Reader, sink: Sink) -> Steps[None]:
    """Hands white space on."""
    sink((yield from reader.span(SPACE)))


def _container(reader: Reader, sink: Sink, depth: int) -> Steps[bool]:
    """An object or an array."""
    if depth > MAX_DEPTH:
        return False
    opening = reader.take(1)
    sink(opening)
    closing = "}" if opening == "{" else "]"
    yield from space(reader, sink)
    if (yield from reader.accept(closing)):
        sink(closing)
        return True
    while True:
        if opening == "{" and not (yield from _key(reader, sink)):
            return False
        if not (yield from value(reader, sink, depth)):
            return False
        yield from space(reader, sink)
        if (yield from reader.accept(closing)):
            sink(closing)
            return True
        if not (yield from reader.accept(",")):
            return False
        sink(",")
        yield from space(reader, sink)


def _key(reader: Reader, sink: Sink) -> Steps[bool]:
    """A key, its colon, and the white space around that."""
    if not (yield from _string(reader, sink)):
        return False
    yield from space(reader, sink)
    if not (yield from reader.accept(":")):
        return False
    sink(":")
    yield from space(reader, sink)
    return True


def _string(reader: Reader, sink: Sink) -> Steps[bool]:
    if not (yield from reader.accept('"')):
        return False
    sink('"')
    while True:
        # What is plain is handed on without waiting for what follows.
        yield from reader.plain('"\\' + _CONTROL, sink)
        if (yield from reader.accept('"')):
            sink('"')
            return True
        escape = yield from reader.peek(2)
        if escape[:1] != "\\" or len(escape) < 2:
            return False
        if escape[1] == "u":
            escape = yield from reader.peek(6)
            if not re.fullmatch(r"\\u[0-9a-fA-F]{4}", escape):
                return False
        elif escape[1] not in '"\\/bfnrt':
            return False
        sink(reader.take(len(escape)))


def _number(reader: Reader, sink: Sink) -> Steps[bool]:
    written = yield from reader.span("+-.eE0123456789")
    if not _NUMBER.fullmatch(written):
        reader.put_back(len(written))
        return False
    sink(written)
    return True
