"""One request to an OpenAI-compatible server, and when each part of its answer came."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked.

    Attributes:
      message: the user's.
      max_tokens: of the answer; it does not end sooner where the server knows
        `ignore_eos`, as ours, vLLM's and SGLang's do.
      temperature: of sampling.
      seed: of sampling.
      user: who asks.
    """

    message: str
    max_tokens: int
    temperature: float
    seed: int
    user: str = "load"

    def body(self, model: str) -> dict[str, Any]:
        """The request as a stream."""
        return {
            "model": model,
            "messages": [{"role": "user", "content": self.message}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "user": self.user,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(kw_only=True)
class Timeline:
    """What became of a request; times are those of `time.monotonic`.

    Attributes:
      sent: when it was sent.
      arrivals: when new text came. Tokens that come together are one arrival.
      ended: when the answer was complete.
      prompt_tokens, output_tokens: by the server's count.
      error: why there is no answer.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


async def ask(client: httpx.AsyncClient, model: str, question: Question) -> Timeline:
    """Asks, and notes when what came; errors are noted as well."""
    timeline = Timeline(sent=time.monotonic())
    body = question.body(model)
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode("utf-8", "replace")
                timeline.error = f"{response.status_code}: {said[:200]}"
            else:
                await _read(response, timeline)
    except httpx.HTTPError as error:
        timeline.error = f"{type(error).__name__}: {error}"
    timeline.ended = time.monotonic()
    return timeline


async def _read(response: httpx.Response, timeline: Timeline) -> None:
    rest, finished = b"", False
    async for part in response.aiter_bytes():
        now = time.monotonic()
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        spoke = False
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if not event.startswith(b"data:") or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                timeline.error = str(chunk["error"].get("message"))
                return
            if usage := chunk.get("usage"):
                timeline.prompt_tokens = usage["prompt_tokens"]
                timeline.output_tokens = usage["completion_tokens"]
            for choice in chunk.get("choices", ()):
                delta = choice["delta"]
                spoke |= any(
                    delta.get(key) for key in ("content", "reasoning", "tool_calls")
                )
                finished |= choice.get("finish_reason") is not None
        if spoke:
            timeline.arrivals.append(now)
    if not finished:
        timeline.error = "the stream broke off"
