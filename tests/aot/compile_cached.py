"""cached_attention, compiled for a TPU at dense models' sizes; prints JSON.

    python -m tests.aot.compile_cached v5e:2x2 "bfloat16 64 6 4096 32 8 128 0" ...

Type, slots, tokens of each, positions, heads, heads of keys, their width, and positions
of a page, or 0. A last word, "xla", compiles XLA's program instead.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import parse_slice
from jaxspark.simulation.traffic import traffic
from pallas_kernels import Ragged, cached_attention


def report(chip: str, case: str) -> dict:
    """What the program moves and holds."""
    dtype, *sizes = case.split()
    slots, rows, positions, heads, shared, width, page = map(int, sizes[:7])
    mesh = Mesh(np.array(parse_slice(chip).devices[:1]), ("data",))
    here = NamedSharding(mesh, PartitionSpec())
    tokens = slots * rows

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    blocks = slots * positions // page if page else slots
    cache = of(blocks, shared, page or positions, width, dtype=dtype)
    ragged = Ragged(
        slots_T=of(tokens),
        starts_B=of(slots),
        offsets_B=of(slots),
        counts_B=of(slots),
        rows=rows,
    )
    pages = of(slots, positions // page) if page else None

    def run(q, k, v, ragged, limits, pages):
        return cached_attention(
            *(q, k, v, ragged, limits),
            scale=0.1,
            pages_BP=pages,
            implementation="xla" if "xla" in sizes else None,
        )

    q = of(tokens, heads, width, dtype=dtype)
    with use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(run).lower(q, cache, cache, ragged, of(tokens), pages)
        compiled = lowered.compile()
    text, size = compiled.as_text(), jnp.dtype(dtype).itemsize
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes": traffic(text).memory,
        "query_bytes": q.size * size,
        "cache_bytes": 2 * cache.size * size,
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, case)))
