"""`generate`: prompts in, completions out, over the compiled decode loop."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding.confidence import Calibration
from jaxspark.decoding.costs import bucket_ladder
from jaxspark.decoding.couplings import Coupling
from jaxspark.decoding.round import DecodeOptions, decode, prefill
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.schedule import CostAware, Fixed, Scheduler
from jaxspark.decoding.state import DecodeState, init_state
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.settings import standard_settings

# Cache lengths are multiples of this, so that similar requests share a program.
LENGTH_STEP = 128
ROUNDS_PER_CALLBACK = 4


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt became.

    Attributes:
      tokens: output token ids; a stop token that ended it is the last one.
      text: decoded output without the stop token; None without a tokenizer.
      finish_reason: "stop" or "length".
      log_probs: the model's log-probability of each output token (before temperature
        and filters); None unless asked for.
      rounds: target passes it took.
      drafted: rounds that drafted.
      verified: drafts that were verified in them.
      reached: per draft position, rounds in which it was verified with all earlier
        drafts accepted.
      accepted: per draft position, rounds in which it was accepted; drafts accepted
        behind a stop token count here, though they are not emitted.
    """

    tokens: list[int]
    text: str | None
    finish_reason: str
    log_probs: list[float] | None
    rounds: int
    drafted: int
    verified: int
    reached: list[int]
    accepted: list[int]

    @property
    def accepted_length(self) -> float:
        """Mean tokens per round, the target's own token included."""
        return len(self.tokens) / max(self.rounds, 1)


def generate(
    target,
    prompts: Sequence[Sequence[int] | str] | str,
    drafter: Drafter | None = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    block_length: int | None = None,
    coupling: Coupling = "rejection",
    schedule: Scheduler = Fixed(),
    calibration: Calibration | None = None,
    buckets: tuple[int, ...] | None = None,
    draft_floor: int | Sequence[int] = 0,
    draft_cap: int | Sequence[int] | None = None,
    capacity: int | None = None,
    log_probs: bool = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[Completion]:
    """Continues all prompts together, one slot each; exact whatever the drafter.

    Sampling parameters are one value, or one per prompt.

    Args:
      target: a loaded `Target`, or a bare model.
      prompts: token ids, or text for a target with a tokenizer (see `Tokenizer.chat`
        for chat prompts).
      drafter: what proposes; None decodes plainly, one token at a time.
      max_new_tokens: output budget.
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest most likely set of this mass.
      min_p: keep tokens at least this likely relative to the best.
      seed: of each request's randomness. One seed for all is spread by prompt index;
        if you give one each, let them differ.
      stop_ids: tokens that end an output, one list for all or one per prompt; None
        takes the target's own.
      block_length: most drafts per round; None takes the drafter's most.
      coupling: "rejection" (accepts most) or "gumbel" (the same tokens as plain
        sampling with the same seeds).
      schedule: chooses how much is drafted and what is verified, see `schedule`.
      calibration: of the drafter's confidences; None takes them as they are.
      buckets: token counts to compile the target for, see `DecodeOptions`. None takes
        one that holds every draft and, for a drafter that may propose nothing, one with
        a single token per slot; for schedules that choose, a ladder of which measured
        costs keep what pays.
      draft_floor: drafts verified in every round that drafts, for all or per prompt.
      draft_cap: most drafts verified in a round; None: all.
      capacity: cache positions per slot; None takes what the requests need. One value
        for many calls lets them share compiled programs.
      log_probs: return the model's log-probability of every output token.
      on_tokens: called with (prompt index, new tokens) as output grows.

    Raises:
      ValueError: a value out of range, an empty or too long prompt, a block length
        beyond the drafter's, text without a tokenizer. Before any computation.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("no prompts given")
    drafter = PlainDrafter() if drafter is None else drafter
    model = as_model(target)
    drafter.check_target(model.config)
    block_length = check_block_length(drafter, block_length)
    ids = [_token_ids(target, index, prompt) for index, prompt in enumerate(prompts)]
    limits = _limits(model, ids, max_new_tokens)
    options = DecodeOptions(
        block_length=block_length,
        coupling=coupling,
        schedule=schedule,
        calibration=calibration,
        buckets=default_buckets(drafter, len(prompts), block_length, buckets, schedule),
    )
    options.check(len(prompts))
    seeds = _seeds(seed, len(prompts))
    sampling = Sampling.of(
        len(prompts),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seeds,
    )
    stop: list = list(getattr(target, "stop_ids", ()) if stop_ids is None else stop_ids)
    if not (stop and np.ndim(stop[0])):  # one list serves every prompt
        stop = [stop] * len(prompts)
    stop = [check_ids(model, "stop_ids", each) for each in stop]
    if capacity is None:
        capacity = round_capacity(max(limits) + block_length)
    state = init_state(
        model,
        drafter,
        ids,
        limits,
        sampling,
        block_length=block_length,
        stop_ids=stop,
        capacity=capacity,
        log_probs=log_probs,
        draft_floor=draft_floor,
        draft_cap=draft_cap,
    )
    check_floors(options, state.schedule.floor_B.tolist())
    options = costed(
        options,
        model,
        drafter,
        slots=len(ids),
        capacity=capacity,
        temperature=float(np.max(temperature)),
    )
    state = prefill(model, drafter, state, chunk=prefill_chunk(ids))
    state = _run(model, drafter, state, options, ids, on_tokens)
    ended = completions(target, state, dict(enumerate(ids)), log_probs=log_probs)
    return [ended[slot] for slot in range(len(ids))]


def check_floors(options: DecodeOptions, floors: Sequence[int]) -> None:
    """Raises `ValueError` if drafts that must be verified do not fit a round."""
    slots, needed = len(floors), len(floors) + sum(floors)
    largest = options.sizes(slots)[-1]
    if needed > largest:
        raise ValueError(
            f"{slots} requests whose draft floors sum up to {sum(floors)} need rounds "
            f"of {needed} tokens, the largest token bucket holds {largest}"
        )
    most = options.draft_lengths[-1]
    if max(floors) > most:
        raise ValueError(
            f"a draft floor of {max(floors)} needs as many drafts, the schedule "
            f"proposes no more than {most}"
        )


def costed(options: DecodeOptions, model, drafter: Drafter, **setting) -> DecodeOptions:
    """The options, with measured costs if their schedule needs some and has none.

    `setting` is that of `jaxspark.calibration.measure_costs`; measuring takes a while,
    shows a progress bar, and is done once for each setting.
    """
    schedule = options.schedule
    if not isinstance(schedule, CostAware) or schedule.costs is not None:
        return options
    # Costs are measured on the decode loop, which this module is part of.
    from jaxspark.calibration.profile import known_costs

    costs = known_costs(
        model,
        drafter,
        block_length=options.block_length,
        buckets=options.sizes(setting["slots"]),
        coupling=options.coupling,
        **setting,
    )
    return replace(options, schedule=replace(schedule, costs=costs), buckets=None)


def round_capacity(needed: int) -> int:
    """Cache positions for at least `needed`, such that similar needs are the same."""
    return -(-needed // LENGTH_STEP) * LENGTH_STEP


def as_model(target):
    """The decoder of a loaded `Target`, or the bare model itself."""
    return getattr(target, "model", target)


def default_buckets(
    drafter: Drafter,
    slots: int,
    block_length: int,
    buckets: tuple[int, ...] | None,
    schedule: Scheduler = Fixed(),
) -> tuple[int, ...] | None:
    """The given buckets, or what suits the drafter and the schedule."""
    if buckets is not None or schedule.costs is not None:
        return buckets
    if not isinstance(schedule, Fixed):
        return bucket_ladder(slots, block_length)
    if schedule.length is not None:
        block_length = min(schedule.length, block_length)
    if drafter.abstains and block_length:
        return (slots, slots * (block_length + 1))
    return (slots * (block_length + 1),)


def check_block_length(drafter: Drafter, block_length: int | None) -> int:
    """The block length to use.

    Raises:
      ValueError: it is not one that the drafter can propose.
    """
    most = drafter.block_length
    if block_length is None:
        return most
    if not 0 <= block_length <= most or (most and not block_length):
        raise ValueError(
            f"block length {block_length} is not one this drafter can propose; "
            f"expected {min(1, most)}..{most}"
        )
    return block_length


def prefill_chunk(prompts: Sequence[Sequence[int]]) -> int:
    """Prompt tokens per slot and prefill step: a power of two, 16 to 128."""
    longest = max(len(prompt) for prompt in prompts)
    return int(np.clip(2 ** np.ceil(np.log2(max(longest - 1, 1))), 16, 128))


def _token_ids(target, index: int, prompt) -> list[int]:
    if isinstance(prompt, str):
        tokenizer = getattr(target, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                f"prompt {index} is text and the target has no tokenizer; "
                "give token ids"
            )
        prompt = tokenizer.encode(prompt)
    return check_prompt(as_model(target), index, prompt)


def check_prompt(model, index: int, prompt) -> list[int]:
    """The ids of a prompt.

    Raises:
      ValueError: it is no list, empty, or has what is no id of the vocabulary.
    """
    if np.ndim(prompt) != 1:
        raise ValueError(
            f"prompt {index} must be text or a list of token ids, got {prompt!r}; "
            "prompts is a list of prompts"
        )
    ids = check_ids(model, f"prompt {index}", prompt)
    if not ids:
        raise ValueError(f"prompt {index} is empty; give at least one token")
    return ids


def check_ids(model, name: str, ids) -> list[int]:
    """Token ids as Python's integers; `name` says in errors what they are of.

    Raises:
      ValueError: one that is no whole number, or outside the vocabulary.
    """
    vocab = model.config.vocab_size
    whole = []
    for token in ids:
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:  # not a whole number, though it may have the value of one
            number = -1
        if not 0 <= number < vocab:
            raise ValueError(
                f"{name} has token id {token!r}, expected whole numbers inside the "
                f"vocabulary 0..{vocab - 1}"
            )
        whole.append(number)
    return whole


def is_whole(values) -> bool:
    """Whether these are integers by type; truth values are none."""
    return np.issubdtype(np.asarray(values).dtype, np.integer)


def check_length(model, name: str, length: int, budget: int) -> None:
    """Raises `ValueError` if a prompt and its output exceed the target's positions."""
    most = model.config.max_position_embeddings
    if length + budget > most:
        raise ValueError(
            f"{name} of {length} tokens and {budget} new ones exceed the target's "
            f"{most} positions"
        )


def _limits(model, prompts, max_new_tokens) -> list[int]:
    budgets = np.asarray(max_new_tokens)
    if (
        not is_whole(budgets)
        or budgets.shape not in ((), (len(prompts),))
        or np.any(budgets < 1)
    ):
        raise ValueError(
            f"max_new_tokens must be a whole positive number or {len(prompts)}, "
            f"got {max_new_tokens}"
        )
    limits = []
    for index, budget in enumerate(np.broadcast_to(budgets, (len(prompts),)).tolist()):
        length = len(prompts[index])
        check_length(model, f"prompt {index}", length, budget)
        limits.append(length + budget)
    return limits


def _seeds(seed, count: int) -> np.ndarray:
    """One seed per prompt; a single one gives each prompt its own stream."""
    if np.ndim(seed):
        return np.asarray(seed)
    if not 0 <= seed < 2**32 or seed != int(seed):
        raise ValueError(f"seed must be whole and lie in [0, 2**32), got {seed}")
    return spread_seed(int(seed), np.arange(count, dtype=np.uint64))


def spread_seed(seed: int, index):
    """The seed of a request by its place, far from those of small numbers."""
    return (seed + 0x9E3779B9 * index) % 2**32


@standard_settings()
def decode_rounds(
    model, drafter, state: DecodeState, rounds: int, options: DecodeOptions
) -> DecodeState:
    """`decode` from the host; donates `state`."""
    return decode(model, drafter, state, jnp.int32(rounds), options=options)


def _run(model, drafter, state: DecodeState, options, prompts, on_tokens):
    if on_tokens is None:
        return decode_rounds(model, drafter, state, 2**30, options)
    seen = [len(prompt) for prompt in prompts]
    while True:
        state = decode_rounds(model, drafter, state, ROUNDS_PER_CALLBACK, options)
        lengths, done, tokens_BS = jax.device_get(
            (state.lengths_B, state.done_B, state.tokens_BS)
        )
        for slot, (begin, end) in enumerate(zip(seen, lengths)):
            if end > begin:
                on_tokens(slot, tokens_BS[slot, begin:end].tolist())
                seen[slot] = int(end)
        if done.all():
            return state


def completions(
    target,
    state: DecodeState,
    prompts: Mapping[int, Sequence[int]],
    *,
    log_probs: bool = False,
) -> dict[int, Completion]:
    """What the slots named by `prompts` have become, by slot."""
    if not prompts:
        return {}
    host: Any = jax.device_get(
        (state.tokens_BS, state.lengths_B, state.log_probs_BS, state.stop_ids_BX)
    )
    counters = jax.device_get(state.counters)
    tokens_BS, lengths_B, log_probs_BS, stop_ids_BX = host
    tokenizer = getattr(target, "tokenizer", None)
    ended = {}
    for slot, prompt in prompts.items():
        span = slice(len(prompt), int(lengths_B[slot]))
        tokens = tokens_BS[slot, span].tolist()
        stopped = bool(tokens) and tokens[-1] in stop_ids_BX[slot]
        shown = tokens[:-1] if stopped else tokens
        ended[slot] = Completion(
            tokens=tokens,
            text=tokenizer.decode(shown) if tokenizer else None,
            finish_reason="stop" if stopped else "length",
            log_probs=log_probs_BS[slot, span].tolist() if log_probs else None,
            rounds=int(counters.rounds_B[slot]),
            drafted=int(counters.drafted_B[slot]),
            verified=int(counters.verified_B[slot]),
            reached=counters.reached_BG[slot].tolist(),
            accepted=counters.accepted_BG[slot].tolist(),
        )
    return ended
