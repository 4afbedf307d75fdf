"""Compiles DeepSeek-V4-Flash's decode loop for several chips; prints what each sends.

python -m tests.aot.compile_sharded v5p:2x2x2 data:2,expert:4
python -m tests.aot.compile_sharded h100:4 expert:4
"""

import json
import math
import re
import sys
from collections import Counter

import jax

from jaxspark.configs.targets import deepseek_v4_flash
from jaxspark.simulation.abstract_models import abstract_models
from jaxspark.simulation.chips import parse_slice
from jaxspark.simulation.compile_check import compile_program
from jaxspark.simulation.programs import lower_decoding
from tests.aot.hlo import kernels_of, new_arrays, work_meanwhile

# A multiple of seven on each shard: no weight has as many elements as a cache.
SLOTS, POSITIONS, BLOCK = 56, 8192, 5
SHAPE = re.compile(r"= \w+\[([\d,]+)\]")


def report(topology: str, mesh: str) -> dict:
    """Collectives, bytes, kernels and copies of the loop."""
    config = deepseek_v4_flash()
    onto = parse_slice(topology)
    grid = onto.mesh(mesh)
    size = {"slots": SLOTS, "capacity": POSITIONS}
    with jax.set_mesh(grid):
        program = lower_decoding(
            "decode",
            grid,
            # As it is released: in bfloat16 four chips cannot hold it.
            *abstract_models(config, quantized=True, block_length=BLOCK),
            block_length=BLOCK,
            **size,
        )
    compiled = compile_program(
        program, onto, grid, experts=config.n_routed_experts, **size
    )
    caches = [program.arguments[name] for name in program.growing]
    # A layer may read its own entries as a piece; whole tables stay where they lie.
    tables = [leaf for leaf in jax.tree.leaves(caches) if len(leaf.shape) == 4]
    sizes = {
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in tables
        if leaf.shape[0] > 1
    }
    whole = [leaf.shape for leaf in tables if leaf.sharding.is_fully_replicated]
    return {
        "collectives": [
            [each.kind, each.array.dtype, each.array.shape, each.group, each.times]
            for each in compiled.traffic.collectives
        ],
        "sent": compiled.traffic.sent,
        "tokens": compiled.tokens,
        "held": compiled.held,
        "width": config.hidden_size,
        "experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "depth": config.num_hidden_layers,
        "meanwhile": work_meanwhile(compiled.text, "shared_expert"),
        "kernels": Counter(kernels_of(compiled.text, "shard_map")),
        "whole_caches": whole,
        "tables": len(sizes),
        "copies": [
            line
            for line in new_arrays(compiled.text, min(sizes))
            if (found := SHAPE.search(line))
            and math.prod(map(int, found[1].split(","))) in sizes
        ],
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(report(*sys.argv[1:])))
