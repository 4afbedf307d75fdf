"""indexer_topk, compiled for a chip at DeepSeek-V4's sizes; prints JSON.

    python -m tests.aot.compile_indexer v5e:2x2 32,6,32768,512 8,8,262144,1024 ...
    python -m tests.aot.compile_indexer h100:1 32,6,32768,512

Slots, tokens of each, index keys of a slot, entries chosen; a fifth number makes pages
of so many keys. One of two layers, read in place.
"""

import json
import sys

from tests.aot.assembled import assembled  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import parse_slice
from pallas_kernels import Index, Ragged, Table, indexer_topk
from tests.aot.hlo import KERNELS

LAYERS, HEADS, WIDTH = 2, 64, 128


def report(chip: str, slots: int, rows: int, keys: int, picks: int, page=0) -> dict:
    """What the program consists of."""
    mesh = Mesh(np.array(parse_slice(chip).devices[:1]), ("data",))
    here = NamedSharding(mesh, PartitionSpec())
    tokens = slots * rows

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    pages = slots * keys // page if page else slots
    index = Index(
        q_TNH=of(tokens, HEADS, WIDTH, dtype=jnp.bfloat16),
        weights_TN=of(tokens, HEADS, dtype=jnp.float32),
        keys=Table(
            of(LAYERS, pages, page or keys, WIDTH, dtype=jnp.bfloat16),
            of(),
            of(slots, keys // page) if page else None,
        ),
        picks=picks,
    )
    ragged = Ragged(
        slots_T=of(tokens),
        starts_B=of(slots),
        offsets_B=of(slots),
        counts_B=of(slots),
        rows=rows,
    )
    with use_abstract_mesh(mesh.abstract_mesh), assembled() as notes:
        compiled = jax.jit(indexer_topk).lower(index, of(tokens), ragged).compile()
    text = compiled.as_text()
    return {
        "kernels": sum(text.count(f'custom_call_target="{name}"') for name in KERNELS),
        "sorts": text.count(" sort("),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        **notes,
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, *map(int, case.split(",")))))
