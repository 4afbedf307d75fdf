"""The server as OpenAI's own client sees it, and as clients that misbehave do."""

import contextlib
import json
import re
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from jaxspark.generation import SamplingParams, generate
from jaxspark.serving.app import make_app
from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.sampling import seed_of
from tests.serving.hosting import KEY, hosted

HI = [{"role": "user", "content": "Hi there, hi there."}]
HEADERS = {"Authorization": f"Bearer {KEY}"}


def plain(server, prompt, **params):
    """What `generate` gives without drafts."""
    if not isinstance(prompt, str):
        prompt = server.target.tokenizer.chat(prompt)
    params = SamplingParams(log_probs=True, **params)
    [completion] = generate(
        *(server.target, [prompt]), params=params, coupling="gumbel", capacity=128
    )
    return completion


def test_a_chat_is_what_generate_gives(server, client):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=30, temperature=0, logprobs=True
    )
    expected = plain(server, HI, max_new_tokens=30)
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.tokens)
    prompt = len(server.target.tokenizer.chat(HI))
    assert answer.usage.prompt_tokens == prompt
    np.testing.assert_allclose(
        [each.logprob for each in choice.logprobs.content],
        expected.log_probs,
        atol=1e-4,
    )


def test_a_stream_adds_up_to_the_answer_with_its_usage(server, client):
    asked = {"model": "tiny", "messages": HI, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(
            **asked,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_drafted": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    drafted = [
        d for c in chunks for each in c.choices for d in getattr(each, "drafted", [])
    ]
    assert len(drafted) == 40 and 0 < sum(drafted) < 40


def test_completions_seeds_and_several_outputs(server, client):
    asked = {"model": "tiny", "prompt": "abcabc", "max_tokens": 20, "temperature": 0.8}
    one, again, other = (
        client.completions.create(**asked, n=3, seed=seed, logprobs=0)
        for seed in (5, 5, -6)
    )
    texts = [each.text for each in one.choices]
    assert texts == [each.text for each in again.choices]
    assert texts != [each.text for each in other.choices]
    for number, choice in enumerate(one.choices):
        assert choice.index == number
        expected = plain(
            *(server, "abcabc"),
            max_new_tokens=20,
            temperature=0.8,
            seed=seed_of(5, number),
        )
        assert choice.text == expected.text
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs, expected.log_probs, atol=1e-4
        )
    assert one.usage.prompt_tokens == 6 and one.usage.completion_tokens <= 60
    unseeded = {client.completions.create(**asked).choices[0].text for _ in range(3)}
    assert len(unseeded) > 1


def test_what_changes_logits_is_what_generate_does(server, client):
    wishes = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": {"98": 2.0},
    }
    extra = {
        "repetition_penalty": 1.2,
        "min_tokens": 12,
        "stop_token_ids": list(range(97, 112)),
        "bad_words": ["a", "bb"],
        "allowed_token_ids": list(range(120)),
    }
    seen = client.completions.create(
        model="tiny",
        prompt="abcabc",
        max_tokens=20,
        temperature=0.8,
        seed=5,
        logprobs=0,
        **wishes,
        extra_body=extra | {"return_token_ids": True},
    ).choices[0]
    expected = plain(
        *(server, "abcabc"),
        max_new_tokens=20,
        temperature=0.8,
        seed=5,
        stop_ids=(*server.target.stop_ids, *range(97, 112)),
        **wishes | {"logit_bias": {98: 2.0}},
        **{name: extra[name] for name in ("repetition_penalty", "min_tokens")},
        bad_words=extra["bad_words"],
        allowed_ids=extra["allowed_token_ids"],
    )
    assert seen.token_ids == expected.tokens and 12 <= len(expected.tokens)
    np.testing.assert_allclose(
        seen.logprobs.token_logprobs, expected.log_probs[: len(seen.token_ids)],
        atol=1e-4,
    )  # fmt: skip


def test_likely_tokens_are_told_beside_the_output_and_the_prompt(server, client):
    asked = {"model": "tiny", "messages": HI, "max_tokens": 12, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 20}
    asked["extra_body"] = {"prompt_logprobs": 2, "return_token_ids": True}
    answer = client.chat.completions.create(**asked)
    expected = plain(
        *(server, HI), max_new_tokens=12, top_log_probs=20, prompt_log_probs=2
    )
    content = answer.choices[0].logprobs.content
    for told, log_prob, top in zip(
        content, expected.log_probs, expected.top_log_probs, strict=True
    ):
        np.testing.assert_allclose(told.logprob, log_prob, atol=1e-4)
        assert [each.logprob for each in told.top_logprobs] == pytest.approx(
            [each for _, each in top], abs=1e-4
        )
        # Greedy: the best is what was taken.
        assert told.top_logprobs[0].token == told.token
    prompt = answer.prompt_logprobs
    ids = server.target.tokenizer.chat(HI)
    assert len(prompt) == len(ids) and prompt[0] is None
    for told, token, other in zip(prompt[1:], ids[1:], expected.prompt_log_probs[1:]):
        own = told[str(token)]
        assert own["logprob"] == pytest.approx(other.log_prob, abs=1e-4)
        assert own["rank"] == other.rank
        ranks = sorted(each["rank"] for each in told.values())
        assert ranks == ([1, 2] if own["rank"] <= 2 else [1, 2, own["rank"]])
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [
        told
        for chunk in chunks
        for each in chunk.choices
        for told in (each.logprobs.content if each.logprobs else ())
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert [len(t.top_logprobs) for t in streamed] == [20] * len(content)
    [first] = [c.prompt_logprobs for c in chunks if hasattr(c, "prompt_logprobs")]
    assert first == prompt


def test_a_completion_echoes_its_prompt_with_log_probs(server, client):
    [choice] = client.completions.create(
        model="tiny", prompt="abcabc", max_tokens=4, temperature=0, logprobs=2,
        echo=True,
    ).choices  # fmt: skip
    expected = plain(
        *(server, "abcabc"), max_new_tokens=4, top_log_probs=2, prompt_log_probs=2
    )
    told = choice.logprobs
    assert told.tokens[:6] == list("abcabc") and told.token_logprobs[0] is None
    of_prompt = [each.log_prob for each in expected.prompt_log_probs[1:]]
    np.testing.assert_allclose(
        told.token_logprobs[1:], of_prompt + expected.log_probs, atol=1e-4
    )
    # Tokens that are no characters by themselves share one text.
    for token, log_prob, likely in list(
        zip(told.tokens, told.token_logprobs, told.top_logprobs)
    )[1:]:
        assert 1 <= len(likely) <= 3 and likely[token] == log_prob


def test_a_text_is_scored_without_a_new_token(client):
    asked = {"model": "tiny", "prompt": "abcabc", "logprobs": 2, "echo": True}
    scored = client.completions.create(**asked, max_tokens=0)
    longer = client.completions.create(**asked, max_tokens=1)
    assert scored.usage.completion_tokens == 0
    [choice], [other] = scored.choices, longer.choices
    assert (choice.text, choice.finish_reason) == ("abcabc", "length")
    assert choice.logprobs.tokens == list("abcabc")
    assert choice.logprobs.token_logprobs == other.logprobs.token_logprobs[:6]
    *_, last = client.completions.create(**asked, max_tokens=0, stream=True)
    assert (last.choices[0].text, last.choices[0].finish_reason) == ("", "length")


def test_a_stop_string_cuts_everything_and_frees_the_slot(server, client, monkeypatch):
    server.slow(monkeypatch, 0.01)
    asked = {"model": "tiny", "prompt": "abcabc", "max_tokens": 60, "temperature": 0.8}
    whole = client.completions.create(**asked, seed=1).choices[0].text
    place = next(i for i in range(3, 60) if whole[i : i + 2] not in whole[: i + 1])
    stop = whole[place : place + 2]
    before = server.engine.stats().output_tokens
    cut = client.completions.create(**asked, seed=1, stop=[stop])
    assert cut.choices[0].text == whole[:place]
    assert cut.choices[0].finish_reason == "stop"
    assert server.engine.wait_idle(5)
    # At most the call that was running went on.
    decoded = server.engine.stats().output_tokens - before
    assert decoded <= cut.usage.completion_tokens + 2 * 4 * 4


def test_tokens_and_models(client, http):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    told = http.post("/tokenize", json={"prompt": "abc"}).json()
    assert told["count"] == 3 and told["max_model_len"] == 110
    text = http.post("/detokenize", json={"tokens": told["tokens"]}).json()
    assert text == {"prompt": "abc"}


CHAT = {"model": "tiny", "messages": HI, "max_tokens": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}
BAD = [
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"messages": []}, 400, "messages", None),
    ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
    ({"temperature": 9}, 400, "temperature", None),
    ({"max_tokens": 61}, 400, "max_tokens", None),
    ({"max_tokens": 10**9}, 400, "max_tokens", "context_length_exceeded"),
    ({"n": 9}, 400, "n", None),
    (
        {"messages": [{"role": "user", "content": "x" * 200}]},
        400,
        "messages",
        "context_length_exceeded",
    ),
    ({"presence_penalty": 3}, 400, "presence_penalty", None),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", None),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5", None),
    ({"logit_bias": {"512": 1}}, 400, "logit_bias", None),
    ({"allowed_token_ids": []}, 400, "allowed_token_ids", None),
    ({"allowed_token_ids": [5], "bad_words": [""]}, 400, "bad_words[0]", None),
    ({"response_format": SCHEMA}, 400, "response_format", None),
    ({"response_format": {"type": "xml"}}, 400, "response_format", None),
    ({"structured_outputs": {"regex": "(a"}}, 400, "structured_outputs", None),
    ({"guided_regex": "a"}, 400, "guided_regex", "unknown_parameter"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ({"top_logprobs": 2}, 400, "logprobs", None),
    ({"min_tokens": 5}, 400, "min_tokens", None),
    ({"priority": -1}, 400, "priority", None),
    *(
        ({"chat_template_kwargs": {name: []}}, 400, "chat_template_kwargs", None)
        for name in ("messages", "self", "chat_template")
    ),
]


@pytest.mark.parametrize("change, status, param, code", BAD)
def test_bad_fields_are_named(http, change, status, param, code):
    response = http.post("/v1/chat/completions", json=CHAT | change)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert (error["param"], error["code"]) == (param, code)


def test_bad_requests_get_error_objects_and_the_engine_lives(server, http):
    json_type = {"Content-Type": "application/json"}
    post = {"url": "/v1/chat/completions", "method": "POST"}

    def parts():
        for _ in range(50):
            yield b" " * 1000

    cases = [
        (401, post | {"json": CHAT, "headers": {"Authorization": "Bearer wrong"}}),
        (401, post | {"json": CHAT, "headers": {"Authorization": ""}}),
        (
            401,
            {"method": "GET", "url": "/v1/models", "headers": {"Authorization": "x"}},
        ),
        (400, post | {"content": b'{"model": ', "headers": json_type}),
        (400, post | {"content": b"\xff\xfe", "headers": json_type}),
        (400, post | {"content": b"[" * 10_000, "headers": json_type}),
        (400, post | {"content": b"", "headers": json_type}),
        (413, post | {"content": b" " * 20_001, "headers": json_type}),
        (413, post | {"content": parts(), "headers": json_type}),
        (415, post | {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
        (404, {"method": "GET", "url": "/v1/nothing"}),
        (405, {"method": "GET", "url": "/v1/completions"}),
    ]
    for status, case in cases:
        response = http.request(**case)
        assert response.status_code == status, case
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-Id"])
    again = http.post(
        "/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine-1"}
    )
    assert again.status_code == 200 and again.headers["X-Request-Id"] == "mine-1"


def test_a_body_that_never_comes_is_given_up(server):
    with raw(server, length=500) as connection:
        assert b" 408 " in connection.recv(200).split(b"\r\n")[0]


def test_a_prompt_that_is_not_read_in_time_is_a_504(server, http, monkeypatch):
    server.slow(monkeypatch)
    body = {"model": "tiny", "prompt": "ab" * 40, "max_tokens": 9, "timeout": 0.05}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 504
    error = response.json()["error"]
    assert error["type"] == "server_error" and "timeout is 0.05 s" in error["message"]


def raw(server, body=b"", length=None):
    """A connection on which a request was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length or len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def test_clients_that_leave_at_any_moment_free_their_slots(server, monkeypatch, random):
    server.slow(monkeypatch, 0.005)
    before = server.engine.stats().output_tokens
    for number in range(40):
        values = {"stream": bool(number % 2), "n": 1 + number % 2, "max_tokens": 60}
        body = json.dumps(CHAT | values | {"ignore_eos": True}).encode()
        connection = raw(server, body)
        time.sleep(random.uniform(0, 0.04))
        if number % 4 > 1:
            with contextlib.suppress(TimeoutError):
                connection.settimeout(0.02)
                connection.recv(100)
        connection.close()
    assert server.engine.wait_idle(10)
    stats = server.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    # They were not decoded to their ends.
    assert stats.output_tokens - before < 60 * 60 * 0.8


def test_a_full_queue_answers_503_and_when_to_come_again(
    server, client, http, monkeypatch
):
    server.slow(monkeypatch)
    asked = {**CHAT, "max_tokens": 50, "stream": True}
    streams = [client.chat.completions.create(**asked, n=3)]
    while server.engine.stats().running < 3:
        time.sleep(0.01)
    streams.append(client.chat.completions.create(**asked, n=8))
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(**asked)
    assert error.value.status_code == 503
    assert error.value.body["code"] == "queue_full"
    assert 1 <= int(error.value.response.headers["Retry-After"]) <= 60
    # Nobody looks at what is asked for.
    assert http.post("/v1/completions", json={"model": "?"}).status_code == 503
    for stream in streams:
        stream.close()
    assert server.engine.wait_idle(10)


def test_a_timeout_ends_a_waiting_request_with_an_error(server, client, monkeypatch):
    server.slow(monkeypatch)
    asked = {**CHAT, "max_tokens": 60}
    with client.chat.completions.create(**asked, stream=True, n=3):
        with pytest.raises(openai.InternalServerError, match="timeout") as error:
            client.chat.completions.create(**asked, extra_body={"timeout": 0.1})
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match="timeout"):
            extra = {"timeout": 0.1}
            list(client.chat.completions.create(**asked, stream=True, extra_body=extra))


def test_operators_see_states_and_metrics_under_known_names(server, http, client):
    client.completions.create(model="tiny", prompt="abc", max_tokens=8)
    assert http.get("/health").json() == {"status": "ready"}
    assert http.get("/ready").status_code == 200
    scraped = http.get("/metrics").text
    values = dict(
        line.rsplit(" ", 1) for line in scraped.splitlines() if line[:1] != "#"
    )
    names = {name.partition("{")[0] for name in values}
    assert {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "jaxspark:rounds_total",
        "jaxspark:accepted_length",
        "jaxspark:compilations_after_ready",
    } <= names
    labels = '{engine="0",model_name="tiny"}'
    stats = http.get("/stats").json()
    assert (
        float(values["vllm:generation_tokens_total" + labels])
        == (stats["output_tokens"])
    )
    assert float(values["jaxspark:compilations_after_ready" + labels]) == 0
    assert stats["tokens_per_second"] > 0 and stats["accepted_length"] >= 1


def scraped(http):
    """Values by metric and labels."""
    lines = http.get("/metrics").text.splitlines()
    found = {}
    for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#"):
        own = re.sub('(engine="0"|model_name="tiny"),?', "", name)
        found[own.replace(",}", "}")] = float(value)
    return found


def test_metrics_tell_why_outputs_ended(server, http, monkeypatch):
    assert server.engine.wait_idle(10)
    server.slow(monkeypatch)
    before = scraped(http)
    body = {"model": "tiny", "prompt": "abcabc", "ignore_eos": True}
    ends = {
        "stop": {"logit_bias": {"98": 100}, "stop_token_ids": [98], "max_tokens": 9},
        "length": {"max_tokens": 9},
        # One was told something when its time was over, the other was not.
        "abort": {"max_tokens": 60, "timeout": 0.3},
        "error": {"prompt": "ab" * 40, "max_tokens": 9, "timeout": 0.05},
    }
    for changes in ends.values():
        http.post("/v1/completions", json=body | changes)
    assert server.engine.wait_idle(10)
    after = scraped(http)
    for reason in ends:
        name = f'vllm:request_success_total{{finished_reason="{reason}"}}'
        assert after[name] - before.get(name, 0) == 1, reason


def test_metrics_tell_who_runs_and_waits_and_who_was_turned_away(
    server, http, client, monkeypatch
):
    assert server.engine.wait_idle(10)
    server.slow(monkeypatch)
    before = scraped(http)
    asked = {**CHAT, "max_tokens": 50, "stream": True}
    streams = [client.chat.completions.create(**asked, n=3)]
    while server.engine.stats().running < 3:
        time.sleep(0.01)
    streams.append(client.chat.completions.create(**asked, n=8))
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**asked)
    held = scraped(http)
    for stream in streams:
        stream.close()
    assert server.engine.wait_idle(10)
    waiting = "vllm:num_requests_waiting"
    for name, count in (
        ("vllm:num_requests_running{}", 3),
        (waiting + "{}", 8),
        (waiting + '_by_reason{reason="capacity"}', 8),
        (waiting + '_by_reason{reason="deferred"}', 0),
    ):
        assert held[name] == count and scraped(http)[name] == 0, name
    # Those that were turned away have not asked for anything.
    for name, more in (
        ('vllm:admission_rejections_total{reason="queue_full"}', 1),
        ("vllm:request_params_n_count{}", 2),
        ("vllm:request_params_n_sum{}", 11),
    ):
        assert held[name] - before.get(name, 0) == more, name


def test_metrics_tell_what_calls_did(server, http):
    assert server.engine.wait_idle(10)
    before = scraped(http)
    body = {"model": "tiny", "prompt": ["abcabc", "abab"], "max_tokens": 20}
    answer = http.post("/v1/completions", json=body | {"ignore_eos": True, "seed": 1})
    assert answer.json()["usage"]["completion_tokens"] == 40
    assert server.engine.wait_idle(10)
    after = scraped(http)
    more = {name: after[name] - before.get(name, 0) for name in after}
    # The last token of a prompt is a round's.
    assert more["vllm:iteration_tokens_total_sum{}"] == 5 + 3 + 40
    assert more["vllm:request_params_n_count{}"] == 2
    assert more["vllm:request_params_n_sum{}"] == 2
    rounds = more["jaxspark:rounds_per_call_sum{}"]
    assert rounds <= more["jaxspark:rounds_total{}"] <= 2 * rounds
    drafts = more["jaxspark:drafts_total{}"]
    assert 0 < more["vllm:spec_decode_num_draft_tokens_total{}"] <= drafts
    assert drafts <= 3 * more["vllm:spec_decode_num_drafts_total{}"]


def test_the_page_loads_nothing_from_elsewhere(http):
    response = http.get("/", headers={"Authorization": ""})
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "jaxspark" in response.text and not re.search("https?://", response.text)


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/ready"])
def test_those_who_only_look_whether_a_server_is_there_send_head(http, path):
    got, head = http.get(path), http.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["Content-Length"] == got.headers["Content-Length"]
    assert http.get("/ping").json() == http.get("/health").json()


# What OpenAI's client for JavaScript sends beside what everybody does.
PREFLIGHT = {
    "Origin": "https://example.com",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


def test_foreign_pages_may_not_ask_by_default(http):
    answer = http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 405
    for response in (answer, http.get("/stats", headers=PREFLIGHT)):
        assert "access-control-allow-origin" not in response.headers


def test_pages_that_may_ask_may_use_openais_client(server):
    app = make_app(server.engine, None, AppOptions(cors_origins=(PREFLIGHT["Origin"],)))
    with TestClient(app) as http:
        answer = http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert answer.status_code == 200
        allowed = answer.headers["access-control-allow-headers"]
        assert "x-stainless-os" in allowed and "authorization" in allowed
        told = http.get("/stats", headers=PREFLIGHT).headers
        assert told["access-control-allow-origin"] == PREFLIGHT["Origin"]
        exposed = told["access-control-expose-headers"]
        assert exposed == "X-Request-Id, Retry-After"
        elsewhere = PREFLIGHT | {"Origin": "https://other.example.com"}
        assert http.options("/stats", headers=elsewhere).status_code == 400


def test_logs_tell_figures_and_never_what_was_said(server, client, caplog):
    with caplog.at_level("INFO", "jaxspark.requests"):
        client.chat.completions.create(**CHAT, extra_body={"ignore_eos": True})
        deadline = time.monotonic() + 5
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    line = json.loads(caplog.records[-1].message)
    assert line["path"] == "/v1/chat/completions" and line["status"] == 200
    assert line["completion_tokens"] == 4 and "Hi" not in caplog.text


def test_a_device_failure_ends_requests_and_the_process(monkeypatch):
    with hosted(api_keys=()) as here:
        here.slow(monkeypatch, 0.02)
        body = CHAT | {"max_tokens": 60, "n": 4}
        url, answers = f"{here.url}/v1/chat/completions", []

        def ask(stream):
            answers.append(httpx.post(url, json=body | {"stream": stream}, timeout=20))

        threads = [threading.Thread(target=ask, args=(i == 1,)) for i in range(2)]
        for each in threads:
            each.start()
        while here.engine.stats().running < 3:
            time.sleep(0.01)

        def broken(*args, **kwargs):
            raise RuntimeError("a device was lost")

        monkeypatch.setattr(here.engine._batch, "step", broken)
        for each in threads:
            each.join(20)
        here.thread.join(20)
        assert here.status == 1 and here.engine.state == "failed"
    streamed, whole = sorted(answers, key=lambda each: each.status_code)
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "the engine failed"
    assert '"the engine failed"' in streamed.text and "[DONE]" in streamed.text


def test_the_schema_of_the_routes_is_complete(http):
    document = http.get("/openapi.json").json()
    named = set(re.findall('"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert "ChatRequest" in named <= set(document["components"]["schemas"])
