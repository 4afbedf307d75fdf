"""Evaluation takes the prompts there are, and says what it passes over."""

import json

import pytest

from jaxspark.evaluation.prompts import DOMAINS, in_turn, load_prompts
from tests.checkpoints.tiny import tokenizer


def write(folder, **lines):
    """One file per domain, with one good prompt unless given other lines."""
    for domain in DOMAINS:
        good = [json.dumps({"turns": [domain]})]
        text = "\n".join(lines.get(domain, good))
        (folder / f"{domain}_prompts.jsonl").write_text(text, encoding="utf-8")


def prompts(*texts):
    return [json.dumps({"turns": [text]}, ensure_ascii=False) for text in texts]


def test_a_prompt_may_hold_any_separator_of_lines(tmp_path):
    texts = ["first\u2028second", "a\x85b", "c\u2029d"]
    write(tmp_path, math=prompts(*texts))
    tok = tokenizer()
    read = load_prompts(tmp_path, tok, per_domain=3, domains=("math",))
    chats = [tok.chat([{"role": "user", "content": text}]) for text in texts]
    assert read == {"math": chats}


def test_fewer_prompts_than_asked_for_are_all_taken_and_told(tmp_path):
    write(tmp_path, math=prompts(*"abcdefghijk"))
    with pytest.warns(UserWarning, match="has 11 prompts of at most 384 .*; 11 are"):
        read = load_prompts(tmp_path, tokenizer(), per_domain=20)
    assert {domain: len(each) for domain, each in read.items()} == {
        "math": 11,
        "code": 1,
        "chat": 1,
    }
    assert len(in_turn(read)) == 13


def test_a_bad_line_is_told_and_passed_over(tmp_path):
    bad = ["[", '{"turns": []}', '{"turns": "text"}', '{"turns": [null]}', "7"]
    write(tmp_path, code=[*prompts("a"), *bad, *prompts("b")])
    with pytest.warns(UserWarning, match="5 lines are none .*jsonl:2: is not JSON"):
        read = load_prompts(tmp_path, tokenizer(), per_domain=2, domains=("code",))
    assert len(read["code"]) == 2


def test_no_prompt_that_fits_is_an_error(tmp_path):
    write(tmp_path, chat=prompts("x" * 99))
    with pytest.raises(ValueError, match="chat_prompts.*has 0 prompts of at most 50"):
        load_prompts(tmp_path, tokenizer(), per_domain=1, max_tokens=50)
