"""Requests are understood, or refused with field, value and what would be right."""

from dataclasses import replace

import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.grammars import Calls, Grammar, StructuralTags, Tag
from jaxspark.serving import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Served,
    TokenizeRequest,
    prepare_chat,
    prepare_completion,
)
from jaxspark.serving.errors import REFUSED
from jaxspark.serving.sampling import seed_of
from jaxspark.serving.tokens import detokenize, models, tokenize
from jaxspark.text.deepseek_v4 import encode_deepseek_v4
from tests.checkpoints import tiny
from tests.serving.wire import END, HI, WEATHER, served


def chat(model=None, **fields):
    body = {"model": "tiny", "messages": HI} | fields
    request = ChatRequest.read(body)
    return prepare_chat(request, model or served(calls="hermes"), id="x", created=1)


def complete(**fields):
    body = {"model": "tiny", "prompt": "hi"} | fields
    request = CompletionRequest.read(body)
    return prepare_completion(request, served(), id="x", created=1)


def refusal(make, **fields):
    """(status, field, message) of the error."""
    with pytest.raises(ApiError) as caught:
        make(**fields)
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return caught.value.status, error["param"], error["message"]


def test_a_plain_chat_is_one_demand():
    prepared = chat()
    [demand] = prepared.demands
    ids = tiny.tokenizer().chat(HI)
    params = demand.request.params
    assert demand.request.prompt == ids
    assert params.max_new_tokens == 1000 - len(ids)
    assert (params.temperature, params.top_p, params.seed) == (1.0, 1.0, None)
    assert params.stop_ids == (END,) and not params.log_probs
    assert demand.request.params.grammar is None
    assert (prepared.id, demand.group) == ("chatcmpl-x", "chatcmpl-x")
    assert not prepared.stream and prepared.reading.calls is None


def test_every_field_reaches_the_engine_or_the_reader():
    prepared = chat(
        served(calls="hermes", least_priority=-1),
        max_completion_tokens=7,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        seed=3,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": -100},
        allowed_token_ids=[5, 6],
        bad_words=["no"],
        stop_token_ids=[9],
        logprobs=True,
        top_logprobs=2,
        prompt_logprobs=1,
        priority=-1,
        timeout=2.5,
        cache_salt="me",
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    [demand] = prepared.demands
    params = demand.request.params
    assert params.max_new_tokens == 7 and params.seed == 3 and params.log_probs
    assert (params.temperature, params.top_p, params.top_k) == (0, 0.5, 4)
    assert params.min_p == 0.1 and params.stop_ids == (END, 9)
    assert (params.top_log_probs, params.prompt_log_probs) == (2, 1)
    assert params.presence_penalty == 1 and params.frequency_penalty == -1
    assert params.repetition_penalty == 1.5 and params.bad_words == ("no",)
    assert params.logit_bias == {5: -100} and params.allowed_ids == [5, 6]
    assert params.min_tokens == prepared.reading.min_tokens == 2
    assert params.grammar == Grammar(
        kind="calls", value=Calls(form="hermes", tools=[WEATHER], parallel=False)
    )
    assert (demand.priority, demand.deadline_s, demand.cache_salt) == (-1, 2.5, "me")
    prepared = chat(
        stop="x",
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
        stream_interval=3,
        return_token_ids=True,
        request_id="mine",
    )
    reading = prepared.reading
    assert reading.stop == ("x",) and reading.include_stop and not reading.skip_special
    assert reading.stop_ids == frozenset() and prepared.id == "chatcmpl-mine"
    assert prepared.interval == 3 and prepared.include_usage and prepared.return_ids


def test_null_is_absent():
    known = ("n", "stop", "seed", "tools", "logit_bias", "stream_options", "max_tokens")
    for names in (known, REFUSED, ["nothing"]):
        assert chat(**dict.fromkeys(names)).demands == chat().demands
        assert complete(**dict.fromkeys(names)).demands == complete().demands
    told = TokenizeRequest.read({"prompt": "a", **dict.fromkeys(REFUSED)})
    assert told == TokenizeRequest.read({"prompt": "a"})


def test_null_is_absent_inside_of_fields():
    call = {"id": "a", "type": None, "index": None, "nothing": None}
    call["function"] = {"name": "f", "arguments": "{}", "nothing": None}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    silent = dict.fromkeys(("audio", "function_call", "refusal", "annotations"))
    request = ChatRequest.read(
        {
            "model": "tiny",
            "messages": [message | silent],
            "stream_options": {"include_obfuscation": None},
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": None, "strict": None},
            },
        }
    )
    [read] = request.messages
    assert read.tool_calls[0].type == "function"
    assert request.response_format.json_schema.schema_ == {}
    with pytest.raises(ApiError, match="model: the field is missing"):
        ChatRequest.read({"model": None, "messages": HI})


def test_nulls_inside_of_values_stay():
    schema = {"const": None}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    request = ChatRequest.read(
        {
            "model": "tiny",
            "messages": HI,
            "tools": [tool],
            "structured_outputs": {"json": schema},
            "chat_template_kwargs": {"x": None},
        }
    )
    assert request.tools[0].function.parameters == schema
    assert request.structured_outputs.json_ == schema
    assert request.chat_template_kwargs == {"x": None}


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"best_of": 1, "n": 2},
        {"use_beam_search": False},
        {"function_call": "auto"},
        {"modalities": ["text"]},
        {"verbosity": "medium"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
    ],
)
def test_what_is_done_anyway_may_be_asked_for(fields):
    assert chat(**fields).demands == chat(n=fields.get("n")).demands


def test_several_outputs_have_seeds_of_their_own():
    prepared = complete(prompt=["a", [98, 99]], n=2, seed=5)
    seeds = [each.request.params.seed for each in prepared.demands]
    assert seeds[0] == 5 and len(set(seeds)) == 4
    prompts = [each.request.prompt for each in prepared.demands]
    assert prompts == [tiny.tokenizer().encode("a")] * 2 + [[98, 99]] * 2
    assert [each.choice for each in prepared.demands] == [0, 1, 2, 3]
    big = {seed_of(seed, 0) for seed in (5, 5 + 2**32, -5, 2**63 - 1, -(2**63))}
    assert len(big) == 5 and all(0 <= seed < 2**32 for seed in big)


@pytest.mark.parametrize(
    "fields, grammar",
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "object"}},
                }
            },
            Grammar(kind="json_schema", value={"type": "object"}),
        ),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}],
                    "triggers": ["<f"],
                }
            },
            Grammar(
                kind="structural_tag",
                value=StructuralTags(
                    structures=[Tag(begin="<f>", schema={}, end="</f>")],
                    triggers=["<f"],
                ),
            ),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Grammar(kind="regex", value="a+")),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            Grammar(kind="choice", value=("a", "b")),
        ),
        (
            {"structured_outputs": {"json": {}}},
            Grammar(kind="json_schema", value={}),
        ),
        (
            {"structured_outputs": {"grammar": "start: /x/"}},
            Grammar(kind="grammar", value="start: /x/"),
        ),
    ],
)
def test_formats_are_grammars(fields, grammar):
    assert chat(**fields).demands[0].request.params.grammar == grammar


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"temprature": 1}, "temprature", "no such field; did you mean temperature?"),
        ({"functions": []}, "functions", "no such field here; use tools"),
        ({"suffix": "x"}, "suffix", "no such field here; text cannot be filled in"),
        (
            {"best_of": 2},
            "best_of",
            "is 2; expected n, 1; ask for n answers and choose",
        ),
        ({"best_of": 3, "n": 2}, "best_of", "is 3; expected n, 2; ask for n answers"),
        ({"use_beam_search": True}, "use_beam_search", "got True; ask for n answers"),
        ({"function_call": {"name": "f"}}, "function_call", "; use tool_choice"),
        ({"modalities": ["audio"]}, "modalities[0]", "got 'audio'; only text can be"),
        ({"verbosity": "low"}, "verbosity", "got 'low'; say in the prompt how long"),
        ({"temperature": 3.5}, "temperature", "less than or equal to 2, got 3.5"),
        ({"temperature": "1"}, "temperature", "valid number, got '1'"),
        ({"temperature": float("nan")}, "temperature", "finite number, got nan"),
        ({"n": True}, "n", "valid integer, got True"),
        ({"seed": 2**63}, "seed", "should be less than 9223372036854775808"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"top_logprobs": 1}, "logprobs", "logprobs is not true; set it"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20, got 21"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "is 5; expected"),
        ({"max_tokens": 2000}, "max_tokens", "model has room for 977"),
        (
            {"max_completion_tokens": 2000},
            "max_completion_tokens",
            "max_completion_tokens is 2000; behind the 23 tokens of messages the model "
            "has room for 977",
        ),
        (
            {"min_tokens": 9, "max_tokens": 8},
            "min_tokens",
            "is 9; expected at most max_tokens, 8",
        ),
        (
            {"min_tokens": 9, "max_completion_tokens": 8},
            "min_tokens",
            "is 9; expected at most max_completion_tokens, 8",
        ),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        (
            {"priority": -1},
            "priority",
            "is -1; expected at least 0, this server's --mi",
        ),
        ({"bad_words": ["a"] * 1025}, "bad_words", "at most 1024 items"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024 items"),
        (
            {"allowed_token_ids": [1] * 301},
            "allowed_token_ids",
            "has 301 ids; expected",
        ),
        (
            {"logit_bias": {str(i): 1 for i in range(1025)}},
            "logit_bias",
            "at most 1024 items",
        ),
        ({"tools": [WEATHER] * 1025}, "tools", "at most 1024 items"),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "end": ""}] * 1025,
                    "triggers": ["<"] * 1025,
                }
            },
            "response_format.structures",
            "at most 1024 items after validation, not 1025",
        ),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "boss"}]}, "messages[0].role", "'tool', got 'boss'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "should be 'text', got 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content",
            "got 3",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 2000}]},
            "messages",
            "room for 1000",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "f", "arguments": "[]"}}
                        ],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "is '[]'; expected a JSON object in a string",
        ),
        ({"messages": [HI[0] | {"content": "\ud83d"}]}, "messages", "surrogate pair"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "is 'x'; expected token ids"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "expected ids below 300"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "has the token 300"),
        ({"stream_options": {}}, "stream_options", "stream is not true; leave it out"),
        ({"tool_choice": "required"}, "tool_choice", "no tools; give some"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "'weather' more than once"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            "tool_choice",
            "is 'f'; expected one of the tools, weather",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
            "leave one out",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "should be 'text'"),
        (
            {"structured_outputs": {"choice": ["a" * 300_000]}},
            "structured_outputs",
            "bytes; at most 262,144 are taken",
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            "response_format.structures",
            "the field is missing (also wrong: response_format.triggers, "
            "response_format.format)",
        ),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "[f]", "end": ""}],
                    "triggers": ["<"],
                }
            },
            "response_format",
            "'[f]' begins with none of the triggers ['<']",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "no JSON"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "objectt"}},
                }
            },
            "response_format",
            "Invalid type: objectt",
        ),
        (
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            "response_format",
            "needs a stop token",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "has regex, choice; expected one",
        ),
        (
            {
                "structured_outputs": {"regex": "a"},
                "response_format": {"type": "json_object"},
            },
            "structured_outputs",
            "leave one out",
        ),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "begun or continued",
        ),
        ({"request_id": "a b"}, "request_id", "string should match pattern"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, param, words):
    status, named, message = refusal(chat, **fields)
    assert status == 400 and words in message
    assert named == param and (param in message or "surrogate" in message)


def test_a_server_has_limits_of_its_own():
    model = served(most_output=60, least_priority=3)
    for limit in ("max_tokens", "max_completion_tokens"):
        _, param, message = refusal(chat, model=model, **{limit: 61})
        assert param == limit and message == f"{limit} is 61; expected at most 60"
    _, param, message = refusal(chat, model=model, priority=2)
    assert message.startswith("priority is 2; expected at least 3")
    [demand] = chat(model, priority=4).demands
    assert demand.priority == 4
    # Nobody goes before others by saying nothing.
    assert chat(model).demands[0].priority == 3
    assert chat(served(least_priority=-3)).demands[0].priority == 0


@pytest.mark.parametrize(
    "name",
    [
        *("add_generation_prompt", "chat_template", "continue_final_message"),
        *("conversation", "conversations", "documents", "max_length", "messages"),
        *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "tools"),
        "truncation",
    ],
)
def test_variables_of_a_template_are_no_arguments_of_what_renders_it(name):
    """A template that a client brings could render for ever."""
    loops = (
        "{% for _ in range(9**5) %}{% for _ in range(9**5) %}{% endfor %}{% endfor %}"
    )
    variables = {"chat_template_kwargs": {"greeting": "hi", name: loops}}

    def count(**fields):
        return tokenize(TokenizeRequest.read({"messages": HI} | fields), served())

    for make in (chat, count):
        status, param, message = refusal(make, **variables)
        assert (status, param) == (400, "chat_template_kwargs")
        assert f"has {name!r}, which clients cannot set" in message


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"names": 3}, "with names: 'int' object is not iterable"),
        ({"raise_exception": 3, "strict": True}, "with raise_exception, strict: 'int'"),
    ],
)
def test_a_template_that_fails_on_its_variables_names_them(variables, words):
    template = (
        "{% for name in names or [] %}{{ name }}{% endfor %}"
        "{% if strict %}{{ raise_exception('strict') }}{% endif %}"
    )
    model = served(Tokenizer(core=tiny.tokenizer().core, chat_template=template))
    status, _, message = refusal(chat, model=model, chat_template_kwargs=variables)
    assert status == 400
    assert f"the chat template fails on these 1 messages {words}" in message


def test_a_model_that_is_not_here_is_not_found():
    status, param, message = refusal(complete, model="gpt")
    assert (status, param) == (404, "model") and "'gpt'; this server has 't" in message


def test_a_model_that_calls_no_tools_refuses_them():
    _, param, message = refusal(chat, model=served(), tools=[WEATHER])
    assert param == "tools" and "not known to call any" in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"a":' * 10000,
        b'{"model": "m", "messages": [], "seed": %s}' % (b"9" * 5000),
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "m", "messages": [], "%s": 1}' % (b"a" * 5000),
    ],
)
def test_bodies_that_are_none_are_errors(body):
    with pytest.raises(ApiError) as caught:
        ChatRequest.read(body)
    assert caught.value.status == 400 and len(caught.value.message) < 300


@pytest.mark.parametrize(
    "prompt, words",
    [
        (3, "got 3"),
        ([], "at least 1 item"),
        ([[]], "at least 1 item"),
        ([1, -2], "greater than or equal to 0"),
        ([1, 300], "prompt[0] has the token 300"),
        ("", "prompt[0] is ''; expected a text"),
        ("x" * 1000, "prompt has 1000 tokens; the model has room for 1000"),
        (["x"] * 1025, "at most 1024 items"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt, words):
    status, _, message = refusal(complete, prompt=prompt)
    assert status == 400 and words in message


def test_tools_and_reasoning_reach_the_prompt():
    """A conversation with calls, through the wire's form, in the model's own."""
    tokenizer = Tokenizer(
        core=tiny.tokenizer().core, stop_ids=(END,), chat_encoder=encode_deepseek_v4
    )
    model = served(tokenizer, "deepseek_v4", "deepseek_v4", context=10**5)
    call = {"name": "weather", "arguments": '{"city": "Köln"}'}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "Look.",
            "tool_calls": [{"id": "a", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "yes"},
    ]
    prepared = chat(model, messages=messages, tools=[WEATHER], reasoning_effort="high")
    prompt = tokenizer.decode(prepared.demands[0].request.prompt)
    assert "<think>Look.</think>\n\n<｜DSML｜tool_calls>" in prompt
    assert 'string="true">Köln<' in prompt and "<tool_result>yes<" in prompt
    assert '"description": "Tells the weather."' in prompt
    assert "Reasoning Effort: Absolute" in prompt
    assert prepared.reading.opened and prepared.reading.calls is not None
    begun = [*HI, {"role": "assistant", "content": "<think>Well"}]
    for content, opened in (("<think>Well", True), ("<think>a</think>Well", False)):
        begun[-1]["content"] = content
        asked = {"messages": begun, "continue_final_message": True}
        asked["add_generation_prompt"] = False
        assert chat(model, **asked, reasoning_effort="none").reading.opened == opened
    quiet = chat(model, reasoning_effort="none")
    assert not quiet.reading.opened
    assert chat(model, tools=[WEATHER], tool_choice="none").reading.calls is None


@pytest.mark.parametrize("form", ["hermes", "deepseek_v4"])
def test_an_answer_in_a_format_may_be_calls_instead(form):
    model = served(calls=form)
    fields = {"tools": [WEATHER], "response_format": {"type": "json_object"}}
    [demand] = chat(model, **fields, parallel_tool_calls=False).demands
    assert demand.request.params.grammar == Grammar(
        kind="json_object", calls=Calls(form=form, tools=[WEATHER], parallel=False)
    )
    [demand] = chat(model, **fields, tool_choice="none").demands
    assert demand.request.params.grammar == Grammar(kind="json_object")
    parameters = {"properties": {"x": {"type": "strange"}}}
    broken = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    _, param, message = refusal(chat, model=model, **fields | {"tools": [broken]})
    assert param == "response_format" and "with tools: the grammar is not" in message


def test_answers_that_look_like_calls_are_refused_beside_tools():
    """Llama 3 writes both as bare JSON."""
    model = served(calls="llama3")
    for name, value in (
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"regex": "a+"}),
    ):
        _, param, message = refusal(chat, model=model, tools=[WEATHER], **{name: value})
        assert param == name and f"{name} and tools are both given" in message
        assert chat(model, tools=[WEATHER], tool_choice="none", **{name: value})
    tags = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    [demand] = chat(model, tools=[WEATHER], response_format=tags).demands
    assert demand.request.params.grammar.calls is None


def test_developers_speak_as_the_system():
    messages = [{"role": "developer", "content": "Be short."}, *HI]
    [demand] = chat(messages=messages).demands
    prompt = tiny.tokenizer().decode(demand.request.prompt)
    assert prompt.startswith("system: Be short.")


def test_a_target_says_how_it_is_served():
    model = Served.of(tiny.target(), context=64)
    assert (model.name, model.vocab_size, model.stop_ids) == ("tiny", 300, (END,))
    assert model.thinking is None and model.calls is None
    with pytest.raises(ValueError, match="has no tokenizer"):
        Served.of(replace(tiny.target(), tokenizer=None), context=64)


def test_texts_become_tokens_and_back():
    model, tokenizer = served(), tiny.tokenizer()
    told = tokenize(
        TokenizeRequest.read({"prompt": "é", "return_token_strs": True}), model
    )
    ids = tokenizer.encode("é")
    assert told["tokens"] == ids and told["count"] == 2
    assert told["token_strs"] == ["\ufffd", "\ufffd"] and told["max_model_len"] == 1000
    told = tokenize(TokenizeRequest.read({"messages": HI}), model)
    assert told["tokens"] == tokenizer.chat(HI)
    request = DetokenizeRequest.read({"tokens": told["tokens"]})
    assert detokenize(request, model)["prompt"].startswith("<s>user: hi</s>")
    with pytest.raises(ApiError, match="one of prompt and messages"):
        tokenize(TokenizeRequest.read({}), model)
    with pytest.raises(ApiError, match="tokens has the token 300"):
        detokenize(DetokenizeRequest.read({"tokens": [300]}), model)
    assert models(model)["data"][0]["id"] == "tiny"
