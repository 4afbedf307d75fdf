"""draft_sampling and verify, compiled for TPUs at the sizes of models; prints JSON.

    python -m tests.aot.compile_vocabulary v5p:2x2x1 "verify flash" "draft pro" ...

32 slots and blocks of five drafts, or, of a dense model, 128 and sixteen. "plain" is
without noise; "sharded" shares the vocabulary out over four devices. Mosaic may end the
process where it cannot compile.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.parallel.axes import MODEL
from jaxspark.simulation.chips import parse_slice
from pallas_kernels import Rows, draft_sampling, verify

# Hidden size, vocabulary, slots, drafts of a block.
SIZES = {
    "flash": (4096, 129280, 32, 5),
    "pro": (7168, 129280, 32, 5),
    "dense": (4096, 151936, 128, 16),
}
RANK = 256


def report(chip: str, case: str) -> dict:
    """What the program holds beside its arguments, and the bytes it moves."""
    op, size, *rest = case.split()
    D, V, B, G = SIZES[size]
    devices = parse_slice(chip).devices[: 4 if "sharded" in rest else 1]
    mesh = Mesh(np.array(devices), (MODEL,))

    def of(*shape, dtype=jnp.bfloat16, spec=()):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    R = B * (G + 1) if op == "verify" else B
    rows = Rows(
        of(R, dtype=jnp.float32), None if "plain" in rest else of(R, 2, dtype=jnp.int32)
    )
    if op == "verify":
        arguments = (of(R, D), of(V, D, spec=(MODEL,)), rows)
        run, wide = verify, R * V
    else:
        arguments = (
            of(G, B, V, dtype=jnp.float32, spec=(None, None, MODEL)),
            of(1, dtype=jnp.int32),
            of(B, RANK),
            of(V, RANK, spec=(MODEL,)),
            rows,
        )
        wide = B * V

        def run(base_GBV, row, *others):
            return draft_sampling(base_GBV, row[0], *others)

    if len(devices) > 1:
        specs = jax.tree.map(lambda x: x.sharding.spec, arguments)
        run = jax.shard_map(
            run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
    with use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run).lower(*arguments).compile()
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "logits_bytes": 4 * wide // len(devices),
        "bytes": compiled.cost_analysis().get("bytes accessed"),
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, case)), flush=True)
