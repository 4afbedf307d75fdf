"""Calls of tools as JSON: Hermes and Qwen between tags, Llama 3 bare.

    <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>    Hermes 2, Qwen 2.5, 3
    {"name": "f", "parameters": {"x": 1}}                          Llama 3.1 and later

A call is announced when its name is known and its arguments have begun; from then on
the arguments are handed on as they arrive, exactly as written. Before that, what breaks
the form is text of the answer, tags and all. After it, the call stays unfinished: its
arguments are no JSON, so nobody runs it by mistake, and what follows is text.
"""

import re
from dataclasses import dataclass

from jaxspark.text import json_reader
from jaxspark.text.events import Arguments, CallBegins, CallEnds
from jaxspark.text.reader import SPACE, Reader, Steps

NAME = re.compile(r"[\w.:/-]{1,128}")
_ARGUMENTS = ("arguments", "parameters")


def hermes(reader: Reader) -> Steps[None]:
    """The program for calls between `<tool_call>` tags, anywhere in an answer."""
    while True:
        tag = yield from reader.until(("<tool_call>",), reader.content, before=SPACE)
        if tag is None:
            return
        yield from reader.space()
        if not (yield from call(reader)):
            continue
        reader.set_mark()
        yield from reader.space()
        if (yield from reader.accept("</tool_call>")):
            reader.clear_mark()
            yield from reader.space()
        else:
            reader.rewind()


def llama3(reader: Reader) -> Steps[None]:
    """The program for an answer that is nothing but calls, one or several.

    `<|python_tag|>` may stand before them, `;` or `,` between them.
    """
    made = False
    reader.set_mark()
    yield from reader.space()
    yield from reader.accept("<|python_tag|>")
    while True:
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            reader.rewind()
            break
        made = yield from call(reader)
        if not made:
            break
        reader.set_mark()
        yield from reader.space()
        yield from reader.accept(";", ",")
    if made:
        yield from reader.space()
    yield from reader.until((), reader.content)


@dataclass
class _Call:
    """What is known of a call while its object is read."""

    name: str | None = None
    arguments: str | None = None
    announced: bool = False


def call(reader: Reader) -> Steps[bool]:
    """Reads one call's object, from the mark on; whether it was whole.

    The mark is gone afterwards: what was no call has become text.
    """
    known = _Call()
    whole = yield from _object(reader, known)
    if whole and known.announced:
        reader.clear_mark()
        reader.emit(CallEnds())
        return True
    if reader.marked:
        reader.give_up()
    return False


def _object(reader: Reader, known: _Call) -> Steps[bool]:
    if not (yield from reader.accept("{")):
        return False
    while True:
        yield from reader.space()
        key = yield from json_reader.text(reader)
        yield from reader.space()
        if key is None or not (yield from reader.accept(":")):
            return False
        yield from reader.space()
        if not (yield from _entry(reader, known, key)):
            return False
        yield from reader.space()
        if (yield from reader.accept("}")):
            return True
        if not (yield from reader.accept(",")):
            return False


def _entry(reader: Reader, known: _Call, key: str) -> Steps[bool]:
    """The value of one key; keys that say nothing of the call are passed over."""
    if key == "name":
        name = yield from json_reader.text(reader)
        if name is None or known.name is not None or not NAME.fullmatch(name):
            return False
        known.name = name
        _announce(reader, known)
        return True
    if key not in _ARGUMENTS:
        return (yield from json_reader.value(reader, lambda text: None))
    if known.arguments is not None or (yield from reader.peek()) != "{":
        return False
    known.arguments = ""

    def sink(text: str) -> None:
        if known.announced:
            reader.emit(Arguments(text))
        else:
            known.arguments = (known.arguments or "") + text

    _announce(reader, known)
    whole = yield from json_reader.value(reader, sink)
    if whole and known.announced:
        reader.set_mark()
    return whole


def _announce(reader: Reader, known: _Call) -> None:
    """Begins the call once its name is known and its arguments have begun."""
    if known.name is not None and known.arguments is not None:
        known.announced = True
        reader.clear_mark()
        reader.emit(CallBegins(known.name))
        reader.emit(Arguments(known.arguments))
