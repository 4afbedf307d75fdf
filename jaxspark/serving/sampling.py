"""From a client's fields to what the engine is asked for.

What is checked here takes more than one field, or the model, to see.
"""

from collections.abc import Mapping

from jaxspark.generation import Request, SamplingParams
from jaxspark.generation.request import spread_seed
from jaxspark.grammars import Grammar
from jaxspark.serving.demands import Demand
from jaxspark.serving.errors import REFUSED, ApiError, wrong
from jaxspark.serving.fields import MOST_CHOICES, SamplingFields
from jaxspark.serving.served import Served

_MASK = 2**32 - 1


def demands(
    fields: SamplingFields,
    served: Served,
    *,
    group: str,
    prompts: list[list[int]],
    param: str,
    max_tokens: int | None,
    log_probs: int | None,
    prompt_log_probs: int | None,
    limit: str = "max_tokens",
    grammar: Grammar | None = None,
) -> list[Demand]:
    """One demand for each of the `n` outputs of each prompt, in this order.

    Args:
      fields: what the client said.
      served: of which model.
      group: the request's id.
      prompts: their tokens.
      param: the field they come from, for errors.
      max_tokens: most new ones; None takes the room that is left. Where 0 are wanted
        the engine still makes one.
      log_probs: the number of most likely tokens beside each; None for no
        log-probabilities.
      prompt_log_probs: the same for the prompt.
      limit: the field that `max_tokens` comes from, for errors.
      grammar: what the answers obey.

    Raises:
      ApiError: what does not fit the model, or each other.
    """
    allowed, bias = _allowed(fields, served), _bias(fields.logit_bias or {}, served)
    ends = stop_ids(fields, served)
    priority, min_tokens = _priority(fields, served), _or(fields.min_tokens, 0)
    count = fields.n or 1
    if fields.best_of not in (None, 1, count):
        raise wrong("best_of", fields.best_of, f"n, {count}; {REFUSED['best_of']}")
    if count * len(prompts) > MOST_CHOICES:
        raise wrong("n", count, f"at most {MOST_CHOICES} outputs of all prompts")
    found = []
    for place, ids in enumerate(prompts):
        budget = _budget(len(ids), served, param, max_tokens, limit)
        if min_tokens > budget:
            raise wrong("min_tokens", min_tokens, f"at most {limit}, {budget}")
        for number in range(place * count, (place + 1) * count):
            params = SamplingParams(
                max_new_tokens=max(budget, 1),
                temperature=_or(fields.temperature, 1.0),
                top_k=max(_or(fields.top_k, 0), 0),
                top_p=_or(fields.top_p, 1.0),
                min_p=_or(fields.min_p, 0.0),
                seed=None if fields.seed is None else seed_of(fields.seed, number),
                stop_ids=ends,
                log_probs=log_probs is not None,
                top_log_probs=log_probs or 0,
                prompt_log_probs=prompt_log_probs,
                presence_penalty=_or(fields.presence_penalty, 0.0),
                frequency_penalty=_or(fields.frequency_penalty, 0.0),
                repetition_penalty=_or(fields.repetition_penalty, 1.0),
                logit_bias=bias,
                allowed_ids=allowed,
                bad_words=tuple(fields.bad_words or ()),
                min_tokens=min_tokens,
                grammar=grammar,
            )
            found.append(
                Demand(
                    group=group,
                    choice=number,
                    request=Request(ids, params, name=f"{group}/{number}"),
                    priority=priority,
                    deadline_s=fields.timeout,
                    cache_salt=fields.cache_salt,
                )
            )
    return found


def stop_ids(fields: SamplingFields, served: Served) -> tuple[int, ...]:
    """Tokens that end an output: the model's, unless ignored, and the client's."""
    own = () if fields.ignore_eos else served.stop_ids
    added = fields.stop_token_ids or []
    served.check_tokens("stop_token_ids", added)
    return tuple(dict.fromkeys([*own, *added]))


def seed_of(seed: int, number: int) -> int:
    """The engine's seed of an output; small seeds are themselves for the first.

    Clients have 64 bits, the engine's generators 32: the upper half is mixed in.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return spread_seed(spread_seed(low, high), number)


def check_stream(fields: SamplingFields) -> None:
    """That what belongs to streams is said of streams.

    Raises:
      ApiError: it is not.
    """
    for name in ("stream_options", "stream_interval"):
        if getattr(fields, name) is not None and not fields.stream:
            raise ApiError(
                f"{name} is given, and stream is not true; leave it out", param=name
            )


def _or[T](value: T | None, default: T) -> T:
    return default if value is None else value


def _priority(fields: SamplingFields, served: Served) -> int:
    if fields.priority is None:
        return max(0, served.least_priority)
    if fields.priority < served.least_priority:
        raise wrong(
            "priority",
            fields.priority,
            f"at least {served.least_priority}, this server's --min_priority",
        )
    return fields.priority


def _allowed(fields: SamplingFields, served: Served) -> list[int] | None:
    allowed = fields.allowed_token_ids
    if allowed is None:
        return None
    if len(allowed) > served.vocab_size:
        raise ApiError(
            f"allowed_token_ids has {len(allowed)} ids; expected at most those of the "
            f"vocabulary, {served.vocab_size}",
            param="allowed_token_ids",
        )
    served.check_tokens("allowed_token_ids", allowed)
    return allowed


def _budget(
    prompt: int, served: Served, param: str, max_tokens: int | None, limit: str
) -> int:
    room = served.context - prompt
    if room < 1:
        raise ApiError(
            f"{param} has {prompt} tokens; the model has room for {served.context} "
            "with at least one new token; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if served.most_prompt is not None and prompt > served.most_prompt:
        raise ApiError(
            f"{param} has {prompt} tokens; this server takes prompts of at most "
            f"{served.most_prompt}; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            f"{limit} is {max_tokens}; behind the {prompt} tokens of {param} the model "
            f"has room for {room}",
            param=limit,
            code="context_length_exceeded",
        )
    if served.most_output is not None:
        if max_tokens is not None and max_tokens > served.most_output:
            raise wrong(limit, max_tokens, f"at most {served.most_output}")
        room = min(room, served.most_output)
    return room if max_tokens is None else max_tokens


def _bias(bias: Mapping[str, float], served: Served) -> dict[int, float]:
    found = {}
    for text, value in bias.items():
        if not text.isdecimal() or len(text) > 10:
            raise wrong("logit_bias", text, "token ids as keys")
        served.check_tokens("logit_bias", [int(text)])
        found[int(text)] = value
    return found
