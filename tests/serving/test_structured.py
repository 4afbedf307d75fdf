"""Structured output as OpenAI's own client sees it: it parses, and is told in full."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from jaxspark.generation import Request, generate
from jaxspark.grammars import Grammar, GrammarError, Matcher
from jaxspark.serving.sampling import seed_of

HI = [{"role": "user", "content": "Hi."}]
CHAT = {"model": "tiny", "messages": HI, "max_tokens": 60}
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["n", "ok"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def tool(name):
    return {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}},
                "required": ["a"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            },
        },
    }


def plain(server, grammar, **params):
    """What `generate` gives under the grammar without drafts."""
    request = Request(
        server.target.tokenizer.chat(HI), max_new_tokens=60, grammar=grammar, **params
    )
    [completion] = generate(server.target, [request], coupling="gumbel", capacity=128)
    return completion


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_of_a_schema_is_what_plain_decoding_gives(server, client, temperature):
    answer = client.chat.completions.create(
        **CHAT, response_format=FORMAT, temperature=temperature, seed=4
    )
    [choice] = answer.choices
    value = json.loads(choice.message.content)
    assert 0 <= value["n"] <= 99 and isinstance(value["ok"], bool)
    assert choice.finish_reason == "stop"
    expected = plain(
        server,
        Grammar(kind="json_schema", value=SCHEMA),
        temperature=float(temperature),
        seed=seed_of(4, 0),
    )
    assert choice.message.content == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_gives_up_is_the_clients_error(client, monkeypatch, stream):
    compute, calls = Matcher._compute, []

    def fails(self):
        calls.append(self)
        if len(calls) > 6:
            raise GrammarError("the grammar gave up: too complex")
        return compute(self)

    monkeypatch.setattr(Matcher, "_compute", fails)
    with pytest.raises(openai.APIError, match="too complex") as error:
        asked = {**CHAT, "response_format": FORMAT, "seed": 4, "stream": stream}
        list(client.chat.completions.create(**asked))
    assert error.value.type == "invalid_request_error"
    if not stream:
        assert error.value.status_code == 400
    free = client.chat.completions.create(**CHAT, seed=4)
    assert free.choices[0].finish_reason


def test_answers_under_grammars_run_beside_free_ones(server, client):
    """More than there are slots, streamed and whole; free ones stay as they are."""
    free = {**CHAT, "temperature": 1, "seed": 3, "max_tokens": 40}
    alone = client.chat.completions.create(**free).choices[0].message.content

    def ask(place):
        if place % 3 == 0:
            return client.chat.completions.create(**free).choices[0].message.content
        asked = {**CHAT, "seed": place, "n": 2, "response_format": FORMAT}
        texts = ["", ""]
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, range(9)))
    for place, answer in enumerate(answers):
        if place % 3 == 0:
            assert answer == alone
        else:
            assert all(json.loads(text)["n"] <= 99 for text in answer)
    assert server.engine.stats().late_compilations == 0


def test_any_json_object_may_be_asked_for(client):
    ended = 0
    for seed in range(4):
        answer = client.chat.completions.create(
            **CHAT, response_format={"type": "json_object"}, seed=seed
        )
        [choice] = answer.choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(choice.message.content), dict)
    assert ended


@pytest.mark.parametrize(
    "wanted, right",
    [
        ({"choice": ["yes", "no"]}, ("yes", "no")),
        ({"regex": "[ab]{3}"}, [a + b + c for a in "ab" for b in "ab" for c in "ab"]),
        ({"json": {"const": 5}}, ("5",)),
        ({"grammar": 'start: "x" | "y"'}, ("x", "y")),
    ],
)
def test_vllms_fields_do_the_same(client, wanted, right):
    body = {"structured_outputs": wanted}
    answer = client.chat.completions.create(**CHAT, extra_body=body)
    assert answer.choices[0].message.content in right
    completion = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=9, extra_body=body
    )
    assert completion.choices[0].text in right
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_forced(client, stream):
    for choice, names in (
        ("required", {"f", "g"}),
        ({"type": "function", "function": {"name": "g"}}, {"g"}),
    ):
        asked = {**CHAT, "tools": [tool("f"), tool("g")], "tool_choice": choice}
        answer = client.chat.completions.create(
            **asked, stream=stream, parallel_tool_calls=False
        )
        if stream:
            calls, text, chunks = [], "", list(answer)
            for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                calls += chunk.choices[0].delta.tool_calls or []
            name = calls[0].function.name
            arguments = "".join(each.function.arguments or "" for each in calls)
            reason = chunks[-1].choices[0].finish_reason
        else:
            message = answer.choices[0].message
            [call] = message.tool_calls
            name, arguments = call.function.name, call.function.arguments
            text, reason = message.content or "", answer.choices[0].finish_reason
        assert name in names and json.loads(arguments)["a"] in (1, 2)
        assert (text, reason) == ("", "tool_calls")


def test_what_is_no_grammar_is_told_by_name(client):
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="keys: .*not") as error:
        client.chat.completions.create(**CHAT, response_format=bad)
    assert error.value.param == "response_format"
    broken = tool("f")
    broken["function"]["parameters"] = {"properties": {"a": {"type": "odd"}}}
    with pytest.raises(openai.BadRequestError, match="odd") as error:
        client.chat.completions.create(**CHAT, tools=[broken], tool_choice="required")
    assert error.value.param == "tool_choice"
