"""Compiles all that a batch will ever run, and runs it once.

Devices put work off until code is run, not only compiled, see `decoding.rehearsal`.
"""

import logging
from dataclasses import replace

from jaxspark.generation import ContinuousBatch, Request
from jaxspark.generation.request import CheckedRequest, RequestError, check
from jaxspark.generation.slots import prefill_chunk
from jaxspark.grammars import Grammar
from jaxspark.models.pages import PAGE
from jaxspark.parallel.mesh import slot_shards

log = logging.getLogger(__name__)
# Tokens of a prompt of which drafters that copy find something to copy.
_COPIED = 16


def warm_up(batch: ContinuousBatch) -> None:
    """Reads a prompt of every size, and decodes in every branch; then it is idle."""
    limits, most = batch.limits, batch.chunk or 128
    learned = batch.learned()
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
    grammars = limits.grammars and batch.target.tokenizer is not None
    _rehearse(batch, grammars=grammars and _warm_up_grammars(batch))
    batch.relearn(learned)


def _rehearse(batch: ContinuousBatch, *, grammars: bool) -> None:
    """Rounds of as many outputs as there can be."""
    limits = batch.limits
    # Each needs one page.
    room = min(limits.capacity, PAGE) - limits.block_length
    length = max(1, min(_COPIED, room // 2))
    request = Request(
        [0] * length, max_new_tokens=room - length, temperature=1.0, stop_ids=()
    )
    checked = check(request, -1, batch.target, limits)
    count = min(batch.slots, limits.pages * slot_shards())
    for index in range(count):
        batch.enqueue(replace(checked, index=-1 - index))
    while batch.waiting or batch.unread:
        batch.step(1)
    batch.rehearse(grammars=grammars)
    for index in range(count):
        batch.cancel(-1 - index)
    batch.step()


def _warm_up_grammars(batch: ContinuousBatch) -> bool:
    """One round in two halves; False if the tokenizer is none for grammars."""
    grammar = Grammar(kind="regex", value="(?s:.*)")
    request = Request([0], max_new_tokens=1, stop_ids=(0,), grammar=grammar)
    try:
        checked = check(request, -1, batch.target, batch.limits)
    except RequestError as error:
        log.warning("no grammars: %s", error.__cause__)
        return False
    _run(batch, checked)
    return True


def _run(batch: ContinuousBatch, request: CheckedRequest) -> None:
    batch.enqueue(request)
    while not batch.idle:
        batch.step()


def chunk_sizes(most: int) -> list[int]:
    """All values of `prefill_chunk`."""
    return sorted({prefill_chunk([length + 1], most) for length in range(1, most + 1)})
