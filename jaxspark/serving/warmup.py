"""Compiles all that a batch will ever run, by letting it serve a few prompts."""

from jaxspark.generation import ContinuousBatch, Request
from jaxspark.generation.request import check
from jaxspark.generation.slots import prefill_chunk
from jaxspark.models.pages import PAGE


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
        batch.enqueue(check(request, -1, batch.target, limits))
        while not batch.idle:
            batch.step()


def chunk_sizes(most: int) -> list[int]:
    """All values of `prefill_chunk`."""
    return sorted({prefill_chunk([length + 1], most) for length in range(1, most + 1)})
