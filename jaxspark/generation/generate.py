"""`generate` and `generate_stream`: the two ways to run a `ContinuousBatch`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxspark.decoding import AdjustmentLimits, DecodeOptions
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.generation.batch import MAX_STOP_IDS, ContinuousBatch
from jaxspark.generation.completion import Completion
from jaxspark.generation.request import (
    UNLIMITED,
    CheckedRequest,
    Limits,
    Request,
    RequestError,
    SamplingParams,
    check,
    spread_seed,
)
from jaxspark.models import TargetModel
from jaxspark.parallel.mesh import slot_shards
from jaxspark.target import Target

# Cache lengths are multiples of this, so that similar requests share a program.
LENGTH_STEP = 128
ROUNDS_PER_CALLBACK = 4
PARAMS = {each.name for each in fields(SamplingParams)}

Prompt = str | Sequence[int]
# Called with a request's index and its new tokens; False cancels the request.
OnTokens = Callable[[int, list[int]], bool | None]


def generate(
    target: Target | TargetModel,
    prompts: Prompt | Sequence[Prompt | Request],
    drafter: Drafter | None = None,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    options: DecodeOptions = DecodeOptions(),
    capacity: int | None = None,
    adjustments: AdjustmentLimits | None = None,
    on_tokens: OnTokens | None = None,
    errors: Literal["raise", "return"] = "raise",
    **named: Any,
) -> list[Completion]:
    """Continues all prompts together, one slot each; exact whatever the drafter.

        [completion] = generate(target, ["Once"], drafter, temperature=0.8)

    Args:
      target: a loaded `Target`, or a bare model.
      prompts: token ids, or text for a target with a tokenizer; or whole requests.
      drafter: what proposes; None decodes plainly, one token at a time.
      params: of all prompts, or of each. One seed for all is spread by prompt index.
      options: how rounds draft, schedule and verify.
      capacity: cache positions per slot; None takes what the requests need. One value
        for many calls lets them share compiled programs.
      adjustments: what is compiled for changes of logits; None takes what the requests
        need. One value for many calls likewise.
      on_tokens: called with (prompt index, new tokens) as output grows; where it
        returns False, that request is cancelled.
      **named: fields of `SamplingParams` and of `DecodeOptions` that differ from
        `params` and `options`; of the former a list has one value per prompt.
      errors: "raise" for the first request that cannot be served, before anything is
        computed; "return" gives such a request a completion with `error`.

    Raises:
      ValueError: options, drafter and target that do not go together, or no prompts.
      RequestError: see `errors`.
    """
    target = Target.of(target)
    drafter = PlainDrafter() if drafter is None else drafter
    drafter.check_target(target.model.config)
    sampled = {name: named.pop(name) for name in PARAMS & named.keys()}
    options = replace(options, **named)
    requests = as_requests(prompts, params, sampled)
    slots = _multiple(len(requests), slot_shards())
    per_shard = slots // slot_shards()
    resolved = options.resolve(drafter, per_shard)
    block = resolved.block
    limits = Limits(
        capacity=UNLIMITED if capacity is None else capacity,
        block_length=block,
        min_drafts=resolved.max_min_drafts(per_shard),
        adjustments=adjustments,
    )
    checked: list[CheckedRequest] = []
    completions: dict[int, Completion] = {}
    for index, request in enumerate(requests):
        try:
            checked.append(check(request, index, target, limits))
        except RequestError as error:
            if errors == "raise":
                raise
            completions[index] = failed(error)
    if checked:
        batch = ContinuousBatch(
            target,
            drafter,
            slots=_multiple(len(checked), slot_shards()),
            capacity=capacity or round_capacity(max(r.limit for r in checked) + block),
            options=options,
            # In steps, so that similar requests share a program.
            max_stop_ids=_multiple(max(len(r.stop_ids) for r in checked), MAX_STOP_IDS),
            log_probs=any(request.params.log_probs for request in checked),
            **_told(checked),
            adjustments=adjustments
            or AdjustmentLimits.of([each.adjustment for each in checked]),
            together=len(checked),
            rounds_per_step=UNLIMITED if on_tokens is None else ROUNDS_PER_CALLBACK,
        )
        for each in checked:
            batch.enqueue(each)
        while not batch.idle:
            completions |= _step(batch, on_tokens)
    return [completions[index] for index in range(len(requests))]


def generate_stream(
    target: Target | TargetModel,
    requests: Iterable[Request],
    drafter: Drafter | None = None,
    *,
    slots: int,
    capacity: int,
    options: DecodeOptions = DecodeOptions(),
    max_stop_ids: int = MAX_STOP_IDS,
    log_probs: bool = False,
    adjustments: AdjustmentLimits = AdjustmentLimits(),
    top_log_probs: int = 0,
    prompt_log_probs: bool = False,
    on_tokens: OnTokens | None = None,
    together: int | None = None,
    rounds_per_step: int = 8,
) -> Iterator[tuple[int, Completion]]:
    """Yields (request index, completion) as requests end, in no fixed order.

    A request that cannot be served ends nothing but itself: its completion says why.

    Args:
      target: a loaded `Target`, or a bare model.
      requests: read as slots become free.
      drafter: what proposes; None decodes plainly.
      slots: requests decoded together.
      capacity: positions per slot; each request needs its prompt, its new tokens and
        the block length.
      options: how rounds draft, schedule and verify.
      max_stop_ids: most tokens that may end a request.
      log_probs: whether requests may ask for log-probabilities.
      adjustments: what they may do to logits, such as `AdjustmentLimits.serving()`.
      top_log_probs: most likely tokens that they may ask for beside each.
      prompt_log_probs: whether they may ask for those of prompts.
      on_tokens: called with (request index, new tokens) as output grows; where it
        returns False, that request is cancelled.
      together: requests prefilled together; None takes a quarter of the slots.
      rounds_per_step: most rounds between two looks at what has come.

    Raises:
      ValueError: options, drafter and target that do not go together.
    """
    batch = ContinuousBatch(
        target,
        drafter,
        slots=slots,
        capacity=capacity,
        options=options,
        max_stop_ids=max_stop_ids,
        log_probs=log_probs,
        adjustments=adjustments,
        top_log_probs=top_log_probs,
        prompt_log_probs=prompt_log_probs,
        together=together,
        rounds_per_step=rounds_per_step,
    )
    arriving = enumerate(requests)
    while True:
        # As many as can be prefilled together wait, so that slots are refilled early.
        while batch.waiting < max(batch.free, batch.together):
            arrived = next(arriving, None)
            if arrived is None:
                break
            try:
                batch.submit(arrived[1])
            except RequestError as error:
                yield arrived[0], failed(error)
        if batch.idle:
            return
        yield from _step(batch, on_tokens).items()


def _told(checked: Sequence[CheckedRequest]) -> dict[str, Any]:
    """What a batch must keep beside log-probabilities; the rest is not compiled."""
    params = [request.params for request in checked]
    of_prompts = [each.prompt_log_probs for each in params]
    top = [each.top_log_probs for each in params] + [each or 0 for each in of_prompts]
    return {
        "top_log_probs": max(top),
        "prompt_log_probs": any(each is not None for each in of_prompts),
    }


def _step(batch: ContinuousBatch, on_tokens: OnTokens | None) -> dict[int, Completion]:
    """One step; requests that ended."""
    ended = {}
    for update in batch.step():
        if (
            update.tokens
            and on_tokens
            and on_tokens(update.index, update.tokens) is False
        ):
            batch.cancel(update.index)
        if update.completion is not None:
            ended[update.index] = update.completion
    return ended


def failed(error: ValueError) -> Completion:
    """The completion of a request that cannot be served."""
    return Completion(tokens=[], text=None, finish_reason="error", error=str(error))


def as_requests(
    prompts: Prompt | Sequence[Prompt | Request],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    named: Mapping[str, Any] = MappingProxyType({}),
) -> list[Request]:
    """Prompts with parameters, one for all or one each; requests bring their own.

    Args:
      prompts: token ids, text, or requests.
      params: of all, or of each.
      named: fields that differ, for all or in a list one for each.

    Raises:
      ValueError: no prompts, or another number of parameters.
    """
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise ValueError("no prompts given")
    one_each = {name: value for name, value in named.items() if _is_listed(name, value)}
    for_all = {name: value for name, value in named.items() if name not in one_each}
    if params is None or isinstance(params, SamplingParams):
        spread, each = True, [params or SamplingParams()] * len(listed)
    else:
        spread, each = "seed" in for_all, list(params)
        _check_count("params", len(each), len(listed))
    each = [replace(own, **for_all) for own in each]
    if spread:  # One seed for all.
        each = [replace(own, seed=_spread(own.seed, i)) for i, own in enumerate(each)]
    for name, values in one_each.items():
        _check_count(name, len(values), len(listed))
        each = [replace(own, **{name: value}) for own, value in zip(each, values)]
    return [
        prompt if isinstance(prompt, Request) else Request(prompt, own)
        for prompt, own in zip(listed, each)
    ]


def _is_listed(name: str, value: Any) -> bool:
    """Whether a named parameter has one value per prompt."""
    if name in ("stop_ids", "allowed_ids"):  # A list of ids is for all.
        return value is not None and any(np.ndim(each) for each in value)
    if name == "bad_words":  # Whatever they are, for all.
        return False
    return isinstance(value, list)


def _check_count(name: str, given: int, prompts: int) -> None:
    if given != prompts:
        raise ValueError(f"{prompts} prompts, but {name} for {given}; give one each")


def _spread(seed: Any, index: int) -> Any:
    """A request's own seed; what is no seed is left for the request's check."""
    whole = isinstance(seed, int) and 0 <= seed < 2**32
    return spread_seed(seed, index) if whole else seed


def round_capacity(needed: int) -> int:
    """Cache positions for at least `needed`, such that similar needs are the same."""
    return _multiple(needed, LENGTH_STEP)


def _multiple(number: int, step: int) -> int:
    """The least multiple of `step` that is at least `number`, and at least one."""
    return max(step, -(-number // step) * step)


def capacity_for(prompts: Iterable[Sequence[int]], new_tokens: int, block: int) -> int:
    """Positions that hold any of `prompts` and its output, rounded up."""
    return round_capacity(max(map(len, prompts)) + new_tokens + block)
