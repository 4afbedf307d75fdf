"""A model's text side without the model, and a client's side without HTTP."""

import json

from jaxspark.serving import Ended, Prefilled, Sampled, Served, Tokens
from jaxspark.text.formats import CALLS, THINKING
from tests.checkpoints import tiny

HI = [{"role": "user", "content": "hi"}]
END = 257
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def served(tokenizer=None, thinking=None, calls=None, **changes):
    """A model that speaks bytes, or another tokenizer's tokens."""
    tokenizer = tokenizer or tiny.tokenizer()
    values = {
        "name": "tiny",
        "tokenizer": tokenizer,
        "stop_ids": tokenizer.stop_ids,
        "context": 1000,
        "vocab_size": max(tokenizer.vocab_size, 300),
        "thinking": THINKING.get(thinking),
        "calls": CALLS.get(calls),
        "created": 5,
    }
    return Served(**(values | changes))


def sampled(ids, top=0):
    """Tokens with log-probabilities that tell where they were."""
    return [
        Sampled(
            token=token,
            log_prob=-place / 8,
            top=[(token + more, -(place + more) / 8) for more in range(top)],
        )
        for place, token in enumerate(ids)
    ]


def run(assembler, tokens, *, sizes=None, reason="length", choice=0, cached=0):
    """Chunks, as JSON, of an output that the engine tells in blocks of these sizes."""
    chunks = assembler.push(Prefilled(choice=choice, cached=cached))
    place = 0
    for size in sizes or [1] * len(tokens):
        block = tokens[place : place + size]
        chunks += assembler.push(Tokens(choice=choice, tokens=block))
        place += size
    chunks += assembler.push(Ended(choice=choice, reason=reason))
    return [chunk.json_text() for chunk in chunks]


def whole(assembler):
    """The answer as a client gets it."""
    return json.loads(assembler.answer().json_text())


def added_up(chunks, usage=True):
    """What a client makes of chunks: an answer, as it would have come whole."""
    answer, choices = {}, {}
    for chunk in map(json.loads, chunks):
        for key, value in chunk.items():
            if key not in ("choices", "object") and not (key == "usage" and not value):
                answer[key] = value
        for given in chunk["choices"]:
            choice = choices.setdefault(given["index"], {"index": given["index"]})
            _add(choice, given)
    for choice in choices.values():
        message = choice.get("message")
        if message and not message["content"]:
            silent = "reasoning" in message or "tool_calls" in message
            message["content"] = None if silent else ""
        for call in (message or {}).get("tool_calls", []):
            del call["index"]
    if not usage:
        answer.pop("usage", None)
    return answer | {"choices": [choices[i] for i in sorted(choices)]}


def _add(choice, given):
    for key, value in given.items():
        if key == "delta":
            _add_message(choice.setdefault("message", {}), value)
        elif key == "logprobs":
            known = choice.setdefault("logprobs", None)
            if value is not None:
                choice["logprobs"] = known = known or {k: [] for k in value}
                for name, entries in value.items():
                    known[name] += entries
        elif key == "text":
            choice["text"] = choice.get("text", "") + value
        elif key == "token_ids":
            choice["token_ids"] = choice.get("token_ids", []) + value
        elif key != "index":
            choice[key] = value


def _add_message(message, delta):
    for key, value in delta.items():
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for more in value:
                if more["index"] == len(calls):
                    calls.append(more)
                else:
                    function = calls[more["index"]]["function"]
                    function["arguments"] += more["function"]["arguments"]
        elif key == "role":
            message["role"] = value
        else:
            message[key] = message.get(key, "") + value
