"""Text, tokens and everything counted by them end at the same place."""

import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.text import Ending, Output, ReadOptions
from jaxspark.text.events import CallBegins, Content, Reasoning, joined
from jaxspark.text.formats import CALLS, THINKING
from jaxspark.text.token_bytes import TokenBytes
from tests.checkpoints import tiny
from tests.text import folders


def read(tokenizer, ids, **options):
    """The output, and its events."""
    output, events = Output(tokenizer, ReadOptions(**options)), []
    for token in ids:
        events += output.push(token)
        if output.ending:
            break
    return output, joined(events + output.finish())


def test_the_token_that_completes_a_stop_is_the_last_one():
    tokenizer = tiny.tokenizer()
    output, events = read(tokenizer, tokenizer.encode("one END two"), stop=["END"])
    assert events == [Content("one ")]
    assert tokenizer.decode(output.tokens) == "one END"
    assert output.ending == Ending(by="END") and output.settled == 7
    with pytest.raises(ValueError, match="has ended"):
        output.push(0)


def test_a_stop_token_is_kept_and_has_no_text():
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer.encode("hi"), 257, *tokenizer.encode("x")]
    output, events = read(tokenizer, ids, stop_ids=(257,), skip_special=False)
    assert events == [Content("hi")] and output.tokens == ids[:3]
    assert output.ending == Ending(by=257) and output.settled == 3


def test_a_stop_in_fewer_tokens_than_asked_for_is_text():
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("a.b.c.")
    output, events = read(tokenizer, ids, stop=["."], min_tokens=3)
    assert events == [Content("a.b")] and len(output.tokens) == 4


def test_tokens_wait_for_their_characters():
    """Half a character, half a stop, half a tag: none is settled."""
    tokenizer = tiny.tokenizer()
    options = ReadOptions(stop=["END"], calls=CALLS["hermes"])
    output, settled = Output(tokenizer, options), []
    for token in tokenizer.encode("éEN<to é"):  # Two tokens each é.
        output.push(token)
        settled.append(output.settled)
    assert settled == [0, 2, 2, 2, 4, 4, 4, 7, 7, 10]


def test_a_stop_inside_a_run_of_bytes_ends_in_its_token():
    """Bytes of a run come together, with the token behind them."""
    tokenizer = Tokenizer(core=folders.byte_fallback(prefix=False))
    run = [tokenizer.core.token_to_id(f"<0x{byte:02X}>") for byte in b"AB!C"]
    the = tokenizer.encode("the")
    for ids in ([*the, *run, *the], [*the, *run]):
        output, events = read(tokenizer, ids, stop=["!"])
        assert events == [Content("theAB")]
        assert output.tokens == ids[: len(the) + 3]


def test_a_stop_inside_a_run_of_bytes_may_come_too_early():
    """It counts if its last byte is not among the first `min_tokens` less one."""
    tokenizer = Tokenizer(core=folders.byte_fallback(prefix=False))
    run = [tokenizer.core.token_to_id(f"<0x{byte:02X}>") for byte in b"A!C!"]
    the = tokenizer.encode("the")
    for ids in ([*run, *the], run, [*run, *the, *run]):
        for least in range(7):
            output, events = read(tokenizer, ids, stop=["!"], min_tokens=least)
            ends = [place + 1 for place, token in enumerate(ids) if token == run[1]]
            stop = next((end for end in ends if end >= least), None)
            assert output.tokens == ids[:stop]
            text = tokenizer.decode(ids[:stop])
            assert events == [Content(text[:-1] if stop else text)]


def test_a_text_that_comes_last_is_cut_as_well():
    """Cleaning up needs the whole text, so its stop is found at the end."""
    tokenizer = tiny.tokenizer()
    unigram = Tokenizer(core=folders.unigram())
    unigram.hf.clean_up_tokenization_spaces = True
    ids = unigram.encode("the weather is nice")
    output, events = read(unigram, ids, stop=["is"])
    assert events == [Content("the weather ")]
    assert unigram.decode(output.tokens).endswith("is")
    assert tokenizer is not unigram


def test_control_tokens_that_parsers_need_reach_them():
    tokenizer = tiny.tokenizer()
    tokenizer.core.add_special_tokens(["<|python_tag|>"])
    ids = tokenizer.encode('<s><|python_tag|>{"name": "f", "parameters": {}}')
    _, events = read(tokenizer, ids, calls=CALLS["llama3"])
    assert events[0] == CallBegins("f")
    assert read(tokenizer, ids)[1] == [Content('{"name": "f", "parameters": {}}')]
    assert read(tokenizer, ids, skip_special=False)[1][0].text.startswith("<s><|p")
    tokenizer.core.add_special_tokens(["<think>", "</think>"])
    ids = tokenizer.encode("<think>hm</think>yes")
    _, events = read(tokenizer, ids, thinking=THINKING["qwen3"])
    assert events == [Reasoning("hm"), Content("yes")]


def test_one_call_may_be_all_that_is_wanted():
    tokenizer = tiny.tokenizer()
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = tokenizer.encode(call * 2)
    output, events = read(tokenizer, ids, calls=CALLS["hermes"], one_call=True)
    assert len(events) == 3 and output.ending == Ending(by=None)
    assert tokenizer.decode(output.tokens) == call.removesuffix("</tool_call>")


def test_reasoning_tokens_are_counted():
    tokenizer = tiny.tokenizer()
    options = {"thinking": THINKING["deepseek_v4"], "opened": True}
    output, _ = read(tokenizer, tokenizer.encode("hm</think>yes"), **options)
    assert output.reasoning_tokens == len("hm</think>")
    output, _ = read(tokenizer, tokenizer.encode("hm hm"), **options)
    assert output.reasoning_tokens == 5
    output, _ = read(tokenizer, tokenizer.encode("yes"), thinking=THINKING["qwen3"])
    assert output.reasoning_tokens == 0


@pytest.mark.parametrize("make", [folders.byte_level, folders.llama3])
def test_bytes_of_tokens_are_those_of_the_text(make):
    tokenizer = Tokenizer(core=make())
    token_bytes, text = TokenBytes(tokenizer.core), "Größe — 日本 🎉 \u0085x<tool_call>"
    ids = tokenizer.core.encode(text, add_special_tokens=False).ids
    assert b"".join(map(token_bytes, ids)) == text.encode()


def test_bytes_of_pieces_and_of_byte_tokens():
    tokenizer = Tokenizer(core=folders.byte_fallback())
    token_bytes = TokenBytes(tokenizer.core)
    assert b"".join(map(token_bytes, tokenizer.encode("the é"))) == " the é".encode()
    assert token_bytes(10**6) == b""
