"""DeepSeek-V4's conversations, against prompts in files and against our own parser.

The files are what a published copy of the released checkpoints' encoder (`encoding/`)
makes of these conversations, with three exceptions: efforts of the later release have
their own words, and that encoder cannot leave a think block open.
"""

import json
from pathlib import Path

import pytest

from jaxspark.checkpoints import CheckpointError, Tokenizer
from jaxspark.checkpoints.tokenizer import load_tokenizer
from jaxspark.text.deepseek_v4 import encode_deepseek_v4
from jaxspark.text.dsml import MARK
from tests.checkpoints import tiny
from tests.text import folders
from tests.text.test_parsers import parsed, said

GOLDEN = Path(__file__).parent / "golden" / "deepseek_v4"
CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text("utf-8"))
HI = [{"role": "user", "content": "hi"}]
END = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_those_of_the_released_encoder(name):
    case = CONVERSATIONS[name]
    prompt = encode_deepseek_v4(case["messages"], **case.get("options", {}))
    assert prompt == (GOLDEN / f"{name}.txt").read_text("utf-8")


def test_every_file_has_its_conversation():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CONVERSATIONS)


def test_the_kinds_of_silence_are_one():
    quiet = encode_deepseek_v4(HI, thinking=False)
    assert quiet.endswith("<｜Assistant｜></think>")
    assert encode_deepseek_v4(HI, enable_thinking=False) == quiet
    assert encode_deepseek_v4(HI, reasoning_effort="none") == quiet
    assert encode_deepseek_v4(HI, thinking=False, reasoning_effort="max") == quiet


def test_words_of_openai_are_efforts_too():
    def prompts(edition, *efforts):
        return {
            encode_deepseek_v4(HI, reasoning_effort=effort, edition=edition)
            for effort in efforts
        }

    assert len(prompts("0731", None, "minimal", "low")) == 1
    assert len(prompts("0731", "medium", "high", "xhigh")) == 1
    assert len(prompts("0731", "low", "high", "max")) == 3
    assert len(prompts("preview", None, "low", "high")) == 1
    assert prompts("preview", "max") == prompts("0731", "high")


def test_parts_of_text_are_paragraphs():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts}
    assert "<｜User｜>a\n\nb<" in encode_deepseek_v4([message])


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "critic", "content": ""}, "message 0 has the role 'critic'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "reads text only"),
        ({"role": "user", "content": "", "task": "query"}, "has the field 'task'"),
        ({"role": "system", "content": "", "tools": [1]}, "has the field 'tools'"),
        ({"role": "assistant", "tool_calls": [{}]}, "call 0 is {}, expected a 'func"),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
            },
            "arguments of call 0 are .1., expected a JSON object",
        ),
    ],
)
def test_what_has_no_encoding_is_named(message, words):
    with pytest.raises(ValueError, match=words):
        encode_deepseek_v4([message])


def test_arguments_that_broke_off_are_one_parameter():
    """As the released encoder has it."""
    call = {"function": {"name": "f", "arguments": '{"city": "Pa'}}
    prompt = encode_deepseek_v4([*HI, {"role": "assistant", "tool_calls": [call]}])
    assert (
        f'<{MARK}invoke name="f">\n<{MARK}parameter name="arguments" string="true">'
        f'{{"city": "Pa</{MARK}parameter>\n</{MARK}invoke>'
    ) in prompt


def test_options_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="reasoning_effort is 'most', expected one of"):
        encode_deepseek_v4(HI, reasoning_effort="most")
    with pytest.raises(ValueError, match="edition is '1', expected one of preview, 07"):
        encode_deepseek_v4(HI, edition="1")
    with pytest.raises(ValueError, match="role 'user', is to be continued"):
        encode_deepseek_v4(HI, continue_final_message=True)


def test_what_is_written_is_read_again(random):
    """An answer in a prompt, given to the parsers, is the answer again."""
    words = ["a", "日本", '"', "\n", "<b>", "</", "{}", "\\", "é "]

    def text():
        return "".join(random.choice(words, size=random.integers(6)))

    for _ in range(200):
        calls = [
            {
                "name": f"f{i}",
                "arguments": {
                    key: [text(), 1.5, None, True, [text(), {}]][random.integers(5)]
                    for key in "abc"[: random.integers(4)]
                },
            }
            for i in range(random.integers(3))
        ]
        answer, reasoning = text().rstrip() if calls else text(), text()
        message = {
            "role": "assistant",
            "content": answer,
            "reasoning_content": reasoning,
            "tool_calls": [{"function": call} for call in calls],
        }
        prompt = encode_deepseek_v4([*HI, message])
        output = prompt.partition("<think>")[2].removesuffix(END)
        form = {"thinking": "deepseek_v4", "calls": "deepseek_v4", "opened": True}
        size = int(random.integers(1, 9))
        found, told, made = said(parsed(output, size=size, **form))
        assert (found, told) == (reasoning, answer)
        assert [(name, json.loads(args)) for name, args, _ in made] == [
            (call["name"], call["arguments"]) for call in calls
        ]


def test_folders_of_the_model_encode_chats(tmp_path):
    core = folders.byte_level()
    folder = folders.write(tmp_path, core, {}, model_type="deepseek_v4")
    tokenizer = load_tokenizer(folder).with_stop_ids([1])
    ids = tokenizer.chat(HI, enable_thinking=False)
    assert tokenizer.decode(ids) == encode_deepseek_v4(HI, thinking=False)
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert '{"name": "look"}' in tokenizer.decode(tokenizer.chat(HI, tools=tools))

    def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: where
        """
        return city

    assert '"Tells the weather."' in tokenizer.decode(
        tokenizer.chat(HI, tools=[weather])
    )
    with pytest.raises(CheckpointError, match="unexpected keyword.*'documents'"):
        tokenizer.chat(HI, documents=[{}])
    with pytest.raises(CheckpointError, match="at least one message"):
        tokenizer.chat([])


def test_a_template_goes_before_the_encoder():
    tokenizer = Tokenizer(
        core=tiny.tokenizer().core,
        chat_template="plain",
        chat_encoder=encode_deepseek_v4,
    )
    assert tokenizer.decode(tokenizer.chat(HI)) == "plain"
