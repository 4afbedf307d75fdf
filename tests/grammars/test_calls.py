"""Forced calls: what the grammar lets through is read as these calls again."""

import json

import pytest

from jaxspark.grammars import Calls, Grammar, GrammarError, matcher_of
from jaxspark.grammars.matcher import allows
from jaxspark.text.dsml import MARK
from jaxspark.text.events import Arguments, CallBegins, CallEnds, Content
from jaxspark.text.formats import CALLS, OutputParser
from jaxspark.text.thinking import ThinkFormat
from tests.checkpoints import tiny

END = 257
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"$ref": "#/$defs/days"},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "unit"],
    "$defs": {"days": {"type": "integer"}},
}


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", CITY), tool("now")]


def parameter(name, text, *, string):
    head = f'<{MARK}parameter name="{name}" string="{str(string).lower()}">'
    return f"{head}{text}</{MARK}parameter>\n"


def invoked(name, *parameters):
    return f'<{MARK}invoke name="{name}">\n{"".join(parameters)}</{MARK}invoke>\n'


def block(*calls):
    return f"<{MARK}tool_calls>\n{''.join(calls)}</{MARK}tool_calls>"


def hermes(name, arguments):
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def llama3(name, arguments):
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def dsml(name, arguments):
    return block(
        invoked(
            name,
            *(
                parameter(
                    key,
                    value if isinstance(value, str) else json.dumps(value),
                    string=isinstance(value, str),
                )
                for key, value in arguments.items()
            ),
        )
    )


FORMS = {"hermes": hermes, "llama3": llama3, "deepseek_v4": dsml}


def obeys(text, form, tools=TOOLS, parallel=True, tokenizer=None, **thinking):
    calls = Calls(form=form, tools=tools, parallel=parallel)
    return fits(text, Grammar(kind="calls", value=calls, **thinking), tokenizer)


def fits(text, grammar, tokenizer=None):
    tokenizer = tokenizer or tiny.tokenizer()
    matcher = matcher_of(grammar, tokenizer, vocab=300, stop_ids=(END,))
    try:
        matcher.advance(tokenizer.encode(text, add_special_tokens=False))
    except GrammarError:
        return False
    return allows(matcher.mask(), END)


def read(text, form):
    """The calls that a parser finds, and what else there is."""
    parser = OutputParser(calls=CALLS[form])
    events = parser.push(text) + parser.finish()
    names = [each.name for each in events if isinstance(each, CallBegins)]
    arguments = "".join(each.text for each in events if isinstance(each, Arguments))
    rest = "".join(each.text for each in events if isinstance(each, Content))
    whole = sum(isinstance(each, CallEnds) for each in events)
    return names, arguments, rest, whole


@pytest.mark.parametrize("form", FORMS)
def test_what_obeys_is_read_as_the_call(form):
    write = FORMS[form]
    for name, arguments in (
        ("weather", {"city": "Pa</x>ris\né", "days": 3, "unit": "c"}),
        ("weather", {"city": "", "unit": "f"}),
        ("now", {}),
    ):
        text = write(name, arguments)
        assert obeys(text, form), text
        names, told, rest, whole = read(text, form)
        assert (names, json.loads(told), rest, whole) == ([name], arguments, "", 1)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_such_call_does_not_obey(form):
    write, good = FORMS[form], {"city": "x", "unit": "c"}
    assert obeys(write("weather", good), form)
    for name, arguments in (
        ("other", good),
        ("weather", {"city": "x"}),
        ("weather", {"city": 3, "unit": "c"}),
        ("weather", {"city": "x", "unit": "k"}),
        ("weather", {"city": "x", "days": 1.5, "unit": "c"}),
    ):
        assert not obeys(write(name, arguments), form), (name, arguments)
    assert not obeys("It is sunny.", form) and not obeys("", form)
    assert not obeys(write("now", {})[:-1], form)
    assert not obeys(write("now", {}), form, tools=TOOLS[:1])


@pytest.mark.parametrize(
    "kind, value, right, wrong",
    [
        ("json_schema", {"const": {"n": 3}}, '{"n": 3}', '{"n": 4}'),
        ("json_object", None, '{"a": [1]}', "[1]"),
        ("regex", "[ab]{3}", "aba", "ab"),
        ("choice", ("yes", "no"), "yes", "maybe"),
        ("grammar", 'start: "x" DIGITS\nDIGITS: /[0-9]+/', "x7", "x"),
    ],
)
@pytest.mark.parametrize("form", ["hermes", "deepseek_v4"])
@pytest.mark.parametrize("marked", [False, True])
def test_an_answer_may_be_calls_instead(form, kind, value, right, wrong, marked):
    tokenizer = tiny.tokenizer()
    if marked:
        tokenizer.core.add_special_tokens([MARK, "<tool_call>", "</tool_call>"])
    calls = Calls(form=form, tools=TOOLS)
    call = FORMS[form]("weather", {"city": "x", "unit": "c"})
    other = FORMS[form]("weather", {"city": "x", "unit": "k"})
    thinking = {"thinking": ThinkFormat(), "opened": True}
    for before, more in (("", {}), ("hm</think>\n\n", thinking)):
        grammar = Grammar(kind=kind, value=value, calls=calls, **more)
        for text in (right, call):
            assert fits(before + text, grammar, tokenizer), text
        for text in (wrong, other, right + call, call + right):
            assert not fits(before + text, grammar, tokenizer), text
    assert read(right, form) == ([], "", right, 0)


def test_several_calls_are_made_where_they_may_be():
    both = {
        "hermes": "\n".join([hermes("now", {})] * 2),
        "llama3": "; ".join([llama3("now", {})] * 2),
        "deepseek_v4": block(invoked("now"), invoked("now")),
    }
    for form, text in both.items():
        assert obeys(text, form), form
        assert not obeys(text, form, parallel=False), form
        assert read(text, form)[0] == ["now", "now"]


def test_marks_are_control_tokens_where_there_are_such():
    """Spelled out in bytes they would be text, which no parser looks for."""
    made = tiny.tokenizer()
    made.core.add_special_tokens([MARK, "<tool_call>", "</tool_call>", "</think>"])
    for form, write in FORMS.items():
        text = write("weather", {"city": "</Paris>", "days": 3, "unit": "c"})
        assert obeys(text, form, tokenizer=made)
        thinking = {"thinking": ThinkFormat(), "opened": True}
        assert obeys(f"hm</think>\n\n{text}", form, tokenizer=made, **thinking)
    grammar = Grammar(kind="calls", value=Calls(form="deepseek_v4", tools=TOOLS))
    matcher = matcher_of(grammar, made, vocab=300, stop_ids=(END,))
    matcher.advance(made.encode("<", add_special_tokens=False))
    [mark] = made.encode(MARK, add_special_tokens=False)
    assert allows(matcher.mask(), mark)
    text_of_mark = made.core.token_to_id(
        made.core.pre_tokenizer.pre_tokenize_str("｜")[0][0][0]
    )
    assert not allows(matcher.mask(), text_of_mark)


@pytest.mark.parametrize(
    "parameters, match",
    [
        ({"properties": []}, "properties is"),
        ({"required": 3}, "required is 3"),
        ({"properties": {"x": {"type": "strange"}}}, "strange"),
        ({"properties": {"x": 3}}, "not valid|is an object"),
    ],
)
def test_a_tool_that_is_none_is_refused(parameters, match):
    for form in FORMS:
        with pytest.raises(GrammarError, match=match):
            obeys("", form, tools=[tool("f", parameters)])
    with pytest.raises(GrammarError, match="no tools"):
        obeys("", "hermes", tools=[])
    with pytest.raises(GrammarError, match="the form 'xml'"):
        obeys("", "xml")
