"""The model that a server serves, as far as requests have to know it."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxspark.serving.errors import ApiError, shown
from jaxspark.target import Target
from jaxspark.text import Tokenizer
from jaxspark.text.formats import CALLS, THINKING, CallFormat, ThinkFormat, detect
from jaxspark.text.token_bytes import TokenBytes


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model under its name.

    Attributes:
      name: what clients call it.
      tokenizer: its.
      stop_ids: tokens that end its texts.
      context: most tokens of prompt and output.
      most_prompt: most tokens of a prompt; None for what the context has room for.
      most_output: most new tokens, also where a client names no number; None likewise.
      least_priority: lowest priority that clients may ask for; requests without one
        have 0, or this if it is more.
      vocab_size: ids are below this.
      thinking: how it reasons; None leaves think blocks in answers.
      calls: how it calls tools; None refuses tools.
      created: when serving began, in seconds.
      fingerprint: told as `system_fingerprint`: what an answer depends on beside its
        request and its seed; empty tells none.
    """

    name: str
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    context: int
    vocab_size: int
    most_prompt: int | None = None
    most_output: int | None = None
    least_priority: int = 0
    thinking: ThinkFormat | None = None
    calls: CallFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""

    @classmethod
    def of(cls, target: Target, *, context: int, **changes: Any) -> "Served":
        """A target; how it thinks and calls tools is read off its tokenizer.

        Args:
          target: what is served.
          context: most tokens of prompt and output.
          **changes: attributes that differ.

        Raises:
          ValueError: it has no tokenizer.
        """
        if target.tokenizer is None:
            raise ValueError("the target has no tokenizer; a server speaks text")
        thinking, calls = detect(target.tokenizer)
        values = {
            "name": target.name or "model",
            "tokenizer": target.tokenizer,
            "stop_ids": tuple(target.stop_ids),
            "vocab_size": target.model.config.vocab_size,
            "thinking": THINKING[thinking] if thinking else None,
            "calls": CALLS[calls] if calls else None,
        }
        return cls(context=context, **(values | changes))

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer.core)

    @cached_property
    def _spelled(self) -> dict[int, tuple[str, list[int]]]:
        return {}

    def spelled(self, token: int) -> tuple[str, list[int]]:
        """A token by itself, as text and as bytes; they are found once.

        Half a character is a replacement character in the text.
        """
        if token not in self._spelled:
            text = self.tokenizer.decode([token], skip_special=False)
            self._spelled[token] = text, list(self._token_bytes(token))
        return self._spelled[token]

    def check_model(self, name: str | None) -> None:
        """That a request means this model; None does.

        Raises:
          ApiError: it does not.
        """
        if name not in (None, self.name):
            raise ApiError(
                f"model is {shown(name)}; this server has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def check_tokens(self, param: str, tokens: Any) -> None:
        """That ids are in the vocabulary.

        Raises:
          ApiError: one is not; it is named.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ApiError(
                    f"{param} has the token {token}; expected ids below "
                    f"{self.vocab_size}",
                    param=param,
                )
