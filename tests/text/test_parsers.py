"""Outputs come apart into reasoning, answer and calls; what is no call is text."""

import json

import pytest

from jaxspark.text.events import (
    Arguments,
    CallBegins,
    CallEnds,
    Content,
    Reasoning,
    joined,
)
from jaxspark.text.formats import CALLS, THINKING, OutputParser, detect
from tests.checkpoints import tiny


def parsed(text, *, thinking=None, calls=None, opened=False, size=None):
    """The events of a text that arrives whole, or in pieces of a size."""
    parser = OutputParser(THINKING.get(thinking), CALLS.get(calls), opened=opened)
    step = size or max(len(text), 1)
    events = []
    for start in range(0, len(text), step):
        events += parser.push(text[start : start + step])
    return joined(events + parser.finish())


def said(events):
    """(reasoning, answer, calls as (name, arguments, whole))."""
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    answer = "".join(e.text for e in events if isinstance(e, Content))
    calls = []
    for event in events:
        if isinstance(event, CallBegins):
            calls.append([event.name, "", False])
        elif isinstance(event, Arguments):
            calls[-1][1] += event.text
        elif isinstance(event, CallEnds):
            calls[-1][2] = True
    return reasoning, answer, [tuple(call) for call in calls]


@pytest.mark.parametrize("size", [None, 1, 3])
def test_a_think_block_is_reasoning(size):
    text = "<think>\nLet me see.\n\n</think>\n\n4\n"
    assert said(parsed(text, thinking="qwen3", size=size)) == ("Let me see.", "4\n", [])
    # DeepSeek-V4's encoding has no newlines of its own.
    reasoning, answer, _ = said(parsed(text, thinking="deepseek_v4", size=size))
    assert (reasoning, answer) == ("\nLet me see.\n\n", "\n\n4\n")


def test_the_prompt_may_have_opened_the_block():
    assert THINKING["qwen3"].opened_by("<|im_start|>assistant\n<think>\n")
    assert not THINKING["qwen3"].opened_by("<think>\n\n</think>\n\n")
    for before, begun, opened in (
        ("hi<think>\n", "well, ", True),
        ("hi", "<think>\nwell, ", True),
        ("hi", "<think>well</think>so", False),
        ("hi<think>", "well</think>so ", False),
        ("hi", "of <think>", False),
    ):
        assert THINKING["qwen3"].opened_by(before + begun, begun) == opened
    assert said(parsed("hm</think>4", thinking="deepseek_v4", opened=True))[0] == "hm"
    assert said(parsed("hm</think>4", thinking="deepseek_v4"))[1] == "hm</think>4"
    # Some models open it once more.
    again = parsed("<think>\nhm\n</think>4", thinking="deepseek_r1", opened=True)
    assert said(again) == ("hm", "4", [])


def test_a_block_that_never_ends_is_all_reasoning():
    assert said(parsed("hm\n", thinking="qwen3", opened=True)) == ("hm\n", "", [])


def test_tags_further_on_are_text():
    text = "4 <think>no</think>"
    assert said(parsed(text, thinking="qwen3")) == ("", text, [])


def test_a_call_inside_a_block_was_thought_of_not_made():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    events = parsed(f"<think>{call}</think>4", thinking="qwen3", calls="hermes")
    assert said(events) == (call, "4", [])


HERMES = (
    'Let me look.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n'
    '</tool_call>\n<tool_call>{"arguments": {}, "name": "g"}</tool_call>'
)
LLAMA3 = (
    '<|python_tag|>{"name": "f", "parameters": {"a": [1, "}"]}}; '
    '{"type": "function", "name": "g", "arguments": {}}'
)
DSML = """

<｜DSML｜tool_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="a" string="false">[1, "}"]</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="g">

</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
EXAMPLES = {
    "hermes": HERMES,
    "llama3": LLAMA3,
    "deepseek_v4": "Let me look." + DSML,
}


@pytest.mark.parametrize("size", [None, 1, 2, 7])
@pytest.mark.parametrize("form", EXAMPLES)
def test_calls_are_read_in_every_form(form, size):
    reasoning, answer, calls = said(parsed(EXAMPLES[form], calls=form, size=size))
    assert (reasoning, answer) == ("", "" if form == "llama3" else "Let me look.")
    assert calls == [("f", '{"a": [1, "}"]}', True), ("g", "{}", True)]


@pytest.mark.parametrize("form", EXAMPLES)
def test_without_tools_calls_are_text(form):
    assert said(parsed(EXAMPLES[form])) == ("", EXAMPLES[form], [])


def test_raw_parameters_become_json_strings():
    value = 'He said "hi"\n\\o/ <b>日本</b> </parameter>'
    text = (
        f'<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="ä" string="true">{value}'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>"
    )
    for size in (None, 1, 5):
        [call] = said(parsed(text, calls="deepseek_v4", size=size))[2]
        assert json.loads(call[1]) == {"ä": value}


@pytest.mark.parametrize(
    "text",
    [
        DSML.replace("tool_calls", "function_calls"),
        DSML.replace("</｜DSML｜tool_calls>", ""),
        DSML.replace("<｜DSML｜tool_calls>", "").replace("</｜DSML｜tool_calls>", ""),
        DSML.replace("<｜DSML｜tool_calls>\n", ""),
        DSML.replace("</｜DSML｜invoke>\n<", "</｜DSML｜invoke><"),
    ],
    ids=["the older name", "no end", "no block", "no beginning", "no newline"],
)
def test_a_wrong_outer_block_loses_no_call(text):
    _, answer, calls = said(parsed(text, calls="deepseek_v4"))
    assert answer.strip() == "" and [call[0] for call in calls] == ["f", "g"]


@pytest.mark.parametrize(
    "form, text",
    [
        ("hermes", "<tool_call>"),
        ("hermes", "see <tool_call> tags </tool_call>"),
        ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": tru}, "name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
        ("llama3", 'Well: {"name": "f", "parameters": {}}'),
        ("llama3", '{"answer": 4}'),
        ("llama3", "{"),
        ("deepseek_v4", "<｜DSML｜tool_calls> are written so"),
        ("deepseek_v4", '<｜DSML｜invoke name="f {\n'),
        ("deepseek_v4", DSML.replace('<｜DSML｜parameter name="a" string', "<a x")),
        ("deepseek_v4", DSML.replace(' string="false"', "")),
        ("deepseek_v4", '<｜DSML｜invoke name="f">\n'),
    ],
)
@pytest.mark.parametrize("size", [None, 1])
def test_what_is_no_call_is_text(form, text, size):
    """A call that is wrong from its beginning is never run with what is left of it."""
    _, answer, calls = said(parsed(text, calls=form, size=size))
    if form == "deepseek_v4" and "g" in [call[0] for call in calls]:
        calls.remove(("g", "{}", True))  # The sound one beside it.
        text = text[: text.index('\n<｜DSML｜invoke name="g"')]
    assert calls == [] and answer.startswith(text)


@pytest.mark.parametrize(
    "form, text, arguments, rest",
    [
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1, b}}</tool_call>',
            '{"a": 1, ',
            "b}}</tool_call>",
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', '{"a": ', ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, x', "{}", ", x"),
        (
            "deepseek_v4",
            '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">yes'
            "</｜DSML｜parameter>",
            '{"a": ',
            "yes</｜DSML｜parameter>",
        ),
        (
            "deepseek_v4",
            '<｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">b'
            '</｜DSML｜parameter><｜DSML｜parameter name="a"',
            '{"a": "b"',
            '<｜DSML｜parameter name="a"',
        ),
    ],
)
@pytest.mark.parametrize("size", [None, 1])
def test_a_call_that_breaks_off_stays_unfinished(form, text, arguments, rest, size):
    _, answer, calls = said(parsed(text, calls=form, size=size))
    assert calls == [("f", arguments, False)] and answer == rest


def test_deep_values_are_refused_not_recursed_into():
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 5000
    assert said(parsed(text, calls="hermes"))[2][0][2] is False


def test_arguments_stream_while_they_are_written():
    parser = OutputParser(calls=CALLS["hermes"])
    parser.push('<tool_call>{"name": "f", "arguments": {"text": "Once')
    assert parser.push(" upon") == [Arguments(" upon")] and parser.held == 0


def test_tokenizers_tell_their_forms():
    tokenizer = tiny.tokenizer()
    assert detect(tokenizer) == (None, None)
    tokenizer.core.add_tokens(["<think>", "</think>"])
    assert detect(tokenizer) == ("qwen3", None)
    tokenizer.hf.chat_template = "{# <tool_call> #}"
    assert detect(tokenizer) == ("qwen3", "hermes")
    tokenizer.hf.chat_template = "{# <tool_call><function=f> #}"
    assert detect(tokenizer) == ("qwen3", None)
    tokenizer.hf.chat_template = "{# <tool_call> #}"
    tokenizer.core.add_tokens(["<｜Assistant｜>"])
    assert detect(tokenizer) == ("deepseek_r1", "hermes")
    tokenizer.core.add_tokens(["｜DSML｜"])
    assert detect(tokenizer) == ("deepseek_v4", "deepseek_v4")
    llama = tiny.tokenizer()
    llama.core.add_special_tokens(["<|python_tag|>"])
    assert detect(llama) == (None, "llama3")


@pytest.mark.parametrize("form", CALLS)
def test_nothing_but_white_space_is_lost(form, random):
    """Where no call begins, the answer is the text."""
    pieces = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": ',
        '{"name": "f", "parameters": {',
        '<tool_call>{"name": "f", "arguments": {',
        '"parameters": {"a": "b"}',
        "{}",
        "}",
        ",",
        "<｜DSML｜tool_calls>",
        "</｜DSML｜function_calls>",
        '<｜DSML｜invoke name="f">',
        "</｜DSML｜invoke>",
        '<｜DSML｜parameter name="a" string="false">',
        "</｜DSML｜parameter>",
        "<",
        "1",
        " ",
        "\n",
        "word",
    ]
    calls_seen = 0
    for _ in range(300):
        text = "".join(random.choice(pieces, size=random.integers(12)))
        size = int(random.integers(1, 9))
        _, answer, calls = said(parsed(text, calls=form, size=size))
        assert (answer, calls) == said(parsed(text, calls=form))[1:]
        calls_seen += bool(calls)
        if not calls:
            assert "".join(answer.split()) == "".join(text.split())
        for _, arguments, whole in calls:
            assert not whole or isinstance(json.loads(arguments), dict)
    assert calls_seen
