"""Conversations become prompts as transformers makes them; bad ones are named."""

import subprocess
import sys

import pytest

from jaxspark.checkpoints import CheckpointError, Tokenizer
from tests.checkpoints import tiny

HI = [{"role": "user", "content": "hi"}]


def render(template, messages=HI, **options):
    """The prompt's text, control tokens shown."""
    tokenizer = Tokenizer(
        core=tiny.tokenizer().core,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=template,
    )
    return tokenizer.decode(tokenizer.chat(messages, **options), skip_special=False)


PROGRAM = """
import jaxspark, sys
assert "transformers" not in sys.modules
from tests.checkpoints import tiny
tiny.tokenizer().encode("x")
assert "transformers" in sys.modules
"""


def test_transformers_is_imported_late_and_does_not_ask_for_pytorch():
    """Its import takes longer than all of ours; text needs it, ids do not."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_special_tokens_and_own_variables_reach_the_template():
    template = "{{ bos_token }}{% if thinking %}hm{% endif %}"
    assert render(template, thinking=True) == "<s>hm"
    assert render(template) == "<s>"


def test_templates_have_the_environment_of_transformers():
    assert render("{{ {'a': 'é<'} | tojson }}") == '{"a": "é<"}'
    assert render("{{ {'a': 'é'} | tojson(ensure_ascii=True) }}") == '{"a": "\\u00e9"}'
    assert render("{% generation %}x{% endgeneration %}y") == "xy"
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
    assert render(loop + "{% endfor %}") == "01"
    assert render("{% if true %}\n  a\n{% endif %}\n") == "  a\n"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_what_is_null_or_absent_is_not_printed():
    """Answers that only call tools have the content null in the form servers speak."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.name }}{% endfor %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    result = {"role": "tool", "content": "7", "tool_calls": None}
    expected = "[user]hi[assistant]f[tool]7"
    assert render(template, [*HI, call, result]) == expected
    del call["content"], result["tool_calls"]
    assert render(template, [*HI, call, result]) == expected
    assert render(template, [{"role": "tool", "content": None}]) == "[tool]"


def test_a_content_of_parts_reaches_the_template_whole():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = (
        "{% for p in messages[0].content %}{{ p.type }}={{ p.text }};{% endfor %}"
    )
    message = {"role": "user", "content": parts}
    assert render(template, [message]) == "text=a;text=b;"


def test_with_tools_the_template_for_tools_is_taken():
    named = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}

    def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: where
        """
        return city

    assert render(named) == "plain"
    assert render(named, tools=[{"function": {"name": "f"}}]) == "f"
    assert render(named, tools=[weather]) == "weather"
    assert render({"default": "plain"}, tools=[weather]) == "plain"
    with pytest.raises(CheckpointError, match="no default specified.*'tool_use'"):
        render({"tool_use": "x"})


def test_a_final_message_can_be_continued():
    template = (
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    chat = [*HI, {"role": "assistant", "content": "It is "}]
    assert render(template, chat) == "hi</s>It is </s>A:"
    assert render(template, chat, continue_final_message=True) == "hi</s>It is "
    with pytest.raises(CheckpointError, match="not compatible"):
        render(template, chat, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected"),
        ("{{ messages[9]['content'] + 'x' }}", "no element 9|undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10**9) | list }}", "[Rr]ange too big"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_an_error(template, words):
    with pytest.raises(
        CheckpointError, match=f"(?s)the chat template fails.*({words})"
    ):
        render(template)


def test_messages_that_are_none_are_named():
    with pytest.raises(CheckpointError, match="message 0 is 'hi', expected an object"):
        tiny.tokenizer().chat(["hi"])
    with pytest.raises(CheckpointError, match="message 1 is {}, expected an object"):
        tiny.tokenizer().chat([*HI, {}])
    with pytest.raises(CheckpointError, match="at least one message"):
        tiny.tokenizer().chat([])
    with pytest.raises(CheckpointError, match="has no chat template"):
        Tokenizer(core=tiny.tokenizer().core).chat(HI)


def test_half_of_a_surrogate_pair_is_named():
    """JSON can hold it; no tokenizer can."""
    tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match=r"'\\ud83d' at 2, after 'ab'"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.chat([{"role": "user", "content": "\ud83d"}])
