"""Hyper-connections around a sublayer, compiled for TPUs; prints JSON.

    python -m tests.aot.compile_hyper v5e:2x2 "4096 192" "7168 4096" ...

Width and tokens; bfloat16. The streams come and go as kernels have them, [M, T, D].
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import parse_slice
from jaxspark.simulation.traffic import traffic
from pallas_kernels import hyper_connections, hyper_mix

M = 4


def report(chip: str, case: str) -> dict:
    """What the program moves, and the least: the streams twice in, once out."""
    width, tokens = map(int, case.split())
    mesh = Mesh(np.array(parse_slice(chip).devices[:1]), ("data",))
    place = NamedSharding(mesh, PartitionSpec())

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def around(x_MTD, y_TD, fn_XY, scale, base_X):
        x_TMD = x_MTD.transpose(1, 0, 2)
        h_TD, post_TM, comb_TMM = hyper_connections(
            *(x_TMD, fn_XY, scale, base_X), iterations=20, eps=1e-6, norm_eps=1e-6
        )
        return h_TD, hyper_mix(y_TD, x_TMD, post_TM, comb_TMM).transpose(1, 0, 2)

    rows = (2 + M) * M
    arguments = (
        of(M, tokens, width, dtype=jnp.bfloat16),
        of(tokens, width, dtype=jnp.bfloat16),
        of(rows, M * width),
        of(3),
        of(rows),
    )
    with use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(around).lower(*arguments).compile()
    text = compiled.as_text()
    assert text is not None
    streams = 2 * M * tokens * width
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes": traffic(text).memory,
        "least_bytes": 3 * streams + 2 * streams // M + 4 * rows * M * width,
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, case)), flush=True)
