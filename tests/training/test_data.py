"""Conversations are read, answered by the target, marked; nothing is lost quietly."""

import json

import numpy as np
import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.decoding import generate
from jaxspark.evaluation.looping import is_looping
from jaxspark.training.data import (
    Conversation,
    Dropped,
    Problem,
    Regenerated,
    read_conversations,
    regenerate,
)
from jaxspark.training.data.documents import encode, read_documents
from tests.checkpoints.tiny import target, tokenizer


def conversation(*texts, answer_ids=None):
    """Turns of user and assistant."""
    roles = ("user", "assistant")
    return Conversation(
        messages=tuple(
            {"role": roles[i % 2], "content": text} for i, text in enumerate(texts)
        ),
        answer_ids=answer_ids,
        where="file:1",
    )


def test_only_answers_are_trainable():
    tok = tokenizer()
    document = encode(tok, conversation("ab", "cd", "e", "fg"))
    answers = [[]]
    for token, trainable in zip(document.ids_L, document.trainable_L):
        if trainable:
            answers[-1].append(int(token))
        elif answers[-1]:
            answers.append([])
    stop = tok.stop_ids[0]
    assert [ids[-1] for ids in answers if ids] == [stop, stop]
    assert [tok.decode(ids) for ids in answers if ids] == ["cd", "fg"]


def test_an_answer_ends_at_its_first_stop_whichever_that_is():
    """Where generation stops at two ids, what follows either is not an answer."""
    tok = tokenizer().with_stop_ids((257, 256))
    document = encode(tok, conversation("ab", "c<s>d"))
    assert tok.decode(document.ids_L[document.trainable_L]) == "c"


def test_a_first_message_by_the_assistant_answers_nothing():
    tok = tokenizer()
    hello = {"role": "assistant", "content": "hello"}
    rest = conversation("ab", "cd").messages
    document = encode(tok, Conversation(messages=(hello, *rest)))
    assert tok.decode(document.ids_L[document.trainable_L]) == "cd"
    assert "hello" in tok.decode(document.ids_L)
    with pytest.raises(ValueError, match="f:1: no message by the assistant that answ"):
        encode(tok, Conversation(messages=(hello,), where="f:1"))


def test_known_answer_ids_are_taken_as_they_are():
    tok = tokenizer()
    # A control token inside leaves no text; encoding the text would not bring it back.
    answer = [*tok.encode("c"), tok.stop_ids[0], *tok.encode("d")]
    assert tok.decode(answer) == "cd" and tok.encode("cd") != answer
    document = encode(tok, conversation("ab", "cd", answer_ids=tuple(answer)))
    assert document.ids_L[document.trainable_L].tolist() == answer


def test_answer_ids_of_another_target_are_refused():
    tok = tokenizer()
    other = conversation("ab", "cd", answer_ids=(5, 6, 7))
    with pytest.raises(ValueError, match="file:1: answer_ids say .*, the message 'cd'"):
        encode(tok, other)
    # A model may have more rows than its tokenizer has tokens.
    ids = (*tok.encode("cd"), 300)
    rows = [conversation("ab", "cd", answer_ids=ids)]
    [document], _ = read_documents(tok, rows, max_tokens=64, vocab_size=301)
    assert document.ids_L[-1] == 300
    with pytest.raises(ValueError, match="file:1: holds token 300, .* 300 tokens"):
        read_documents(tok, rows, max_tokens=64, vocab_size=300)


def test_a_template_that_rewrites_the_past_is_refused():
    tok = tokenizer()
    forgetful = tok.chat_template.replace("in messages", "in messages[-2:]")
    tok = Tokenizer(core=tok.core, stop_ids=tok.stop_ids, chat_template=forgetful)
    with pytest.raises(ValueError, match="file:1: the template rewrites"):
        encode(tok, conversation("ab", "cd", "e", "fg"))


def test_a_template_that_fails_is_named():
    template = "{{ raise_exception('no tools here') }}"
    tok = Tokenizer(core=tokenizer().core, chat_template=template)
    with pytest.raises(ValueError, match="file:1: .*no tools here"):
        encode(tok, conversation("ab", "cd"))


def test_long_documents_are_cut_and_counted():
    rows = [conversation("ab", "c" * 60), conversation("ab", "cd")]
    whole = [len(encode(tokenizer(), row).ids_L) for row in rows]
    documents, cut = read_documents(tokenizer(), rows, max_tokens=whole[1])
    assert (cut, [len(each.ids_L) for each in documents]) == (1, [whole[1]] * 2)


def test_lines_that_hold_no_conversation_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "é"}]}).encode()
    path.write_bytes(good + b'\n\n{"messages\n\xff\n[]\n' + good)
    rows = list(read_conversations([path]))
    assert [isinstance(row, Problem) for row in rows] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert [str(row).split("/")[-1][:22] for row in rows[1:4]] == [
        "data.jsonl:3: is not J",
        "data.jsonl:4: is not U",
        "data.jsonl:5: expected",
    ]


def test_dataset_folders_read_like_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "plain" / "train.parquet")
    for folder in ("saved", "plain"):
        read = list(read_conversations([tmp_path / folder]))
        assert [dict(row.messages[0]) for row in read] == [
            r["messages"][0] for r in rows
        ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a Hugging Face dataset folder"):
        list(read_conversations([tmp_path / "empty"]))


def questions(count):
    return [conversation(f"question {i}", "ignored") for i in range(count)]


def test_answers_are_the_targets_own_whatever_the_batch():
    model = target()
    options = dict(max_new_tokens=12, max_prompt_tokens=64)
    one = list(regenerate(model, questions(7), slots=1, **options))
    many = list(regenerate(model, questions(7), slots=3, **options))
    assert all(isinstance(each, Regenerated) for each in one)
    by_key = {each.key: each.conversation.answer_ids for each in many}
    assert {each.key: each.conversation.answer_ids for each in one} == by_key
    for each in one:
        prompt = model.tokenizer.chat(each.conversation.messages[:1])
        [plain] = generate(model, [prompt], max_new_tokens=12)
        assert list(each.conversation.answer_ids) == plain.tokens


def test_sampled_answers_depend_on_seed_and_prompt_alone():
    model = target()
    options = dict(max_new_tokens=8, max_prompt_tokens=64, temperature=1.0)

    def answers(rows, seed):
        found = regenerate(model, rows, slots=4, seed=seed, **options)
        return {each.key: each.conversation.answer_ids for each in found}

    forward, backward = answers(questions(6), 3), answers(questions(6)[::-1], 3)
    assert forward == backward
    assert forward != answers(questions(6), 4)


def test_what_gives_no_example_is_listed_with_its_reason():
    model = target()
    rows = [
        *questions(2),
        *questions(1),
        Problem("file:9", "is not JSON"),
        conversation("x" * 100, ""),
        Conversation(messages=({"role": "assistant", "content": "hi"},), where="f:2"),
    ]
    found = list(regenerate(model, rows, max_new_tokens=6, max_prompt_tokens=64))
    dropped = {each.where: each.reason for each in found if isinstance(each, Dropped)}
    assert dropped["file:9"] == "is not JSON"
    assert dropped["f:2"] == "no message by the user"
    assert dropped["file:1"].startswith("prompt of ")
    # The repeated question is answered once.
    assert sum(isinstance(each, Regenerated) for each in found) == 2


def test_looping_answers_are_dropped():
    model = target()
    # All logits equal: always the first token.
    model.model.lm_head.weight[...] *= 0
    found = list(regenerate(model, questions(3), max_new_tokens=70, slots=2))
    assert [each.reason for each in found] == ["the answer loops"] * 3


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1, 2, 3] * 30, True),
        (list(range(16)) * 4, True),
        (list(range(17)) * 4, False),
        ([1] * 63, False),
        ([7] + [1] * 64, True),
        ([1] * 64 + [7], False),
    ],
)
def test_looping_is_a_short_period_in_the_last_64_tokens(tokens, loops):
    assert is_looping(np.asarray(tokens)) is loops
