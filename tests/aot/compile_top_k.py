"""top_k, compiled for a TPU at DeepSeek-V4's sizes; prints JSON.

    python -m tests.aot.compile_top_k v5e:2x2 192,32768,512 64,262144,1024

Tokens, scores of each, places chosen.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import parse_slice
from pallas_kernels import top_k


def report(chip: str, tokens: int, scores: int, k: int) -> dict:
    """What the program consists of."""
    mesh = Mesh(np.array(parse_slice(chip).devices[:1]), ("data",))
    here = NamedSharding(mesh, PartitionSpec())
    arguments = (
        jax.ShapeDtypeStruct((tokens, scores), jnp.float32, sharding=here),
        jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=here),
    )
    with use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(lambda *x: top_k(*x, k=k)).lower(*arguments).compile()
    text = compiled.as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "sorts": text.count(" sort("),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, *map(int, case.split(",")))))
