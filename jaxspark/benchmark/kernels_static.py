"""What one attention layer of DeepSeek-V4 moves on a chip that need not be here.

A layer out of a stack of two is compiled for verification, caches in place, and the
bytes that its program moves are set against the least that it can:

    weights once, a slot's index keys or visible entries once, the entries that its
    queries chose once for each query, and what goes in and out

Entries that several queries of a slot choose may be fetched once for them all, so the
ratio can fall below 1. Kernels say what they read at most: no two queries agree.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, use_abstract_mesh
from rich.console import Console
from rich.table import Table

from jaxspark.configs.targets import deepseek_v4_flash
from jaxspark.configuration import Configuration, option
from jaxspark.decoding.compiling import compiler_options
from jaxspark.models import FlatTokens
from jaxspark.models.deepseek_v4_config import DeepSeekV4Config
from jaxspark.models.layers.rope import PartialRotation
from jaxspark.models.layers.sparse_attention import SparseAttention
from jaxspark.parallel.rules import replicated_specs
from jaxspark.simulation.chips import abstract, parse_slice
from jaxspark.simulation.traffic import traffic

LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class StaticOptions(Configuration):
    """Which layers, for which chips."""

    topologies: tuple[str, ...] = option(
        "Chips of --suite=kernels_static: v5e:2x2, v5p:2x2x1, h100:1.",
        ("v5p:2x2x1", "h100:1"),
    )
    contexts: tuple[int, ...] = option(
        "Positions that each slot holds, for --suite=kernels_static.",
        (131072, 1048576),
    )
    static_slots: int = option("Slots of --suite=kernels_static.", 32, at_least=1)
    static_rows: int = option("Tokens of each of them.", 6, at_least=1)


def bench_kernels_static(console: Console, options: StaticOptions) -> list[dict]:
    """Compiles every layer for every chip, and prints a table."""
    config, found = deepseek_v4_flash(), []
    for topology in options.topologies:
        for name, ratio in {"CSA": config.csa_ratio, "HCA": config.hca_ratio}.items():
            for context in options.contexts:
                with console.status(f"compiling {name} {context:,} for {topology}"):
                    size = (context, options.static_slots, options.static_rows)
                    row = measure(topology, config, ratio, *size)
                found.append({"layer": name} | row)
    _print(console, found)
    return found


def measure(
    topology: str,
    config: DeepSeekV4Config,
    ratio: int,
    context: int,
    slots: int,
    rows: int,
) -> dict:
    """Bytes of one layer's program, by its text."""
    chip = parse_slice(topology)
    mesh = Mesh(np.array(chip.devices[:1]), ("x",))
    dtype = jnp.bfloat16
    layer = nnx.eval_shape(
        lambda: SparseAttention(config, ratio, dtype=dtype, rngs=nnx.Rngs(0))
    )
    T = slots * rows

    def described(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    ints = described((slots,), jnp.int32)
    flat = described((T,), jnp.int32)
    tokens = FlatTokens(
        ids_T=flat,
        positions_T=flat,
        limits_T=flat,
        slots_T=flat,
        starts_B=ints,
        offsets_B=ints,
        counts_B=ints,
        rows=rows,
    )

    def step(layer, x_TD, cache, index, tokens):
        rotation = PartialRotation.at(
            config.compress_rope, config.qk_rope_head_dim, tokens.positions_T
        )
        return layer(x_TD, cache, index, tokens, rotation)[:2]

    with use_abstract_mesh(mesh.abstract_mesh):
        cache = jax.eval_shape(lambda: layer.init_cache(LAYERS, slots, context, dtype))
        arguments = (
            layer,
            described((T, config.hidden_size)),
            cache,
            described((), jnp.int32),
            tokens,
        )
        placed = abstract(mesh, arguments, replicated_specs(arguments))
        begin = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=2).lower(*placed)
        compiled = lowered.compile(compiler_options=compiler_options())
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    least = minimum(config, layer, cache, slots, rows, context, ratio)
    dense = slots * context * config.head_dim * jnp.dtype(dtype).itemsize
    return {
        "topology": topology,
        "context": context,
        "slots": slots,
        "tokens": rows,
        "bytes": traffic(text).memory,
        "minimum": least,
        "temporary": memory.temp_size_in_bytes,
        "cache_read_of_dense": cache_bytes(config, slots, rows, context, ratio) / dense,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def cache_bytes(
    config: DeepSeekV4Config, slots: int, rows: int, context: int, ratio: int
) -> int:
    """Of index keys and entries that must be read, in bfloat16."""
    entries = context // ratio
    if ratio == config.hca_ratio:
        return 2 * slots * entries * config.head_dim
    chosen = rows * min(config.index_topk, entries) * config.head_dim
    return 2 * slots * (entries * config.index_head_dim + chosen)


def minimum(config, layer, cache, slots, rows, context, ratio) -> int:
    """Bytes that no program for the layer can do without; see the top of the file."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))
    window = 2 * slots * (config.sliding_window + rows) * config.head_dim
    around = 2 * 2 * slots * rows * config.hidden_size
    return weights + cache_bytes(config, slots, rows, context, ratio) + window + around


def _print(console: Console, rows: Sequence[dict]) -> None:
    table = Table(title="One attention layer of DeepSeek-V4-Flash, bfloat16")
    for name in ("chip", "layer", "context", "MB", "least", "ratio", "temp", "cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["topology"],
            row["layer"],
            f"{row['context']:,}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['minimum'] / 1e6:,.0f}",
            f"{row['bytes'] / row['minimum']:.2f}",
            f"{row['temporary'] / 1e6:,.0f}",
            f"{row['cache_read_of_dense']:.1%}",
        )
    console.print(table)
    console.print(
        "MB: moved by the program; least: that it must; temp: temporary memory, MB; "
        "cache: read of it at least, in parts of what dense attention reads"
    )
