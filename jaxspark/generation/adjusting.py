"""What a request does to its logits, from what a user wrote to token ids in range."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxspark.decoding import Adjustment
from jaxspark.generation.params import SamplingParams
from jaxspark.generation.values import number, whole
from jaxspark.target import Target

# OpenAI's bounds; repetition penalties are vLLM's.
PENALTY, MAX_REPETITION, BIAS = 2.0, 100.0, 100.0


def adjustment_of(
    params: SamplingParams, target: Target, stop_ids: Sequence[int]
) -> Adjustment:
    """The adjustment that `SamplingParams` ask for.

    Raises:
      ValueError: a value out of range, what is no token of the target, or a text
        without a tokenizer; or some output could have no next token.
    """
    vocab = target.model.config.vocab_size

    def token(name: str, value: Any) -> int:
        return whole(f"{name}: a token id", value, 0, vocab - 1)

    def penalty(name: str) -> float:
        return number(name, getattr(params, name), -PENALTY, PENALTY)

    repetition = number(
        "repetition_penalty", params.repetition_penalty, 0, MAX_REPETITION
    )
    if repetition == 0:
        raise ValueError("repetition_penalty must be positive, got 0")
    bias = params.logit_bias or {}
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {bias!r}")
    allowed = params.allowed_ids
    if allowed is not None:
        allowed = tuple(sorted({token("allowed_ids", each) for each in allowed}))
    found = Adjustment(
        presence_penalty=penalty("presence_penalty"),
        frequency_penalty=penalty("frequency_penalty"),
        repetition_penalty=repetition,
        logit_bias={
            token("logit_bias", each): number("logit_bias", value, -BIAS, BIAS)
            for each, value in bias.items()
        },
        allowed_ids=allowed,
        bad_words=tuple(dict.fromkeys(_bad_words(params.bad_words, target, token))),
        min_tokens=whole("min_tokens", params.min_tokens, 0, params.max_new_tokens),
    )
    found.check(vocab, stop_ids)
    return found


def _bad_words(words: Any, target: Target, token: Any) -> list[tuple[int, ...]]:
    """Token sequences; a text's are those at a text's beginning and behind a space."""
    if isinstance(words, str):
        raise ValueError(f"bad_words must be a list, got {words!r}")
    found = []
    for word in words:
        if np.ndim(word) != 1 and not isinstance(word, str):
            raise ValueError(
                f"bad_words has {word!r}; expected texts or lists of token ids"
            )
        if not len(word):
            raise ValueError("bad_words has an empty entry; leave it out")
        if not isinstance(word, str):
            found.append(tuple(token("bad_words", each) for each in word))
        elif target.tokenizer is None:
            raise ValueError("bad_words has a text, the target has no tokenizer")
        else:
            bare = word.lstrip(" ")
            for text in (bare, f" {bare}") if bare else (word,):
                ids = target.tokenizer.encode(text, add_special_tokens=False)
                found += [tuple(ids)] if ids else []
    return found
