"""Ids, prompts and streamed text are those of transformers, for what people have."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspark.checkpoints import CheckpointError
from jaxspark.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from jaxspark.text import TextStream
from jaxspark.text.transformers_library import quiet_transformers
from tests.text import folders

# The same messages in every run; a failure prints the one it is about.
EXAMPLES = settings(
    max_examples=500, derandomize=True, deadline=None, database=None, print_blob=True
)

FRAGMENTS = [
    *("the weather", " ", "  ", "\n", "isn't", " .", "1234", "Größe", "日本", "é"),
    *("😀😀", "👩‍👩‍👧", "\ufffd", "\u2028", "\x00", "▁", "<0x41>", "{{ x }}"),
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<new>", "<|call|>"),
]
texts = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(st.characters(codec="utf-8"), max_size=3),
    max_size=5,
).map("".join)
calls = st.builds(
    lambda name, value: {"function": {"name": name, "arguments": {"x": value}}},
    texts,
    texts | st.integers(),
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
    optional={
        "content": texts | st.none() | st.lists(st.builds(dict, text=texts)),
        "tool_calls": st.none() | st.lists(calls, max_size=2),
    },
)
tools = st.builds(
    lambda name, text: {"function": {"name": name, "description": text}}, texts, texts
)
chats = st.fixed_dictionaries(
    {
        "messages": st.lists(messages, min_size=1, max_size=4),
        "tools": st.none() | st.lists(tools, max_size=2),
        "documents": st.none()
        | st.lists(st.builds(lambda t: {"title": t, "text": t}, texts), max_size=1),
    }
)
endings = st.sampled_from(
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ]
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of each kind: the transformers tokenizer, and ours."""
    root = tmp_path_factory.mktemp("kinds")
    result = {}
    for name, folder in folders.every_kind(root).items():
        with quiet_transformers() as transformers:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
        result[name] = theirs, load_tokenizer(folder)
    return result


def ids_or_none(function, *args, error, **options):
    """None for an error."""
    try:
        return list(function(*args, **options))
    except error:
        return None


@EXAMPLES
@given(chat=chats, ending=endings)
def test_chat_prompts_are_those_of_transformers(pairs, chat, ending):
    chat = dict(chat)
    conversation = chat.pop("messages")
    options = chat | ending
    for name, (theirs, ours) in pairs.items():
        expected = ids_or_none(
            theirs.apply_chat_template,
            conversation,
            return_dict=False,
            error=Exception,
            **options,
        )
        ids = ids_or_none(ours.chat, conversation, error=CheckpointError, **options)
        assert ids == expected, name


@EXAMPLES
@given(
    text=texts,
    noise=st.lists(st.floats(0, 1, exclude_max=True), max_size=8),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_ids_texts_and_streams_are_those_of_transformers(pairs, text, noise, cuts):
    """Also of ids that are no text: half characters, control tokens anywhere."""
    for name, (theirs, ours) in pairs.items():
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, name
        ids += [int(len(theirs) * place) for place in noise]
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), name
        whole = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == whole, name
        stream, pieces, rest = TextStream(ours), "", ids
        for step in itertools.cycle(cuts):
            pieces += stream.push(rest[:step])
            rest = rest[step:]
            if not rest:
                break
        assert whole.startswith(pieces), name
        assert pieces + stream.flush() == whole, name


def test_every_kind_answers_and_refuses(pairs):
    """The properties above compare something: no kind fails on everything."""
    question = [{"role": "user", "content": "the weather"}]
    for name, (_, ours) in pairs.items():
        assert "the weather" in ours.decode(ours.chat(question)), name


def test_what_is_written_is_read_again(pairs, tmp_path):
    for name, (theirs, ours) in pairs.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        save_tokenizer(folder, ours)
        again = load_tokenizer(folder)
        assert again.core.to_str() == ours.core.to_str(), name
        assert again.special_tokens == ours.special_tokens, name
        assert again.chat_template == theirs.chat_template, name
        assert again.cleans_up == ours.cleans_up, name
        assert again.stop_ids == ours.stop_ids, name
        assert again.hf.all_special_tokens == theirs.all_special_tokens, name
