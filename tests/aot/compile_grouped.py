"""grouped_matmul, compiled for TPUs at DeepSeek-V4's sizes; prints JSON.

    python -m tests.aot.compile_grouped v5e:2x2 "flash up fp4" "pro down bfloat16" ...

The experts of two layers, of which one is multiplied with. More words: "share", an
eighth of the experts and their tokens of all eight devices; "prefill", 4,096 tokens;
"gradients"; "sharded", over four devices; "x64", in a program with 64 bits. Mosaic may
end the process where it cannot compile.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import parse_slice
from pallas_kernels import grouped_matmul
from pallas_kernels.transposed import FP8, Transposed

LAYERS = 2
# Experts, hidden size, size of an expert's hidden layer.
SIZES = {"flash": (256, 4096, 2048), "pro": (384, 7168, 3072)}
CHOSEN = 6


def weights(kind: str, of, groups: int, rows: int, columns: int):
    """Abstract matrices [groups, rows, columns]."""
    if kind not in ("fp4", "fp8"):
        return of((groups, rows, columns), jnp.dtype(kind))
    packed = kind == "fp4"
    return Transposed(
        of(
            (groups, columns // 2 if packed else columns, rows),
            jnp.uint8 if packed else FP8,
        ),
        of((groups, columns // (32 if packed else 128), rows), jnp.uint8),
        jnp.dtype(jnp.bfloat16),
    )


def report(chip: str, case: str) -> dict:
    """What the program holds beside its arguments."""
    size, matrix, kind, *rest = case.split()
    experts, hidden, inner = SIZES[size]
    tokens = 4096 if "prefill" in rest else 192
    if "share" in rest:
        experts, tokens = experts // 8, 8 * tokens
    rows, columns = (2 * inner, hidden) if matrix == "up" else (hidden, inner)
    devices = parse_slice(chip).devices[: 4 if "sharded" in rest else 1]
    mesh = Mesh(np.array(devices), ("expert",))
    spec = PartitionSpec("expert" if "sharded" in rest else None)

    def of(shape, dtype):
        shape = (len(devices) * shape[0], *shape[1:])
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    dtype = jnp.dtype(kind if kind == "float32" else jnp.bfloat16)
    w_GOI = weights(kind, of, LAYERS * experts, rows, columns)
    arguments = (
        of((CHOSEN * tokens, columns), dtype),
        w_GOI,
        of((experts,), jnp.int32),
        of((1,), jnp.int32),
    )

    def multiply(x_AI, w_GOI, group_sizes_E, layer):
        def of_rows(x_AI):
            offset = layer[0] * experts
            return grouped_matmul(x_AI, w_GOI, group_sizes_E, group_offset=offset)

        if "gradients" not in rest:
            return of_rows(x_AI)
        y_AO, back = jax.vjp(of_rows, x_AI)
        return back(y_AO)[0]

    if "sharded" in rest:
        multiply = jax.shard_map(
            multiply, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    x64 = jax.enable_x64("x64" in rest)
    with use_abstract_mesh(mesh.abstract_mesh), x64:
        compiled = jax.jit(multiply).lower(*arguments).compile()
    layer = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w_GOI))
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "layer_bytes": layer // LAYERS // len(devices),
        "bytes": compiled.cost_analysis().get("bytes accessed"),
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, case)), flush=True)
