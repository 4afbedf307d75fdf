"""Calls of tools in DSML, the markup of DeepSeek-V3.2 and V4.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="f">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

V3.2 calls the outer block `function_calls`. Parameters with `string="true"` are raw
text, others JSON. Models forget the outer block, or its end, or take the other's name
for it (sgl-project/sglang#40236): those calls are read all the same. What is wrong
inside a call is not repaired: without a parameter it would be a call that nobody asked
for (sgl-project/sglang#39435). See `json_calls` for what becomes of it.
"""

import json

from jaxspark.text import json_reader
from jaxspark.text.events import Arguments, CallBegins, CallEnds
from jaxspark.text.json_calls import NAME
from jaxspark.text.reader import SPACE, Reader, Steps

MARK = "｜DSML｜"
BLOCKS = ("tool_calls", "function_calls")
_OPEN = tuple(f"<{MARK}{block}>" for block in BLOCKS)
_CLOSE = tuple(f"</{MARK}{block}>" for block in BLOCKS)
_INVOKE, _INVOKE_END = f'<{MARK}invoke name="', f"</{MARK}invoke>"
_PARAMETER, _PARAMETER_END = f'<{MARK}parameter name="', f"</{MARK}parameter>"
_STRING, _JSON = '" string="true">', '" string="false">'


def dsml(reader: Reader) -> Steps[None]:
    """The program for calls in DSML, anywhere in an answer."""
    while True:
        tag = yield from reader.until((*_OPEN, _INVOKE), reader.content, before=SPACE)
        if tag is None:
            return
        if tag != _INVOKE:
            yield from reader.space()
            if not (yield from reader.accept(_INVOKE)):
                reader.give_up()
                continue
        while (yield from _call(reader)):
            reader.set_mark()
            yield from reader.space()
            if (yield from reader.accept(_INVOKE)):
                continue
            if (yield from reader.accept(*_CLOSE)):
                reader.clear_mark()
                yield from reader.space()
            else:
                reader.rewind()
            break


def _call(reader: Reader) -> Steps[bool]:
    """Reads a call behind its opening, from the mark on; whether it was whole."""
    whole = yield from _invoke(reader)
    if not whole and reader.marked:
        reader.give_up()
    return whole


def _invoke(reader: Reader) -> Steps[bool]:
    name = yield from reader.span('"<>\n', other=True)
    if not NAME.fullmatch(name) or not (yield from reader.accept('">')):
        return False
    names: set[str] = set()
    while True:
        if names:
            reader.set_mark()
        yield from reader.space()
        if (yield from reader.accept(_INVOKE_END)):
            reader.clear_mark()
            if not names:
                _announce(reader, name)
            reader.emit(Arguments("}" if names else "{}"))
            reader.emit(CallEnds())
            return True
        if not (yield from reader.accept(_PARAMETER)):
            return False
        if not (yield from _parameter(reader, name, names)):
            return False


def _parameter(reader: Reader, call: str, names: set[str]) -> Steps[bool]:
    """Reads a parameter behind its opening; the first one announces the call."""
    name = yield from reader.span('"<>\n', other=True)
    if not name or name in names:
        return False
    is_text = yield from reader.accept(_STRING)
    if not is_text and not (yield from reader.accept(_JSON)):
        return False
    reader.clear_mark()
    if not names:
        _announce(reader, call)
    key = json.dumps(name, ensure_ascii=False)
    reader.emit(Arguments(f"{', ' if names else '{'}{key}: "))
    names.add(name)
    if not is_text:
        yield from reader.space()
        if not (
            yield from json_reader.value(reader, lambda x: reader.emit(Arguments(x)))
        ):
            return False
        yield from reader.space()
        return (yield from reader.accept(_PARAMETER_END))
    reader.emit(Arguments('"'))
    end = yield from reader.until((_PARAMETER_END,), lambda x: _quoted(reader, x))
    if end is None:
        return False
    reader.clear_mark()
    reader.emit(Arguments('"'))
    return True


def _quoted(reader: Reader, text: str) -> None:
    """Raw text as the inside of a JSON string."""
    reader.emit(Arguments(json.dumps(text, ensure_ascii=False)[1:-1]))


def _announce(reader: Reader, name: str) -> None:
    reader.emit(CallBegins(name))
