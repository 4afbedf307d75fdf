"""Compiles all that a batch will ever run, and runs it once.

Devices put work off until code is run, not only compiled, see `decoding.rehearsal`.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

import numpy as np

from jaxspark.calibration.measuring import RUN_S
from jaxspark.generation import ContinuousBatch, Request
from jaxspark.generation.request import CheckedRequest, RequestError, check
from jaxspark.generation.slots import prefill_chunk
from jaxspark.grammars import Grammar
from jaxspark.models.pages import PAGE
from jaxspark.parallel.agreement import agreed
from jaxspark.parallel.mesh import slot_shards
from jaxspark.timing import alternate

log = logging.getLogger(__name__)
# Tokens of a prompt of which drafters that copy find something to copy.
_COPIED = 16
# Rounds that are timed in a row: so many calls may wait for a device.
_MOST_ROUNDS = 8


def warm_up(batch: ContinuousBatch, *, retime: bool = False) -> None:
    """Reads a prompt of every size, and decodes in every branch; then it is idle.

    Args:
      batch: what will run.
      retime: whether rounds are timed as well, for a schedule that knows no costs.
    """
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
    grammars = grammars and _warm_up_grammars(batch)
    with _full(batch):
        rehearse(batch, grammars=grammars)
        seconds = time_rounds(batch) if retime else None
    batch.relearn(learned)
    if seconds is not None:
        batch.retime(seconds)
        log.info(
            "milliseconds of a round by drafts and tokens verified: %s",
            ", ".join(
                f"{length}:{size} {each * 1e3:.3g}"
                for (length, size), each in zip(batch.branches, seconds)
            ),
        )


@contextlib.contextmanager
def _full(batch: ContinuousBatch) -> Iterator[None]:
    """With as many outputs as there can be, none of which ends."""
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
    yield
    for index in range(count):
        batch.cancel(-1 - index)
    batch.step()


def rehearse(batch: ContinuousBatch, *, grammars: bool) -> None:
    """Decodes a round in every branch of the loop, so that none is a first one.

    Args:
      batch: whose prompts have been read.
      grammars: whether rounds in two halves are decoded as well.
    """
    lengths_B = batch.lengths
    for branch in batch.branches:
        batch.round_in(branch, lengths_B)
        length, _ = branch
        if grammars and length == batch.options.draft_lengths[-1]:
            batch.round_in(branch, lengths_B, halves=True)


def time_rounds(batch: ContinuousBatch, *, repeats: int = 5) -> list[float]:
    """Seconds of a round in every branch of the loop.

    Lower quartiles of alternating runs, see `calibration.measuring`. Rounds of a run
    are queued on the device together, so that what a call takes counts only where a
    round takes no longer.

    Args:
      batch: whose prompts have been read, and whose branches were taken before.
      repeats: runs of each branch.

    Returns:
      what process 0 has measured, in the order of `ContinuousBatch.branches`.
    """
    lengths_B, rounds = batch.lengths, 1

    def contestant(branch: tuple[int, int]) -> Callable[[], float]:
        def run() -> float:
            begun = perf_counter()
            for _ in range(rounds):
                batch.round_in(branch, lengths_B)
            _ = batch.lengths  # which waits
            return (perf_counter() - begun) / rounds

        return run

    contestants = {str(branch): contestant(branch) for branch in batch.branches}
    longest = list(contestants.values())[-1]
    [taken] = agreed(np.array([longest()])).tolist()
    rounds = min(max(math.ceil(RUN_S / taken), 1), _MOST_ROUNDS)
    runs = alternate(contestants, repeats)
    return agreed(np.quantile(list(runs.values()), 0.25, axis=1)).tolist()


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
