"""What a step brought for each request, read from the device in one piece."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxspark.decoding import DecodeState, Phase
from jaxspark.generation.completion import (
    Completion,
    FinishReason,
    Likely,
    PromptLogProb,
)
from jaxspark.generation.slots import (
    Counts,
    Ring,
    Running,
    newest,
    newest_likeliest,
)
from jaxspark.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Update:
    """What a step brought for one request.

    Attributes:
      index: the request.
      tokens: new output tokens.
      completion: all of it, once it has ended.
      log_probs: of the new tokens, where the batch keeps them.
      accepted: which of them are accepted drafts, where the batch keeps that.
      top_log_probs: likely tokens beside each, if asked for.
      prompt_log_probs: of the prompt, if asked for, in the first update with tokens.
      counts: what the step's rounds did.
      cached: tokens of its prompt whose cache rows were there already.
    """

    index: int
    tokens: list[int]
    completion: Completion | None = None
    log_probs: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    top_log_probs: list[Likely] = field(default_factory=list)
    prompt_log_probs: list[PromptLogProb | None] | None = None
    counts: Counts = Counts()
    cached: int = 0


def collect(
    state: DecodeState, running: Mapping[int, Running], *, window: int, vocab: int
) -> tuple[dict[int, Update], list[int]]:
    """What is new in every slot, which the requests are told; and who is finished.

    Args:
      state: after a step.
      running: requests by slot.
      window: most tokens that a slot can have gained.
      vocab: tokens that there are.

    Returns:
      Updates by slot, without completions, and slots that are finished.
    """
    since_B = np.zeros((state.slots,), np.int32)
    for slot, each in running.items():
        since_B[slot] = each.length
    phase_B, lengths_B, counters, tokens_BW, log_probs_BW, accepted_BW = jax.device_get(
        newest(state, jnp.asarray(since_B), window)
    )
    likeliest = None
    if any(each.asks_likeliest for each in running.values()):
        likeliest = jax.device_get(newest_likeliest(state))
    updates: dict[int, Update] = {}
    for slot, each in running.items():
        first = not each.tokens
        gained = slice(int(lengths_B[slot] - since_B[slot]))
        if each.failure is not None and each.matcher is not None:
            # What came before its grammar failed stands, and may have a stop string.
            gained = slice(each.matcher.taken - len(each.tokens))
        counts, before = each.before.plus(Counts.of(counters, slot)), each.counts
        each.counts = counts
        updates[slot] = update = Update(
            each.request.index,
            tokens_BW[slot, gained].tolist(),
            log_probs=log_probs_BW[slot, gained].tolist(),
            accepted=accepted_BW[slot, gained].tolist(),
            counts=counts.since(before),
            cached=each.cached or 0,
        )
        each.tokens += update.tokens
        each.log_probs += update.log_probs
        if likeliest is not None:
            ring = Ring(likeliest, slot, vocab)
            top = each.take_likeliest(ring, len(update.tokens))
            updates[slot] = update = replace(update, top_log_probs=top)
        if each.request.params.prompt_log_probs is not None and first:
            told = each.prompt_log_probs
            updates[slot] = replace(update, prompt_log_probs=told)
    return updates, [slot for slot in updates if phase_B[slot] == Phase.FINISHED]


def completion_of(
    each: Running, reason: FinishReason | None, tokenizer: Tokenizer | None
) -> Completion:
    """What a request became that no longer runs; None: its tokens tell the reason."""
    tokens, counts, params = each.tokens, each.counts, each.request.params
    stopped = bool(tokens) and tokens[-1] in each.request.stop_ids
    shown = tokens[:-1] if stopped else tokens
    return Completion(
        tokens=tokens,
        text=tokenizer.decode(shown) if tokenizer else None,
        finish_reason=reason or ("stop" if stopped else "length"),
        error=each.failure,
        log_probs=each.log_probs if params.log_probs else None,
        top_log_probs=each.top_log_probs if params.top_log_probs else None,
        prompt_log_probs=None
        if params.prompt_log_probs is None
        else each.prompt_log_probs,
        rounds=counts.rounds,
        drafted=counts.drafted,
        verified=counts.verified,
        reached=list(counts.reached),
        accepted=list(counts.accepted),
    )
