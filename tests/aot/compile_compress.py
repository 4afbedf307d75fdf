"""compress, compiled for a chip at DeepSeek-V4's sizes; prints JSON.

    python -m tests.aot.compile_compress v5e:2x2 "flash csa 32 6 131072" ...
    python -m tests.aot.compile_compress h100:1 "flash hca 32 6 131072"

A model and which of its tables (csa, index, hca), slots, tokens of each, positions of a
slot; a sixth word, "pages", has entries in pages. One of two layers.
"""

import json
import sys
from functools import partial

from tests.aot.assembled import assembled  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, use_abstract_mesh

from jaxspark.configs.targets import deepseek_v4_flash, deepseek_v4_pro
from jaxspark.models.layers.sparse_attention import SparseAttention
from jaxspark.models.pages import PAGE
from jaxspark.parallel.rules import replicated_specs
from jaxspark.simulation.chips import abstract, parse_slice
from jaxspark.simulation.traffic import traffic
from pallas_kernels import Ragged, Table, compress
from tests.aot.hlo import KERNELS, new_arrays

LAYERS = 2
CONFIGS = {"flash": deepseek_v4_flash, "pro": deepseek_v4_pro}


def operands(model: str, which: str, slots: int, rows: int, context: int, paged: bool):
    """Abstract operands, and the static ones."""
    config = CONFIGS[model]()
    ratio = config.hca_ratio if which == "hca" else config.csa_ratio
    dtype = jnp.bfloat16
    layer = nnx.eval_shape(
        lambda: SparseAttention(config, ratio, dtype=dtype, rngs=nnx.Rngs(0))
    )
    cache = jax.eval_shape(lambda: layer.init_cache(LAYERS, slots, context, dtype))
    compressor, pending, entries = layer.compressor, cache.pending, cache.entries
    if which == "index":
        compressor = layer.indexer.compressor
        pending, entries = cache.index_pending, cache.index_keys
    if paged:
        pages = 1 + slots * context // PAGE
        entries = jax.eval_shape(lambda: entries.pool(pages))

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = slots * rows
    ragged = Ragged(
        slots_T=of(tokens),
        starts_B=of(slots),
        offsets_B=of(slots),
        counts_B=of(slots),
        rows=rows,
    )
    table = Table(
        entries.rows_LBSH, of(), of(slots, context // PAGE) if paged else None
    )
    frequencies_h, amplitude = compressor.rope.frequencies(compressor.rope_dim)
    arrays = (
        of(tokens, pending.rows_LBSH.shape[-1], dtype=jnp.float32),
        Table(pending.rows_LBSH, of()),
        table,
        of(compressor.width, dtype=dtype),
        of(*frequencies_h.shape, dtype=jnp.float32),
        ragged,
    )
    static = {"ratio": ratio, "eps": config.rms_norm_eps, "amplitude": float(amplitude)}
    return arrays, static


def report(chip: str, case: str) -> dict:
    """What the program moves and holds."""
    model, which, *sizes = case.split()
    arrays, static = operands(
        model, which, *map(int, sizes[:3]), paged="pages" in sizes
    )
    mesh = Mesh(np.array(parse_slice(chip).devices[:1]), ("data",))
    arrays = abstract(mesh, arrays, replicated_specs(arrays))
    with use_abstract_mesh(mesh.abstract_mesh), assembled() as notes:
        run = jax.jit(partial(compress, **static), donate_argnums=(1, 2))
        compiled = run.lower(*arrays).compile()
    text, (rows, pending, entries, *_) = compiled.as_text(), arrays
    tables = (pending.rows_LBCH, entries.rows_LBCH)
    return {
        "kernels": sum(text.count(f'custom_call_target="{name}"') for name in KERNELS),
        "copies": new_arrays(text, min(table.size for table in tables) // LAYERS),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes": traffic(text).memory,
        "row_bytes": 4 * rows.size,
        **notes,
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, case)))
