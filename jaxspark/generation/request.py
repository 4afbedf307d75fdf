"""What a user asks for: a prompt and how it is continued."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxspark.decoding import Adjustment, AdjustmentLimits
from jaxspark.generation.adjusting import adjustment_of
from jaxspark.generation.params import SamplingParams
from jaxspark.generation.values import FieldError, about, number, whole
from jaxspark.grammars import Matcher, matcher_of
from jaxspark.models.pages import PAGE, pages_for
from jaxspark.target import Target

# Likely tokens told at a place, as OpenAI has them.
MAX_TOP_LOG_PROBS = 20
UNLIMITED = 2**30


class RequestError(ValueError):
    """A request that cannot be served; names it, the value and what is expected.

    Attributes:
      field: of `SamplingParams`, or "prompt"; None where it is not one alone.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, init=False)
class Request:
    """A prompt and how it is continued: `Request(prompt, temperature=0.8)`.

    Attributes:
      prompt: token ids, or text for a target with a tokenizer (see `Tokenizer.chat` for
        chat prompts).
      params: how it is continued.
      name: for reports.
    """

    prompt: Sequence[int] | str
    params: SamplingParams = SamplingParams()
    name: str = ""

    def __init__(
        self,
        prompt: Sequence[int] | str,
        params: SamplingParams = SamplingParams(),
        name: str = "",
        **changes: Any,
    ):
        """Keywords beside `name` are fields of `SamplingParams` that differ."""
        for field, value in (
            ("prompt", prompt),
            ("params", replace(params, **changes)),
            ("name", name),
        ):
            object.__setattr__(self, field, value)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one batch can serve; by default anything but drafts.

    Attributes:
      capacity: positions of a slot.
      block_length: most drafts per round, which need positions too.
      min_drafts: most drafts that a round can verify of every slot.
      stop_ids: most tokens that may end a request.
      log_probs: whether they are kept.
      top_log_probs: most likely tokens kept beside each.
      prompt_log_probs: whether those of prompts are kept.
      adjustments: what may be done to logits; None for anything.
      pages: of the caches, which a slot may have all of.
      grammars: whether there may be any.
    """

    capacity: int = UNLIMITED
    block_length: int = 0
    min_drafts: int = 0
    stop_ids: int = UNLIMITED
    log_probs: bool = True
    top_log_probs: int = MAX_TOP_LOG_PROBS
    prompt_log_probs: bool = True
    adjustments: AdjustmentLimits | None = None
    pages: int = UNLIMITED
    grammars: bool = True


@dataclass(frozen=True, kw_only=True)
class CheckedRequest:
    """A request whose every value is known and in range.

    Attributes:
      index: its number in the batch.
      ids: the prompt's tokens.
      stop_ids: tokens that end it.
      seed: of its randomness.
      min_drafts: drafts verified in every round that drafts.
      max_drafts: most drafts that are.
      adjustment: what is done to its logits.
      matcher: its grammar at the beginning of the output; None if it has none.
      params: everything else.
    """

    index: int
    ids: list[int]
    stop_ids: list[int]
    seed: int
    min_drafts: int
    max_drafts: int
    adjustment: Adjustment = Adjustment()
    matcher: Matcher | None = None
    params: SamplingParams

    @property
    def limit(self) -> int:
        """Tokens of the prompt and the whole output."""
        return len(self.ids) + self.params.max_new_tokens


def check(
    request: Request, index: int, target: Target, limits: Limits
) -> CheckedRequest:
    """The request with every default filled in.

    Raises:
      RequestError: a value that is out of range, or more than the batch can serve.
    """
    name = f"request {index}" + (f" ({request.name})" if request.name else "")
    try:
        return _checked(request, index, target, limits)
    except ValueError as error:
        field = error.field if isinstance(error, FieldError) else None
        raise RequestError(f"{name}: {error}", field) from error


def _checked(request: Request, index: int, target: Target, limits: Limits):
    params, config = request.params, target.model.config
    budget = whole("max_new_tokens", params.max_new_tokens, 1, None)
    with about("prompt"):
        ids = token_ids(target, request.prompt)
        _check_room(len(ids), budget, target, limits)
    number("temperature", params.temperature, 0, float(np.finfo(np.float32).max))
    whole("top_k", params.top_k, 0, 2**31 - 1)
    number("min_p", params.min_p, 0, 1)
    if number("top_p", params.top_p, 0, 1) == 0:
        raise ValueError("top_p must be positive, got 0")
    seed = spread_seed(0, index) if params.seed is None else params.seed
    stop_ids = target.stop_ids if params.stop_ids is None else params.stop_ids
    with about("stop_ids"):
        stop_ids = check_ids(target, "stop_ids", stop_ids)
        if len(stop_ids) > limits.stop_ids:
            raise ValueError(
                f"{len(stop_ids)} stop ids, this batch has room for {limits.stop_ids}"
            )
    most = limits.block_length
    if params.max_drafts is not None:
        most = min(whole("max_drafts", params.max_drafts, 0, None), most)
    # They bound rounds that draft; plain decoding has none.
    room = min(most, limits.min_drafts) if limits.block_length else None
    least = whole("min_drafts", params.min_drafts, 0, room)
    adjustment = adjustment_of(params, target, stop_ids)
    if limits.adjustments is not None:
        limits.adjustments.check(adjustment)
    _check_told(params, limits)
    matcher = None
    if params.grammar is not None:
        if not limits.grammars:
            raise ValueError(
                "a grammar is asked for, this batch was made without (grammars=False)"
            )
        matcher = matcher_of(
            params.grammar,
            target.tokenizer,
            vocab=config.vocab_size,
            stop_ids=stop_ids,
        )
    return CheckedRequest(
        index=index,
        ids=ids,
        stop_ids=stop_ids,
        seed=whole("seed", seed, 0, 2**32 - 1),
        min_drafts=min(least, most),
        max_drafts=most,
        adjustment=adjustment,
        matcher=matcher,
        params=params,
    )


def _check_room(prompt: int, budget: int, target: Target, limits: Limits) -> None:
    """Raises `ValueError` if a prompt and its new tokens fit no slot."""
    positions, needed = target.model.config.max_position_embeddings, prompt + budget
    if needed > positions:
        raise ValueError(
            f"a prompt of {prompt} tokens and {budget} new ones exceed the target's "
            f"{positions} positions"
        )
    needed += limits.block_length
    parts = f"({prompt} of its prompt, {budget} new, a block of {limits.block_length})"
    if needed > limits.capacity:
        raise ValueError(
            f"it needs {needed} positions {parts}, each slot has {limits.capacity}"
        )
    if pages_for(needed) > limits.pages:
        raise ValueError(
            f"it needs {pages_for(needed)} pages of {PAGE} positions {parts}, the "
            f"caches have {limits.pages} in all"
        )


def _check_told(params: SamplingParams, limits: Limits) -> None:
    """Raises `ValueError` if the log-probabilities asked for are not kept."""
    if params.log_probs and not limits.log_probs:
        raise ValueError("log_probs are asked for, this batch keeps none")
    top = whole("top_log_probs", params.top_log_probs, 0, MAX_TOP_LOG_PROBS)
    if top and not params.log_probs:
        raise ValueError(f"top_log_probs is {top}, and log_probs is not set; set it")
    of_prompt = params.prompt_log_probs
    if of_prompt is not None:
        whole("prompt_log_probs", of_prompt, 0, MAX_TOP_LOG_PROBS)
        if not limits.prompt_log_probs:
            raise ValueError("prompt_log_probs are asked for, this batch keeps none")
    for name, asked in (("top_log_probs", top), ("prompt_log_probs", of_prompt or 0)):
        if asked > limits.top_log_probs:
            raise ValueError(
                f"{name} is {asked}, this batch keeps {limits.top_log_probs} likely "
                "tokens"
            )


def token_ids(target: Target, prompt: Sequence[int] | str) -> list[int]:
    """A prompt's tokens.

    Raises:
      ValueError: text without a tokenizer, no tokens, or what is no token.
    """
    if isinstance(prompt, str):
        if target.tokenizer is None:
            raise ValueError("the prompt is text, the target has no tokenizer")
        prompt = target.tokenizer.encode(prompt)
    if np.ndim(prompt) != 1:
        raise ValueError(f"a prompt is text or a list of token ids, got {prompt!r}")
    ids = check_ids(target, "the prompt", prompt)
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    return ids


def check_ids(target: Target, name: str, ids: Sequence[int]) -> list[int]:
    """Token ids as Python's integers; errors call them `name`.

    Raises:
      ValueError: one that is no whole number, or outside the vocabulary.
    """
    vocab = target.model.config.vocab_size
    if all(type(token) is int and 0 <= token < vocab for token in ids):
        return list(ids)
    return [whole(f"{name}: a token id", token, 0, vocab - 1) for token in ids]


def spread_seed(seed: int, index: int) -> int:
    """The seed of a request by its index, far from those of small numbers."""
    return (seed + 0x9E3779B9 * index) % 2**32
