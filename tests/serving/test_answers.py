"""Answers and chunks have the form that OpenAI's clients read."""

import json

import httpx
import openai
import pytest

from jaxspark.serving import (
    DONE,
    ApiError,
    ChatAssembler,
    ChatRequest,
    CompletionAssembler,
    CompletionRequest,
    Ended,
    Prefilled,
    Sampled,
    Tokens,
    event,
    prepare_chat,
    prepare_completion,
)
from jaxspark.text import Tokenizer
from jaxspark.text.deepseek_v4 import encode_deepseek_v4
from jaxspark.text.dsml import MARK
from tests.checkpoints import tiny
from tests.serving.wire import (
    END,
    HI,
    WEATHER,
    added_up,
    run,
    sampled,
    served,
    whole,
)

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
OUTPUT = f"<think>\nRain?\n</think>\n\nLet me look.\n{CALL}"


def chat(model=None, **fields):
    body = {"model": "tiny", "messages": HI, "stream": True}
    request = ChatRequest.read(body | fields)
    model = model or served(thinking="qwen3", calls="hermes")
    return ChatAssembler(prepare_chat(request, model, id="x", created=1))


def complete(**fields):
    body = {"model": "tiny", "prompt": "hi", "stream": True}
    request = CompletionRequest.read(body | fields)
    return CompletionAssembler(prepare_completion(request, served(), id="x", created=1))


def ids_of(text):
    return tiny.tokenizer().encode(text)


def answer(assembler, text, reason="length", **changes):
    run(assembler, sampled(ids_of(text)), reason=reason, **changes)
    return whole(assembler)


def test_an_answer_is_whole():
    assembler = chat(tools=[WEATHER], temperature=0)
    ids = [*ids_of(OUTPUT), END]
    run(assembler, sampled(ids), cached=4)
    told = whole(assembler)
    call = told["choices"][0]["message"]["tool_calls"][0]
    assert call.pop("id").startswith("call_")
    prompt = len(tiny.tokenizer().chat(HI))
    assert told == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Let me look.",
                    "reasoning": "Rain?",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {
                                "name": "weather",
                                "arguments": '{"city": "Köln"}',
                            },
                        }
                    ],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": len(ids),
            "total_tokens": prompt + len(ids),
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {
                "reasoning_tokens": len("<think>\nRain?\n</think>")
            },
        },
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason():
    assembler = chat(stream=True, stream_options={"include_usage": True})
    first, *middle, last, usage = map(
        json.loads, run(assembler, sampled([*ids_of("é!"), END]))
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk" and first["usage"] is None
    assert [each["choices"][0]["delta"] for each in middle] == [
        {"content": "é"},
        {"content": "!"},
    ]
    [choice] = last["choices"]
    assert (choice["delta"], choice["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4


def test_each_token_is_its_own_chunk_however_many_come():
    """The size of chunks must not tell how many drafts were accepted."""
    assembler = chat(stream=True)
    chunks = run(assembler, sampled(ids_of("four")), sizes=[4])
    assert len(chunks) == 1 + 4 + 1
    assembler = chat(stream=True, stream_interval=3)
    assert len(run(assembler, sampled(ids_of("four")), sizes=[4])) == 1 + 2 + 1


@pytest.mark.parametrize(
    "text, reason, expected",
    [
        ("x", "length", ("length", None)),
        ("x", "stop", ("stop", None)),
        ("x", "cancelled", ("abort", None)),
        ("x END y", "length", ("stop", "END")),
        (CALL, "stop", ("tool_calls", None)),
        (CALL, "length", ("length", None)),
        (CALL[:-20], "stop", ("stop", None)),
        (CALL + CALL[:-20], "stop", ("stop", None)),
    ],
)
def test_reasons_are_those_of_openai(text, reason, expected):
    assembler = chat(tools=[WEATHER], stop="END")
    [choice] = answer(assembler, text, reason)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == expected


def test_a_stop_token_of_the_client_is_told():
    assembler = chat(stop_token_ids=[9])
    run(assembler, sampled([40, 9, 41]))
    [choice] = whole(assembler)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 9)


def test_a_length_cap_does_not_hide_a_stop_inside_it():
    """sgl-project/sglang#31599: the last block had both."""
    assembler = chat(stop=["END"])
    chunks = run(assembler, sampled(ids_of("one END tw")), sizes=[10])
    assert "tw" not in "".join(chunks)
    told = whole(assembler)
    assert told["choices"][0]["message"]["content"] == "one "
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["completion_tokens"] == len("one END")


def test_the_engine_may_stop_an_output_that_has_ended():
    assembler = chat(stop=["END"], n=2)
    assert assembler.wants(0) and assembler.wants(1)
    assembler.push(Tokens(choice=1, tokens=sampled(ids_of("END"))))
    assert assembler.wants(0) and not assembler.wants(1)
    assert assembler.push(Tokens(choice=1, tokens=sampled([40]))) == []
    assert assembler.push(Ended(choice=1, reason="error", error="late")) == []
    assembler.push(Ended(choice=0, reason="length"))
    assert assembler.finished and [
        choice["finish_reason"] for choice in whole(assembler)["choices"]
    ] == ["length", "stop"]


def test_one_call_is_enough_where_calls_may_not_be_parallel():
    assembler = chat(tools=[WEATHER], parallel_tool_calls=False)
    [choice] = answer(assembler, CALL * 2, "stop")["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


# As Qwen3 writes calls, whose arguments may be text.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({% if call.function.arguments is string %}"
    "{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}"
    "{% endif %}){% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "form, encoder, output, back",
    [
        (
            "hermes",
            {"chat_template": TEMPLATE},
            CALL[: CALL.index("ln")],
            'weather({"city": "Kö)',
        ),
        (
            "deepseek_v4",
            {"chat_encoder": encode_deepseek_v4},
            f'<{MARK}tool_calls>\n<{MARK}invoke name="weather">\n'
            f'<{MARK}parameter name="city" string="true">Kö',
            f'<{MARK}invoke name="weather">\n<{MARK}parameter name="arguments" '
            f'string="true">{{"city": "Kö</{MARK}parameter>',
        ),
    ],
)
def test_a_call_that_was_cut_off_can_be_sent_back(form, encoder, output, back):
    tokenizer = Tokenizer(core=tiny.tokenizer().core, stop_ids=(END,), **encoder)
    model = served(tokenizer, calls=form, context=10**5)
    [choice] = answer(chat(model, tools=[WEATHER]), output)["choices"]
    message = choice["message"]
    [call] = message["tool_calls"]
    assert choice["finish_reason"] == "length"
    assert call["function"]["arguments"] == '{"city": "Kö'
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Cut off."}
    prepared = chat(model, tools=[WEATHER], messages=[*HI, message, result]).prepared
    assert back in tokenizer.decode(prepared.demands[0].request.prompt)


def test_calls_have_ids_of_their_own():
    assembler = chat(tools=[WEATHER], n=2)
    for choice in (0, 1):
        run(assembler, sampled(ids_of(CALL * 2)), choice=choice)
    choices = whole(assembler)["choices"]
    calls = [call for c in choices for call in c["message"]["tool_calls"]]
    assert len({call["id"] for call in calls}) == 4


def test_silence_is_no_content_beside_calls_or_reasoning():
    def content(text, **fields):
        [choice] = answer(chat(**fields), text)["choices"]
        return choice["message"]["content"]

    assert content("") == ""
    assert content(CALL, tools=[WEATHER]) is None
    assert content("<think>hm") is None
    assert content(CALL) == CALL


def test_log_probs_lie_beside_the_tokens_that_are_sent():
    assembler = chat(logprobs=True, top_logprobs=2, stop=["ab"])
    chunks = [
        json.loads(chunk)["choices"][0]
        for chunk in run(assembler, sampled(ids_of("éxaxabz"), top=2))
    ]
    assert [
        (
            choice["delta"].get("content"),
            [entry["token"] for entry in (choice["logprobs"] or {}).get("content", [])],
        )
        for choice in chunks[1:]
    ] == [
        ("é", ["\ufffd", "\ufffd"]),
        ("x", ["x"]),
        ("ax", ["a", "x"]),
        (None, ["a", "b"]),
    ]
    [first, *_] = chunks[1]["logprobs"]["content"]
    assert first["bytes"] == ["é".encode()[0]] and first["logprob"] == 0
    assert [top["logprob"] for top in first["top_logprobs"]] == [0, -0.125]


def test_no_log_probability_is_below_what_json_can_say():
    assembler = chat(logprobs=True)
    run(assembler, [Sampled(token=40, log_prob=float("-inf"))])
    [entry] = whole(assembler)["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -9999.0
    with pytest.raises(ValueError, match="no log-probability, and one was asked for"):
        run(chat(logprobs=True), [Sampled(token=40)])


def test_token_ids_are_told_where_they_are_wanted():
    assembler = chat(return_token_ids=True)
    first, *rest = map(json.loads, run(assembler, sampled([40, END])))
    assert first["prompt_token_ids"] == tiny.tokenizer().chat(HI)
    assert [each["choices"][0]["token_ids"] for each in rest] == [[40], [END]]
    assert whole(assembler)["choices"][0]["token_ids"] == [40, END]


def test_prompts_have_log_probabilities_too():
    assembler = complete(prompt="hi", prompt_logprobs=1, max_tokens=1)
    prompt = [Sampled(token=40), Sampled(token=41, log_prob=-2.0, top=[(42, -1.0)])]
    assembler.push(Prefilled(choice=0, prompt=prompt))
    assembler.push(Ended(choice=0, reason="length"))
    none, entries = whole(assembler)["choices"][0]["prompt_logprobs"]
    assert none is None and list(entries) == ["42", "41"]
    assert entries["42"]["rank"] == 1 and entries["41"]["logprob"] == -2.0


def test_a_completion_may_echo_its_prompt():
    assembler = complete(prompt="hé", echo=True, logprobs=1)
    ids = ids_of("hé")
    prompt = [Sampled(token=ids[0]), *sampled(ids, top=1)[1:]]
    chunks = assembler.push(Prefilled(choice=0, prompt=prompt))
    chunks += assembler.push(Tokens(choice=0, tokens=sampled(ids_of("!?"), top=1)))
    chunks += assembler.push(Ended(choice=0, reason="length"))
    told = whole(assembler)["choices"][0]
    assert told["text"] == "hé!?"
    assert told["logprobs"]["tokens"] == ["h", "\ufffd", "\ufffd", "!", "?"]
    assert told["logprobs"]["token_logprobs"] == [None, -0.125, -0.25, 0, -0.125]
    assert told["logprobs"]["text_offset"] == [0, 1, 2, 2, 3]
    texts = [json.loads(chunk.json_text())["choices"][0]["text"] for chunk in chunks]
    assert texts == ["hé", "!", "?", ""]


def test_an_echo_has_control_tokens_where_they_are_wanted():
    ids = [256, *ids_of("h"), 256]  # <s>
    for skip, text, offsets in ((True, "h", [0, 1, 1]), (False, "<s>h<s>", [0, 3, 4])):
        assembler = complete(
            prompt=ids, echo=True, logprobs=0, skip_special_tokens=skip
        )
        prompt = [Sampled(token=ids[0]), *sampled(ids)[1:]]
        assembler.push(Prefilled(choice=0, prompt=prompt))
        run(assembler, sampled(ids_of("!")))
        [told] = whole(assembler)["choices"]
        assert told["text"] == text + "!"
        assert told["logprobs"]["text_offset"] == [*offsets, len(text)]


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_text_is_scored_without_a_new_token(reason):
    """The engine makes one, which nobody hears of."""
    assembler = complete(
        prompt="hi", echo=True, logprobs=0, max_tokens=0, return_token_ids=True,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    [demand] = assembler.prepared.demands
    assert demand.request.params.max_new_tokens == 1
    ids = ids_of("hi")
    prompt = [Sampled(token=ids[0]), *sampled(ids)[1:]]
    chunks = assembler.push(Prefilled(choice=0, prompt=prompt))
    chunks += assembler.push(Tokens(choice=0, tokens=sampled([END])))
    chunks += assembler.push(Ended(choice=0, reason=reason))
    told = whole(assembler)
    [choice] = told["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["token_ids"] == [] and choice["logprobs"]["tokens"] == ["h", "i"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.125]
    assert told["usage"]["completion_tokens"] == 0
    del told["object"]
    assert added_up([chunk.json_text() for chunk in chunks]) == told
    with pytest.raises(ApiError, match="max_tokens is 0; expected at least 1, or echo"):
        complete(max_tokens=0)


def test_prompts_count_once_however_many_outputs_they_have():
    assembler = complete(prompt=["abc", "de"], n=2)
    for choice in range(4):
        run(assembler, sampled([40]), choice=choice, cached=1)
    usage = whole(assembler)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 4)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


def test_a_failed_engine_is_an_error_and_no_answer():
    assembler = chat()
    with pytest.raises(ApiError, match="out of memory") as caught:
        assembler.push(Ended(choice=0, reason="error", error="out of memory"))
    assert caught.value.status == 500
    assert caught.value.body()["error"]["type"] == "server_error"
    with pytest.raises(ValueError, match="has not ended"):
        assembler.answer()


# OpenAI's own client.


def client(handler):
    """The client, and a server that is a function."""
    transport = httpx.MockTransport(handler)
    return openai.OpenAI(
        api_key="none",
        base_url="http://server/v1",
        max_retries=0,
        http_client=httpx.Client(transport=transport),
    )


def serve(request):
    """What an HTTP server does with a body, in one breath."""
    model = served(thinking="qwen3", calls="hermes")
    try:
        if request.url.path.endswith("/chat/completions"):
            wanted = ChatRequest.read(request.content)
            prepared = prepare_chat(wanted, model, id="x", created=1)
            assembler = ChatAssembler(prepared)
        else:
            wanted = CompletionRequest.read(request.content)
            prepared = prepare_completion(wanted, model, id="x", created=1)
            assembler = CompletionAssembler(prepared)
    except ApiError as error:
        return httpx.Response(error.status, json=error.body())
    chunks = []
    for demand in prepared.demands:
        tokens = sampled([*ids_of(OUTPUT), END], top=prepared.log_probs or 0)
        chunks += run(assembler, tokens, choice=demand.choice, sizes=[5] * 30)
    if not prepared.stream:
        return httpx.Response(200, json=whole(assembler))
    return httpx.Response(
        200,
        headers={"content-type": "text/event-stream"},
        text="".join(map(event, chunks)) + DONE,
    )


def test_the_official_client_reads_answers():
    told = client(serve).chat.completions.create(
        model="tiny",
        messages=HI,
        tools=[WEATHER],
        n=2,
        logprobs=True,
        top_logprobs=1,
        stop=["\x00"],
        seed=1,
    )
    first, second = told.choices
    assert (
        first.message.content == "Let me look." and first.message.reasoning == "Rain?"
    )
    assert first.finish_reason == "tool_calls"
    [call] = second.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    entries = first.logprobs.content
    assert (
        bytes(b for entry in entries for b in entry.bytes).decode() == OUTPUT + "</s>"
    )
    assert told.usage.completion_tokens == 2 * len(entries)
    assert told.usage.completion_tokens_details.reasoning_tokens > 0


def test_the_official_client_reads_streams():
    stream = client(serve).chat.completions.create(
        model="tiny",
        messages=HI,
        tools=[WEATHER],
        stream=True,
        stream_options={"include_usage": True},
    )
    content, arguments, reasons = "", "", []
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                arguments += call.function.arguments
    assert content == "Let me look." and json.loads(arguments) == {"city": "Köln"}
    assert reasons[-1] == "tool_calls" and chunk.usage.total_tokens > 0


def test_the_official_client_reads_completions():
    told = client(serve).completions.create(
        model="tiny", prompt=["a", [98]], logprobs=2, max_tokens=100
    )
    assert [choice.text for choice in told.choices] == [OUTPUT, OUTPUT]
    assert told.choices[0].logprobs.tokens[0] == "<"
    text = "".join(
        chunk.choices[0].text
        for chunk in client(serve).completions.create(
            model="tiny", prompt="a", stream=True
        )
    )
    assert text == OUTPUT


def test_the_official_client_reads_errors():
    with pytest.raises(openai.BadRequestError) as caught:
        client(serve).chat.completions.create(
            model="tiny", messages=HI, extra_body={"temprature": 1}
        )
    assert caught.value.param == "temprature"
    assert "did you mean temperature?" in str(caught.value)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client(serve).chat.completions.create(model="gpt", messages=HI)
