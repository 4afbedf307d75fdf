"""Compiles all that a batch will ever run, by letting it serve a few prompts."""

import logging

from jaxspark.generation import ContinuousBatch, Request
from jaxspark.generation.request import CheckedRequest, RequestError, check
from jaxspark.generation.slots import prefill_chunk
from jaxspark.grammars import Grammar
from jaxspark.models.pages import PAGE

log = logging.getLogger(__name__)


def warm_up(batch: ContinuousBatch) -> None:
    """Runs one prompt for every size of pass over prompts; the batch is idle again."""
    limits, most = batch.limits, batch.chunk or 128
    # Prompts that leave room for a new token and a block.
    room = min(limits.capacity, limits.pages * PAGE)
    longest = room - limits.block_length - 1
    for size in chunk_sizes(most):
        length = min(size + 1, longest)
        if prefill_chunk([length], most) != size:
            continue  # No prompt is so long.
        request = Request(
            [0] * length,
            max_new_tokens=1,
            temperature=1.0,
            stop_ids=(),
            # What is told of likely tokens is read by a program of its own.
            prompt_log_probs=0 if limits.prompt_log_probs else None,
            log_probs=limits.log_probs,
            top_log_probs=min(1, limits.top_log_probs) if limits.log_probs else 0,
        )
        _run(batch, check(request, -1, batch.target, limits))
    if limits.grammars and batch.target.tokenizer is not None:
        _warm_up_grammars(batch)


def _warm_up_grammars(batch: ContinuousBatch) -> None:
    """One round in two halves, unless the tokenizer is none for grammars."""
    grammar = Grammar(kind="regex", value="(?s:.*)")
    request = Request([0], max_new_tokens=1, stop_ids=(0,), grammar=grammar)
    try:
        checked = check(request, -1, batch.target, batch.limits)
    except RequestError as error:
        log.warning("no grammars: %s", error.__cause__)
    else:
        _run(batch, checked)


def _run(batch: ContinuousBatch, request: CheckedRequest) -> None:
    batch.enqueue(request)
    while not batch.idle:
        batch.step()


def chunk_sizes(most: int) -> list[int]:
    """All values of `prefill_chunk`."""
    return sorted({prefill_chunk([length + 1], most) for length in range(1, most + 1)})
