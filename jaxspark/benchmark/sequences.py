"""Seconds of decoding alone: prefill and compilation are no part of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import jax
import jax.numpy as jnp

from jaxspark.configuration import Configuration, option
from jaxspark.decoding import DecodeOptions, Sampling, decode, init_state, prefill
from jaxspark.decoding.compiling import compiled
from jaxspark.decoding.couplings import Coupling
from jaxspark.drafters import Drafter, PlainDrafter
from jaxspark.generation.generate import round_capacity
from jaxspark.timing import alternate, medians


@dataclass(frozen=True, kw_only=True)
class TimingOptions(Configuration):
    """How much is timed."""

    new_tokens: int = option("Tokens per timed run.", 64, at_least=8)
    repeats: int = option("Timed runs of each contestant.", 5, at_least=3)
    capacity: int = option("Cache positions per slot.", 512, at_least=128)


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
        block_length=options.block,
        capacity=capacity,
    )
    state = jax.block_until_ready(prefill(target, drafter, state, chunk=64))
    begin = perf_counter()
    state = compiled(decode)(target, drafter, state, jnp.int32(2**30), options=options)
    jax.block_until_ready(state)
    return perf_counter() - begin, state


def speeds(
    target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    block_length: int,
    new_tokens: int,
    max_prompt_tokens: int,
    coupling: Coupling,
    temperature: float,
    repeats: int,
) -> dict[str, float]:
    """Tokens per second of one sequence at a time, plain and drafted in turn.

    Args:
      target: a loaded target.
      drafter: what drafts.
      prompts: token ids, decoded one by one.
      block_length: drafts per round.
      new_tokens: of each prompt and run.
      max_prompt_tokens: what caches have room for, so that all sets of prompts share
        one program.
      coupling: "rejection" or "gumbel".
      temperature: of sampling.
      repeats: timed runs of both.
    """
    capacity = round_capacity(max_prompt_tokens + new_tokens + block_length)

    def contestant(drafter, block_length):
        options = DecodeOptions(block_length=block_length, coupling=coupling)
        options = options.resolve(drafter, 1)

        def run():
            return sum(
                decode_seconds(
                    target.model,
                    drafter,
                    [prompt],
                    new_tokens=new_tokens,
                    options=options,
                    capacity=capacity,
                    temperature=temperature,
                )[0]
                for prompt in prompts
            )

        return run

    seconds = alternate(
        {
            "plain_tokens_per_second": contestant(PlainDrafter(), 0),
            "tokens_per_second": contestant(drafter, block_length),
        },
        repeats,
    )
    tokens = new_tokens * len(prompts)
    return {name: tokens / middle for name, middle in medians(seconds).items()}
