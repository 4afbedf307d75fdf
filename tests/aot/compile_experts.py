"""The experts of one DeepSeek-V4-Flash layer, compiled for many chips; prints JSON.

    python -m tests.aot.compile_experts v5p:2x2x4 expert:16 192 [FILE]

The last word is tokens of a shard; the program's text goes to a file if one is named.
Experts of two layers lie together, as in a model's stacks.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxspark.configs.targets import deepseek_v4_flash
from jaxspark.models.layers.expert_pairs import SLACK
from jaxspark.models.layers.experts import Experts, Routing
from jaxspark.parallel.axes import EXPERTS, SLOTS
from jaxspark.simulation.chips import abstract, parse_slice
from jaxspark.simulation.traffic import LocalExperts, traffic
from tests.aot.hlo import new_arrays

LAYERS = 2
# Neither writes the room that it names.
UNWRITTEN = ("AllocateBuffer", "ragged-all-to-all-start(")


def described(config):
    """Experts of `LAYERS` layers, without numbers."""
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Experts(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((LAYERS, *leaf.shape), leaf.dtype), state
    )
    return nnx.merge(graph, stacked)


def compile_layer(topology: str, mesh: str, tokens: int):
    """The program of one layer's experts, and their mesh."""
    config = deepseek_v4_flash()
    grid = parse_slice(topology).mesh(mesh)
    experts = described(config)
    rows = tokens * grid.shape["data"] * grid.shape["expert"]
    shapes = (
        ((rows, config.hidden_size), jnp.bfloat16),
        ((rows, config.num_experts_per_tok), jnp.int32),
        ((rows, config.num_experts_per_tok), jnp.float32),
        ((rows,), jnp.int32),
    )
    specs = (jax.tree.map(lambda _: P(None, EXPERTS), experts), *[P(SLOTS)] * 4, P())
    arguments = (
        experts,
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    @partial(
        jax.shard_map, mesh=grid, in_specs=specs, out_specs=P(SLOTS), check_vma=False
    )
    def layer(experts, x_TD, experts_TX, weights_TX, slots_T, number):
        routing = Routing(experts_TX, weights_TX, weights_TX)
        return experts(x_TD, routing, slots_T, number)

    placed = [abstract(grid, *each) for each in zip(arguments, specs)]
    with jax.set_mesh(grid):
        return jax.jit(layer).lower(*placed).compile(), grid


def report(topology: str, mesh: str, tokens: str, file: str = "") -> dict:
    """Bytes that a chip moves, sends and keeps."""
    compiled, grid = compile_layer(topology, mesh, int(tokens))
    text = compiled.as_text()
    if file:
        Path(file).write_text(text)
    config, shards = deepseek_v4_flash(), grid.shape["expert"]
    count = config.n_routed_experts // (shards * grid.shape["model"])
    size = 3 * 2 * config.hidden_size * config.moe_intermediate_size
    worst = int(tokens) * shards * config.num_experts_per_tok * config.hidden_size
    found = traffic(text, devices=grid.size, experts=LocalExperts(count, 1 / SLACK))
    return {
        "moved": found.memory,
        "weights": count * size,
        "sent": found.by_kind(),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "worst_case": [
            line
            for line in new_arrays(text, worst)
            if not any(each in line for each in UNWRITTEN)
        ],
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(report(*sys.argv[1:])))
