"""The response is the same however its tokens are chunked.

Random outputs with reasoning, calls whole and broken, stop strings, half characters and
control tokens, in several tokenizers and cut into tokens at random. The engine tells
their tokens one by one, in random blocks (as rounds of speculation do), or all at once.
"""

import json

import numpy as np
import pytest

from jaxspark.checkpoints import Tokenizer
from jaxspark.checkpoints.gguf_header import open_gguf
from jaxspark.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from jaxspark.serving import (
    ChatAssembler,
    ChatRequest,
    CompletionAssembler,
    CompletionRequest,
    Ended,
    Prefilled,
    Tokens,
    prepare_chat,
    prepare_completion,
)
from jaxspark.text import TextStream
from jaxspark.text.deepseek_v4 import encode_deepseek_v4
from jaxspark.text.formats import OutputParser
from tests.checkpoints import tiny
from tests.serving.wire import HI, WEATHER, added_up, run, sampled, served
from tests.text import folders
from tests.text.test_parsers import said
from tests.text.test_stops import first_end

WORDS = [
    "the",
    " weather",
    "é",
    "日本",
    "🎉",
    "\n",
    "\n\n",
    "a",
    " ",
    '"',
    "{",
    "<",
    ".",
]
TAGS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<｜DSML｜tool_calls>",
    "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="a" string="true">',
    '{"name": "f", "arguments": {"a": ',
    "}}",
]
EMBEDDED_CASES, CASES = 200, 1800


def words(random, most):
    return "".join(random.choice(WORDS, size=random.integers(most + 1)))


def call(random):
    arguments = {key: words(random, 3) for key in "ab"[: random.integers(3)]}
    return {"name": f"f{random.integers(3)}", "arguments": arguments}


def written(random, form):
    """An output with a call or two, in a form."""
    calls = [call(random) for _ in range(random.integers(1, 3))]
    if form == "hermes":
        tags = [f"<tool_call>\n{json.dumps(each)}\n</tool_call>" for each in calls]
        return words(random, 2) + "\n" + "\n".join(tags)
    if form == "llama3":
        return "; ".join(map(json.dumps, calls))
    message = {"role": "assistant", "content": words(random, 2)}
    message["tool_calls"] = [{"function": each} for each in calls]
    prompt = encode_deepseek_v4([*HI, message], thinking=False)
    return prompt.rpartition("</think>")[2].removesuffix("<｜end▁of▁sentence｜>")


def output_text(random, form):
    """What a model might write, or at least could."""
    text = written(random, form) if form and random.random() < 0.7 else ""
    if not text or random.random() < 0.2:
        pieces = [*TAGS, *WORDS, *WORDS]
        text += "".join(random.choice(pieces, size=random.integers(12)))
    if random.random() < 0.5:
        text = f"<think>\n{words(random, 4)}</think>\n\n{text}"
    return text[: random.integers(len(text) + 1)] if random.random() < 0.3 else text


def tokens_of(random, tokenizer, text):
    """The text in tokens, cut at random; some noise of any ids among them."""
    cuts = sorted(random.integers(len(text) + 1, size=random.integers(5)).tolist())
    ids = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        piece = tokenizer.core.encode(text[start:end], add_special_tokens=False)
        ids += piece.ids
        if random.random() < 0.05:
            ids += random.integers(tokenizer.vocab_size, size=2).tolist()
    if random.random() < 0.3:
        ids.insert(int(random.integers(len(ids) + 1)), tokenizer.stop_ids[0])
    return ids


def options_of(random, text):
    """Fields of a request."""
    fields = {"model": "tiny", "max_tokens": 500}
    if text and random.random() < 0.5:
        starts = random.integers(len(text), size=random.integers(1, 4))
        fields["stop"] = [text[at : at + 1 + random.integers(5)] for at in starts]
        fields["include_stop_str_in_output"] = bool(random.random() < 0.3)
    if random.random() < 0.2:
        fields["min_tokens"] = int(random.integers(12))
    if random.random() < 0.2:
        fields["skip_special_tokens"] = False
    if random.random() < 0.2:
        fields["stream_interval"] = int(random.integers(1, 6))
    if random.random() < 0.3:
        fields["return_token_ids"] = True
    if random.random() < 0.2:
        fields["stream_options"] = {"continuous_usage_stats": True}
    return fields | {"stream": True}


def chat_case(random, model, text):
    fields = options_of(random, text) | {"messages": HI}
    if random.random() < 0.5:
        fields |= {"logprobs": True, "top_logprobs": int(random.integers(3))}
    if model.calls:
        fields |= {"tools": [WEATHER], "parallel_tool_calls": random.random() < 0.8}
    return prepare_chat(ChatRequest.read(fields), model, id="x", created=7)


def completion_case(random, model, text):
    fields = options_of(random, text) | {
        "prompt": "the é",
        "echo": random.random() < 0.3,
    }
    if random.random() < 0.5:
        fields |= {"logprobs": int(random.integers(3))}
    return prepare_completion(CompletionRequest.read(fields), model, id="x", created=7)


def blocks(random, count):
    sizes = []
    while sum(sizes) < count:
        sizes.append(int(random.integers(1, 9)))
    return sizes


def check_every_chunking(random, prepared, assembler, tokens):
    """One response for all chunkings; it is what its chunks add up to."""
    reason = random.choice(["length", "cancelled"])
    first = assembler(prepared)
    chunks = run(first, tokens, reason=reason)
    check_what_is_told_is_sent(prepared, chunks)
    written = first.answer().json_text()
    for sizes in (blocks(random, len(tokens)), [max(len(tokens), 1)]):
        other = assembler(prepared)
        assert run(other, tokens, reason=reason, sizes=sizes) == chunks
        assert other.answer().json_text() == written
    answer = json.loads(written)
    sum_of_chunks = added_up(chunks, usage=prepared.continuous_usage)
    expected = json.loads(written)
    del expected["object"]
    if not prepared.continuous_usage:
        del expected["usage"]
    if expected["choices"][0]["logprobs"] == {"content": []}:
        expected["choices"][0]["logprobs"] = None
    assert sum_of_chunks == expected
    return answer


def check_what_is_told_is_sent(prepared, chunks):
    """No token is told before the chunk with its last character.

    The last two chunks are one part of the output, with the tokens of the stop.
    """
    reading = prepared.reading
    if not prepared.return_ids or reading.thinking or reading.calls or prepared.echo:
        return
    skip = reading.skip_special
    told = TextStream(prepared.served.tokenizer, skip_special=skip)
    sent, known = "", ""
    for chunk in map(json.loads, chunks[:-2]):
        [choice] = chunk["choices"]
        sent += choice.get("text") or choice.get("delta", {}).get("content") or ""
        known += told.push(choice.get("token_ids", []))
        assert sent.startswith(known)


def check_against_the_rules(prepared, ids, answer):
    """The same answer from the whole text at once, by the rules as they are written."""
    reading, tokenizer = prepared.reading, prepared.served.tokenizer
    stops = [place for place, token in enumerate(ids) if token in reading.stop_ids]
    before = ids[: stops[0]] if stops else ids

    def decoded(count):
        skip = reading.skip_special
        stream = TextStream(tokenizer, skip_special=skip, shown=reading.shown)
        return stream.push(before[:count]) + stream.flush()

    text = decoded(len(before))
    stop = first_end(text, reading.stop)
    kept = len(before) + bool(stops)
    if stop is not None:
        kept = next(
            count
            for count in range(1, len(before) + 1)
            if decoded(count)[: stop[1]] == text[: stop[1]]
        )
        text = text[: stop[1] if reading.include_stop else stop[0]]
    parser = OutputParser(reading.thinking, reading.calls, opened=reading.opened)
    reasoning, told, made = said([*parser.push(text), *parser.finish()])
    choice = answer["choices"][0]
    message = choice.get("message", {"content": choice.get("text")})
    assert (message.get("reasoning") or "") == reasoning
    assert (message["content"] or "") == told
    assert [
        (each["function"]["name"], each["function"]["arguments"])
        for each in message.get("tool_calls", [])
    ] == [(name, arguments) for name, arguments, _ in made]
    assert answer["usage"]["completion_tokens"] == kept
    ended = stop is not None or bool(stops)
    if made and all(is_whole for *_, is_whole in made) and ended:
        assert choice["finish_reason"] == "tool_calls"
    elif ended:
        assert choice["finish_reason"] == "stop"
    return ids[:kept]


def check_log_probs(prepared, choice, kept):
    """One entry for each token that is kept, with its own value."""
    if prepared.log_probs is None:
        assert choice["logprobs"] is None
        return
    told = choice["logprobs"]
    values = told.get("token_logprobs") or [
        entry["logprob"] for entry in told.get("content", [])
    ]
    values = values[-len(kept) :] if kept else []
    assert values == [-place / 8 for place in range(len(kept))]
    if "content" in told:
        spelled = [(entry["token"], entry["bytes"]) for entry in told["content"]]
        assert spelled == [prepared.served.spelled(token) for token in kept]


def check_case(random, model):
    text = output_text(random, random.choice([None, "hermes", "llama3", "deepseek_v4"]))
    ids = tokens_of(random, model.tokenizer, text)
    is_chat = random.random() < 0.75
    case = chat_case if is_chat else completion_case
    prepared = case(random, model, text)
    tokens = sampled(ids, top=prepared.log_probs or 0)
    assembler = ChatAssembler if is_chat else CompletionAssembler
    answer = check_every_chunking(random, prepared, assembler, tokens)
    choice = answer["choices"][0]
    if prepared.return_ids:
        kept = choice["token_ids"]
        assert kept == ids[: len(kept)]
    kept = ids[: answer["usage"]["completion_tokens"]]
    if not (prepared.reading.min_tokens or prepared.reading.one_call or prepared.echo):
        assert kept == check_against_the_rules(prepared, ids, answer)
    if not prepared.echo:
        check_log_probs(prepared, choice, kept)


def models(tokenizer):
    """The same tokens in the hands of models of several forms."""
    forms = [(None, None), ("qwen3", "hermes"), (None, "llama3")]
    forms += [("deepseek_v4", "deepseek_v4"), ("deepseek_r1", None)]
    return [served(tokenizer, *form) for form in forms]


def tokenizers():
    """Bytes, merged bytes, pieces with bytes for the rest; with and without tags."""
    template = tiny.TEMPLATE
    made = [tiny.tokenizer()]
    for core in (folders.byte_level(), folders.llama3(), folders.byte_fallback()):
        end = core.token_to_id("</s>")
        made.append(Tokenizer(core=core, stop_ids=[end], chat_template=template))
    made[1].core.add_tokens(["<think>", "</think>", "｜DSML｜"])
    made[2].core.add_special_tokens(["<|python_tag|>", "｜DSML｜", "</think>"])
    return made


def test_the_response_is_the_same_however_its_tokens_are_chunked(random):
    every = [model for tokenizer in tokenizers() for model in models(tokenizer)]
    for _ in range(CASES):
        check_case(random, every[random.integers(len(every))])


def test_so_it_is_for_the_embedded_model(random, smollm2_path):
    tokenizer = tokenizer_from_gguf(open_gguf(smollm2_path))
    every = models(tokenizer)
    for _ in range(EMBEDDED_CASES):
        check_case(random, every[random.integers(len(every))])


def test_outputs_beside_each_other_are_what_they_are_alone(random):
    """The engine tells of several in any order; each has the chunks of its own."""
    model = served(thinking="qwen3", calls="hermes")
    for _ in range(100):
        texts = [output_text(random, "hermes") for _ in range(3)]
        body = options_of(random, texts[0]) | {"messages": HI, "tools": [WEATHER]}
        body["stream_options"] = None
        request = ChatRequest.read(body | {"n": 3})
        prepared = prepare_chat(request, model, id="x", created=7)
        every = [sampled(tokens_of(random, model.tokenizer, text)) for text in texts]
        alone = [
            run(ChatAssembler(prepared), tokens, choice=choice)
            for choice, tokens in enumerate(every)
        ]
        together, found = ChatAssembler(prepared), [[], [], []]
        rest = [[Prefilled(choice=i)] for i in range(3)]
        for choice, tokens in enumerate(every):
            place = 0
            for size in blocks(random, len(tokens)):
                block = tokens[place : place + size]
                rest[choice].append(Tokens(choice=choice, tokens=block))
                place += size
            rest[choice].append(Ended(choice=choice, reason="length"))
        while any(rest):
            choice = random.choice([i for i in range(3) if rest[i]])
            for chunk in together.push(rest[choice].pop(0)):
                found[choice].append(chunk.json_text())
        assert found == alone and together.finished


def test_the_checks_can_fail(random):
    """An engine that loses a token of each block is found out."""

    class Lossy(ChatAssembler):
        def push(self, event):
            if hasattr(event, "tokens") and len(event.tokens) > 2:
                object.__setattr__(event, "tokens", event.tokens[1:])
            return super().push(event)

    with pytest.raises(AssertionError):
        for _ in range(20):
            prepared = chat_case(np.random.default_rng(0), served(), "")
            tokens = sampled(tiny.tokenizer().encode("twenty letters or so"))
            check_every_chunking(random, prepared, Lossy, tokens)
