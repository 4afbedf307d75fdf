"""Text appears as early as it is certain, and never changes."""

import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.text import TextStream
from tests.checkpoints import tiny
from tests.text import folders


def streamed(tokenizer, ids):
    """The piece that each id brings, and the rest."""
    stream = TextStream(tokenizer)
    return [stream.push([i]) for i in ids], stream.flush()


def test_half_a_character_is_never_printed():
    tokenizer = tiny.tokenizer()
    pieces = ["a", "", "", "", "🎉", "", "é"]
    assert streamed(tokenizer, tokenizer.encode("a🎉é")) == (pieces, "")


def test_a_character_that_never_ends_appears_at_the_flush():
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("a🎉")[:3]
    assert streamed(tokenizer, ids) == (["a", "", ""], "\ufffd")


def test_a_stream_begins_anew_after_its_flush():
    tokenizer = Tokenizer(core=folders.byte_fallback())
    stream = TextStream(tokenizer)
    for _ in range(2):
        assert stream.push(tokenizer.encode("the")) + stream.flush() == "the"
    assert stream.push([]) == stream.flush() == ""


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_bytes_of_a_run_wait_for_its_end(cut):
    """One broken byte makes replacement characters of the whole run."""
    tokenizer = Tokenizer(core=folders.byte_fallback())
    run = tokenizer.encode("日本")
    run = run[: len(run) - cut]
    text = "日本" if cut == 0 else "\ufffd" * (6 - cut)
    pieces, rest = streamed(tokenizer, run)
    assert ("".join(pieces), rest) == ("", text)
    pieces, rest = streamed(tokenizer, [*run, *tokenizer.encode("the")])
    assert pieces[len(run)] == text + " the" and rest == ""


def test_a_skipped_token_keeps_the_space_behind_it():
    tokenizer = Tokenizer(core=folders.byte_fallback())
    the, control = tokenizer.encode("the"), tokenizer.core.token_to_id("<|im_end|>")
    assert streamed(tokenizer, [*the, control, *the]) == (["the", "", " the"], "")


def test_the_work_per_token_does_not_grow_with_the_text(monkeypatch):
    """Until the end, no text is decoded but the stream's own short window."""
    tokenizer = tiny.tokenizer()
    ids, stream = tokenizer.encode("héllo wörld " * 50), TextStream(tokenizer)
    monkeypatch.setattr(Tokenizer, "decode", None)
    assert "".join(stream.push([i]) for i in ids) == "héllo wörld " * 50
