"""Seconds of decoding alone: prefill and compilation are no part of them."""

from time import perf_counter

import jax
import jax.numpy as jnp

from jaxspark.decoding.round import DecodeOptions, decode, prefill
from jaxspark.decoding.sampling import Sampling
from jaxspark.decoding.state import init_state


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
