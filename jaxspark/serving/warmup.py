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
# Seconds of a branch that no schedule takes.
_DEAR = 1e6


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
    grammars = grammars and _warm_up_grammars(batch)
    with _full(batch):
        rehearse(batch, grammars=grammars)
    batch.relearn(learned)


def retime(batch: ContinuousBatch) -> None:
    """Has the schedule weigh what rounds take, in the thread that will decode them.

    The one that compiled is slower, see `memory`.
    """
    learned = batch.learned()
    with _full(batch):
        seconds = time_rounds(batch)
    batch.relearn(learned)
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
    """Seconds of a round in every branch of the loop, without what a call takes.

    Lower quartiles of alternating runs, see `calibration.measuring`.

    Args:
      batch: whose prompts have been read, and whose branches were taken before.
      repeats: runs of each branch.

    Returns:
      what process 0 has measured, in the order of `ContinuousBatch.branches`.
    """
    branches, lengths_B = batch.branches, batch.lengths

    def contestant(branch: tuple[int, int], rounds: int) -> Callable[[], float]:
        # So all rounds of a call take the branch.
        told = [1.0 if each == branch else _DEAR for each in branches]

        def run() -> float:
            batch.retime(told)
            begun = perf_counter()
            batch.round_in(branch, lengths_B, rounds=rounds)
            _ = batch.lengths  # which waits
            return perf_counter() - begun

        return run

    longest = contestant(branches[-1], 1)
    [taken] = agreed(np.array([min(longest(), longest())])).tolist()
    # Outputs have room for them; and text that repeats itself has something to copy
    # until a round adds to it.
    room = min(batch.limits.capacity, PAGE) // 2 // (batch.limits.block_length + 1)
    rounds = 1 if batch.drafter.may_skip else min(math.ceil(RUN_S / taken), room)
    rounds = max(rounds, 1)
    contestants = {str(branch): contestant(branch, rounds) for branch in branches}
    runs = alternate({"none": contestant(branches[0], 0), **contestants}, repeats)
    call, *calls = np.quantile(list(runs.values()), 0.25, axis=1)
    # What is no more than a call itself is too short to be told from it.
    seconds = np.maximum(np.array(calls) - call, call / 10) / rounds
    return agreed(seconds).tolist()


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
