"""Timing by alternation: several things run in turn, medians compared.

Machines are shared and drift; a ratio of medians of interleaved runs holds where two
separate measurements do not.
"""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import jax
import jax.numpy as jnp

from jaxspark.decoding.round import DecodeOptions, decode, prefill
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.state import init_state


def alternate(
    contestants: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """Runs each contestant once unrecorded, then all in turn `repeats` times.

    A contestant returns its own seconds, so that it can leave out its preparation.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            seconds[name].append(run())
    return seconds


def timed(function: Callable, *arguments) -> Callable[[], float]:
    """A contestant: the seconds of one call, until its arrays are there."""

    def run():
        begin = perf_counter()
        jax.block_until_ready(function(*arguments))
        return perf_counter() - begin

    return run


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each contestant's runs."""
    return {name: median(runs) for name, runs in seconds.items()}


def decode_seconds(
    target,
    drafter,
    prompts,
    *,
    new_tokens: int,
    options: DecodeOptions,
    capacity: int,
    temperature: float = 0.0,
):
    """Decodes prompts together; returns (seconds without prefill, final state)."""
    state = init_state(
        target,
        drafter,
        prompts,
        [len(prompt) + new_tokens for prompt in prompts],
        Sampling.of(len(prompts), temperature=temperature),
        block_length=options.block_length,
        capacity=capacity,
    )
    state = jax.block_until_ready(prefill(target, drafter, state, chunk=64))
    begin = perf_counter()
    state = decode(target, drafter, state, jnp.int32(2**30), options=options)
    jax.block_until_ready(state)
    return perf_counter() - begin, state
