"""DeepSeek-V4-Flash, full size, compiled on this machine: quickly, and without copies.

Weights and caches are shapes only; the loop drafts with the checkpoint's own stages.
"""

import math
import re
import time

import jax
import jax.numpy as jnp
from flax import nnx

from configs.drafters import deepseek_v4_dspark
from configs.targets import deepseek_v4_flash
from jaxspark.decoding import DecodeOptions, Sampling, decode, init_state
from jaxspark.drafters import DeepSeekV4DSpark
from jaxspark.models import DeepSeekV4
from tests.aot.hlo import new_arrays

# Seven of everything: no weight has as many elements as a cache.
SLOTS, POSITIONS, BLOCK = 7, 8192, 5
SHAPE = re.compile(r"= \w+\[([\d,]+)\]")


def test_no_cache_of_flash_is_copied(record_property):
    config = deepseek_v4_flash()
    options = {"dtype": jnp.bfloat16}

    def made(kind, config):
        return nnx.eval_shape(lambda: kind(config, **options, rngs=nnx.Rngs(0)))

    target = made(DeepSeekV4, config)
    drafter = made(DeepSeekV4DSpark, deepseek_v4_dspark(config))
    state = jax.eval_shape(
        lambda: init_state(
            target,
            drafter,
            [[0]] * SLOTS,
            [POSITIONS - BLOCK] * SLOTS,
            Sampling.of(SLOTS, temperature=1.0),
            block_length=BLOCK,
            capacity=POSITIONS,
        )
    )
    begin = time.perf_counter()
    count = jax.ShapeDtypeStruct((), jnp.int32)
    options = DecodeOptions(block_length=BLOCK)
    lowered = decode.lower(target, drafter, state, count, options=options)
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    record_property("compile_seconds", seconds)
    print(f"compiled in {seconds:.1f} s")

    caches = jax.tree.leaves((state.target_cache, state.draft_cache))
    # A layer may read its own entries as a piece; whole tables stay where they lie.
    sizes = {math.prod(leaf.shape) for leaf in caches if len(leaf) > 1}
    assert len(sizes) > 5
    copies = [
        line
        for line in new_arrays(compiled.as_text(), min(sizes))
        if (found := SHAPE.search(line))
        and math.prod(map(int, found[1].split(","))) in sizes
    ]
    assert not copies, "\n".join(copies)
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= sum(leaf.size * leaf.dtype.itemsize for leaf in caches)
