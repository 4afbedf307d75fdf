"""Requests that were understood: what the engine is asked for, and how it is told.

`prepare_chat` and `prepare_completion` take a client's body to a `Prepared`; nothing
that follows can find fault with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxspark.serving.chat_request import ChatRequest
from jaxspark.serving.conversation import chat_ids, text_of, tool_use
from jaxspark.serving.demands import Demand
from jaxspark.serving.errors import ApiError, wrong
from jaxspark.serving.fields import SamplingFields
from jaxspark.serving.other_requests import CompletionRequest
from jaxspark.serving.sampling import check_stream, demands, stop_ids
from jaxspark.serving.served import Served
from jaxspark.serving.structured import grammar_of
from jaxspark.text import ReadOptions
from jaxspark.text.thinking import ThinkFormat

# Tokens at a prompt's end that tell whether it opened a think block.
_TAIL = 16


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that can be served.

    Attributes:
      id: of the request, as clients see it.
      created: when it came, in seconds.
      served: by which model.
      demands: what the engine is asked for, one for each choice.
      n: choices of each prompt.
      reading: how outputs are read.
      log_probs: the number of most likely tokens told beside each; None tells no
        log-probabilities.
      prompt_log_probs: the same for prompts; None tells none.
      stream: whether chunks are sent.
      interval: least tokens of a chunk.
      include_usage: whether a last chunk has the usage.
      continuous_usage: whether every chunk has.
      return_ids: whether token ids are told.
      return_drafted: whether it is told which tokens are accepted drafts.
      own_stop_ids: stop tokens that the client named.
      echo: whether completions begin with their prompts.
      prompts_only: whether outputs are left out.
    """

    id: str
    created: int
    served: Served
    demands: Sequence[Demand]
    n: int
    reading: ReadOptions
    log_probs: int | None = None
    prompt_log_probs: int | None = None
    stream: bool = False
    interval: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    return_ids: bool = False
    return_drafted: bool = False
    own_stop_ids: frozenset[int] = frozenset()
    echo: bool = False
    prompts_only: bool = False


def prepare_chat(
    request: ChatRequest, served: Served, *, id: str, created: int
) -> Prepared:
    """Understands a chat.

    Args:
      request: the client's body.
      served: the model.
      id: a new one, used unless the client gave one.
      created: when it came, in seconds.

    Raises:
      ApiError: what cannot be served; says why.
    """
    served.check_model(request.model)
    check_stream(request)
    most, limit = request.max_completion_tokens, "max_completion_tokens"
    if most is None:
        most, limit = request.max_tokens, "max_tokens"
    elif request.max_tokens not in (None, most):
        raise wrong(
            "max_tokens", request.max_tokens, f"max_completion_tokens, {most}, or none"
        )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(
            "top_logprobs is given, and logprobs is not true; set it", param="logprobs"
        )
    use = tool_use(request, served)
    ids = chat_ids(request, served)
    log_probs = (request.top_logprobs or 0) if request.logprobs else None
    id = f"chatcmpl-{request.request_id or id}"
    thinking = served.thinking
    opened = thinking is not None and _is_open(thinking, request, served, ids)
    asked = demands(
        request,
        served,
        group=id,
        prompts=[ids],
        param="messages",
        max_tokens=most,
        log_probs=log_probs,
        prompt_log_probs=request.prompt_logprobs,
        limit=limit,
        grammar=grammar_of(request, served, tool_use=use, opened=opened),
    )
    return _prepared(
        request,
        served,
        id=id,
        created=created,
        demands=asked,
        log_probs=log_probs,
        prompt_log_probs=request.prompt_logprobs,
        thinking=thinking,
        opened=opened,
        calls=None if use is None else served.calls,
        one_call=use is not None and not use.parallel,
    )


def _is_open(
    thinking: ThinkFormat, request: ChatRequest, served: Served, ids: Sequence[int]
) -> bool:
    """Whether a chat's prompt ends inside a think block."""
    if not request.continue_final_message:
        tail = served.tokenizer.decode(ids[-_TAIL:], skip_special=False)
        return thinking.opened_by(tail)
    text = served.tokenizer.decode(ids, skip_special=False)
    return thinking.opened_by(text, text_of((request.messages or [])[-1]))


def prepare_completion(
    request: CompletionRequest, served: Served, *, id: str, created: int
) -> Prepared:
    """Understands a completion; see `prepare_chat`."""
    served.check_model(request.model)
    check_stream(request)
    if request.max_tokens == 0 and not request.echo:
        raise wrong("max_tokens", 0, "at least 1, or echo to be true")
    prompts = []
    for place, prompt in enumerate(request.prompt):
        name = f"prompt[{place}]"
        if isinstance(prompt, str):
            try:
                prompt = served.tokenizer.encode(prompt)
            except ValueError as error:
                raise ApiError(f"{name}: {error}", param="prompt") from error
            if not prompt:
                raise wrong(name, "", "a text with at least one token")
        served.check_tokens(name, prompt)
        prompts.append(prompt)
    prompt_log_probs = request.prompt_logprobs
    if request.echo and request.logprobs is not None and prompt_log_probs is None:
        prompt_log_probs = request.logprobs
    id = f"cmpl-{request.request_id or id}"
    asked = demands(
        request,
        served,
        group=id,
        prompts=prompts,
        param="prompt",
        max_tokens=request.max_tokens,
        log_probs=request.logprobs,
        prompt_log_probs=prompt_log_probs,
        grammar=grammar_of(request, served),
    )
    return _prepared(
        request,
        served,
        id=id,
        created=created,
        demands=asked,
        log_probs=request.logprobs,
        prompt_log_probs=request.prompt_logprobs,
        echo=bool(request.echo),
        prompts_only=request.max_tokens == 0,
    )


def _prepared(
    request: SamplingFields,
    served: Served,
    *,
    thinking: Any = None,
    opened: bool = False,
    calls: Any = None,
    one_call: bool = False,
    **values: Any,
) -> Prepared:
    """What chats and completions have in common."""
    options = request.stream_options
    skip = request.skip_special_tokens
    return Prepared(
        served=served,
        n=request.n or 1,
        reading=ReadOptions(
            stop=tuple(request.stop or ()),
            include_stop=bool(request.include_stop_str_in_output),
            stop_ids=frozenset(stop_ids(request, served)),
            min_tokens=request.min_tokens or 0,
            skip_special=True if skip is None else skip,
            thinking=thinking,
            opened=opened,
            calls=calls,
            one_call=one_call,
        ),
        stream=bool(request.stream),
        interval=request.stream_interval or 1,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_ids=bool(request.return_token_ids),
        return_drafted=bool(request.return_drafted),
        own_stop_ids=frozenset(request.stop_token_ids or ()),
        **values,
    )
