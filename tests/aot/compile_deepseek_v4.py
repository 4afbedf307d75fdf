"""Compiles the decode loop of a DeepSeek-V4 with its own stages; prints JSON.

    python -m tests.aot.compile_deepseek_v4 cpu flash
    python -m tests.aot.compile_deepseek_v4 tpu mini pages

Weights and caches are shapes only: nothing is run, no array is ever allocated.
"""

import json
import math
import re
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspark.configs.drafters import deepseek_v4_dspark
from jaxspark.configs.targets import (
    deepseek_v4_flash,
    deepseek_v4_mini,
    deepseek_v4_pro,
)
from jaxspark.decoding import DecodeOptions, DecodeState, decode
from jaxspark.decoding.compiling import compiler_options
from jaxspark.drafters import DeepSeekV4DSpark
from jaxspark.models import DeepSeekV4
from jaxspark.models.pages import pages_for
from tests.aot.chips import device_of, on, tracing_for
from tests.aot.hlo import KERNELS, new_arrays

# Seven of everything: no weight has as many elements as a cache.
SLOTS, POSITIONS, BLOCK = 7, 8192, 5
SHAPE = re.compile(r"= \w+\[([\d,]+)\]")
CONFIGS = {
    "flash": deepseek_v4_flash,
    "pro": deepseek_v4_pro,
    # Keys as wide and heads as many as Pro's, so that kernels take them.
    "mini": lambda: replace(
        deepseek_v4_mini(), head_dim=512, index_head_dim=128, num_attention_heads=128
    ),
}


def report(platform: str, preset: str, layout: str = "rows") -> dict:
    """Seconds, and what the compiled loop does with the caches."""
    config = CONFIGS[preset]()

    def made(kind, config):
        return nnx.eval_shape(
            lambda: kind(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )

    target = made(DeepSeekV4, config)
    drafter = made(DeepSeekV4DSpark, deepseek_v4_dspark(config))
    state = jax.eval_shape(
        lambda: DecodeState.empty(
            target,
            drafter,
            slots=SLOTS,
            capacity=POSITIONS,
            block_length=BLOCK,
            pages=SLOTS * pages_for(POSITIONS) if layout == "pages" else None,
        )
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = on(device_of(platform), (target, drafter, state, count))
    begin = time.perf_counter()
    lowered = decode.lower(*arguments, options=DecodeOptions(block_length=BLOCK))
    compiled = lowered.compile(compiler_options=compiler_options())
    seconds, text = time.perf_counter() - begin, compiled.as_text()

    caches = jax.tree.leaves((state.target_cache, state.draft_cache))
    # A layer may read its own entries as a piece; whole tables stay where they lie.
    sizes = {math.prod(leaf.shape) for leaf in caches if len(leaf) > 1}
    copies = [
        line
        for line in new_arrays(text, min(sizes))
        if (found := SHAPE.search(line))
        and math.prod(map(int, found[1].split(","))) in sizes
    ]
    return {
        "seconds": round(seconds, 1),
        "kernels": sum(text.count(f'custom_call_target="{name}"') for name in KERNELS),
        "tables": len(sizes),
        "copies": copies,
        "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in caches),
        "alias_bytes": compiled.memory_analysis().alias_size_in_bytes,
    }


if __name__ == "__main__":
    with tracing_for(sys.argv[1]):
        print(json.dumps(report(*sys.argv[1:])))
