"""Conversations are read, answered by the target, marked; nothing is lost quietly."""

import dataclasses
import json

import numpy as np
import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.generation import generate
from jaxspark.text.looping import is_looping
from jaxspark.training.data import (
    Conversation,
    Dropped,
    MalformedRow,
    Regenerated,
    read_conversations,
    regenerate,
)
from jaxspark.training.data.documents import encode, read_documents
from tests.checkpoints.tiny import TEMPLATE, target, tokenizer


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
    [document], _, _ = read_documents(tok, rows, max_tokens=64, vocab_size=301)
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
    documents, cut, _ = read_documents(tokenizer(), rows, max_tokens=whole[1])
    assert (cut, [len(each.ids_L) for each in documents]) == (1, [whole[1]] * 2)


def test_lines_that_hold_no_conversation_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "é"}]}).encode()
    path.write_bytes(good + b'\n\n{"messages\n\xff\n[]\n' + good)
    rows = list(read_conversations([path]))
    assert [isinstance(row, MalformedRow) for row in rows] == [
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


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_only_the_training_split_of_a_dataset_is_read(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    splits = {
        name: datasets.Dataset.from_list(
            [{"messages": [{"role": "user", "content": f"{name} {i}"}]} for i in (0, 1)]
        )
        for name in ("test", "train", "validation")
    }
    folder = tmp_path / "data"
    folder.mkdir()
    if form == "saved":
        datasets.DatasetDict(splits).save_to_disk(folder)
    for name, rows in splits.items():
        if form == "jsonl":
            rows.to_json(folder / f"{name}.jsonl")
        elif form == "parquet":
            rows.to_parquet(folder / f"{name}.parquet")
    with pytest.warns(UserWarning, match="train is read, .*(test|validation) left out"):
        rows = list(read_conversations([folder]))
    assert [row.messages[0]["content"] for row in rows] == ["train 0", "train 1"]


def test_a_dataset_that_does_not_say_what_to_train_on_is_refused(tmp_path):
    pytest.importorskip("datasets")
    line = json.dumps({"messages": [{"role": "user", "content": "q"}]}) + "\n"
    (tmp_path / "test.jsonl").write_text(line)
    with pytest.warns(UserWarning, match="test is read, the only split"):
        assert len(list(read_conversations([tmp_path]))) == 1
    (tmp_path / "validation.jsonl").write_text(line)
    with pytest.raises(ValueError, match="splits .*test.*, expected train"):
        list(read_conversations([tmp_path]))


def test_a_bad_line_in_a_dataset_folder_is_its_own_problem(tmp_path):
    pytest.importorskip("datasets")
    good = json.dumps({"messages": [{"role": "user", "content": "q"}]})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{{broken\n{good}\n")
    first, bad, last = read_conversations([tmp_path])
    assert first.messages == last.messages
    assert str(bad).startswith(f"{tmp_path / 'train.jsonl'}:2: is not JSON")


def test_tools_and_calls_without_text_reach_the_template(tmp_path):
    row = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
        ],
    }
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    [spoken] = read_conversations([path])
    tok = tokenizer()
    template = (
        "{{ tools[0].name }}|{% for m in messages %}{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}<s>{{ call.name }}</s>{% endfor %}"
        "{% endfor %}"
    )
    tok = Tokenizer(core=tok.core, stop_ids=tok.stop_ids, chat_template=template)
    document = encode(tok, spoken)
    assert tok.decode(document.ids_L) == "add|1+1add"
    assert tok.decode(document.ids_L[document.trainable_L]) == "add"
    path.write_text(json.dumps(row | {"tools": None}))
    [other] = read_conversations([path])
    assert other.key != spoken.key


NO_CONVERSATIONS = {
    "half a surrogate pair": (
        '{"messages":[{"role":"user","content":"cut \\ud83d"},'
        '{"role":"assistant","content":"ok"}]}'
    ),
    "5,000 digits": '{"messages": ' + "1" * 5000 + "}",
    "100,000 brackets": "[" * 100_000,
    "a huge token id": (
        '{"messages":[{"role":"user","content":"q"},'
        '{"role":"assistant","content":"a"}],"answer_ids":[99999999999999999999999]}'
    ),
    "a token the target does not have": (
        '{"messages":[{"role":"user","content":"q"},'
        '{"role":"assistant","content":"a"}],"answer_ids":[64, 777]}'
    ),
    "a role that is no text": '{"messages":[{"role":7,"content":"q"}]}',
    "no text": '{"messages":[{"role":"user","content":null}]}',
    "parts instead of a text": (
        '{"messages":[{"role":"user","content":[{"type":"text","text":"q"}]}]}'
    ),
    "tools that are no list": (
        '{"messages":[{"role":"user","content":"q"},'
        '{"role":"assistant","content":"a"}],"tools":"[]"}'
    ),
    "a template that refuses it": (
        '{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},'
        '{"role":"assistant","content":"a"}]}'
    ),
}
PICKY = TEMPLATE.replace(
    "<s>", "{% if message.role == 'system' %}{{ 1 + message.role }}{% endif %}<s>", 1
)


def test_bad_lines_end_no_run(tmp_path):
    core = tokenizer().core
    picky = Tokenizer(core=core, stop_ids=(257,), chat_template=PICKY)
    model = dataclasses.replace(target(), tokenizer=picky)
    good = (
        '{"messages":[{"role":"user","content":"%s"},'
        '{"role":"assistant","content":"answer"}]}'
    )
    path = tmp_path / "data.jsonl"
    lines = [good % "first", *NO_CONVERSATIONS.values(), good % "last"]
    path.write_text("\n".join(lines))
    named = {f"{path}:{i}" for i in range(2, len(lines))}
    documents, _, dropped = read_documents(
        model.tokenizer, read_conversations([path]), max_tokens=64, vocab_size=300
    )
    assert len(documents) == 2
    assert {each.where for each in dropped if each.reason} == named
    rows = read_conversations([path])
    found = list(
        regenerate(model, rows, slots=2, max_prompt_tokens=60, max_new_tokens=4)
    )
    # Where only the old answer is bad, the target writes another.
    place = list(NO_CONVERSATIONS).index("a token the target does not have") + 2
    dropped = [each for each in found if isinstance(each, Dropped)]
    assert {each.where for each in dropped} == named - {f"{path}:{place}"}
    assert len(found) - len(dropped) == 3


def test_data_of_nothing_but_bad_lines_are_an_error_with_reasons(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("[\n" * 5)
    with pytest.raises(ValueError, match=r"data.jsonl:1: is not JSON.*and 2 more"):
        read_documents(tokenizer(), read_conversations([path]), max_tokens=9)


def questions(count):
    return [conversation(f"question {i}", "ignored") for i in range(count)]


def test_answers_are_the_targets_own_whatever_the_batch():
    model = target()
    options = dict(max_new_tokens=12, max_prompt_tokens=64)
    one = list(regenerate(model, questions(7), slots=1, **options))
    many = list(regenerate(model, questions(7), slots=2, **options))
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
        found = regenerate(model, rows, slots=2, seed=seed, **options)
        return {each.key: each.conversation.answer_ids for each in found}

    forward, backward = answers(questions(6), 3), answers(questions(6)[::-1], 3)
    assert forward == backward
    assert forward != answers(questions(6), 4)


def test_what_gives_no_example_is_listed_with_its_reason():
    model = target()
    rows = [
        *questions(2),
        *questions(1),
        MalformedRow("file:9", "is not JSON"),
        conversation("x" * 100, ""),
        Conversation(messages=({"role": "assistant", "content": "hi"},), where="f:2"),
    ]
    options = dict(max_new_tokens=6, max_prompt_tokens=64, slots=2)
    found = list(regenerate(model, rows, **options))
    dropped = {each.where: each.reason for each in found if isinstance(each, Dropped)}
    assert dropped["file:9"] == "is not JSON"
    assert dropped["f:2"] == "no message by the user"
    assert dropped["file:1"].startswith("prompt of ")
    # The repeated question is answered once.
    assert sum(isinstance(each, Regenerated) for each in found) == 2


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped():
    model = target()  # 128 positions
    rows = [*questions(1), conversation("x" * 120, "")]
    options = dict(max_new_tokens=6, max_prompt_tokens=999, slots=2)
    found = list(regenerate(model, rows, **options))
    [dropped] = [each for each in found if isinstance(each, Dropped)]
    assert dropped.reason.endswith("tokens, the limit is 122") and len(found) == 2
    with pytest.raises(ValueError, match="no room for a prompt: .* 128 positions"):
        next(regenerate(model, rows, max_new_tokens=128))


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
