"""sparse_attention, compiled at DeepSeek-V4's sizes; prints JSON.

    python -m tests.aot.compile_sparse v5e:2x2 "flash chosen" "pro limits" ...
    python -m tests.aot.compile_sparse h100:4 "flash limits paged"

One of two layers, read in place. Queries come as a projection leaves them, outputs
leave as the next one wants them; they are normed and turned, and turned back.
Mosaic may end the process where it cannot compile.
"""

import json
import math
import sys

from tests.aot.assembled import assembled  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxspark.simulation.chips import parse_slice
from pallas_kernels import Entries, Ragged, Rotary, Table, sparse_attention
from pallas_kernels.ragged import LANES, split_lanes
from tests.aot.hlo import KERNELS, new_arrays

LAYERS, ENTRIES, WINDOW, WIDTH, PAGE = 2, 4096, 128, 512, 16
TURNING = 32  # pairs of channels of a head
# Heads, entries that a query chooses, slots, tokens of each.
SIZES = {
    "flash": (64, 512, 8, 6),
    "pro": (128, 1024, 8, 8),
    "long": (64, 512, 8, 200),
    "train": (64, 512, 1, 4096),
}


def report(chip: str, case: str) -> dict:
    """What the program holds beside its arguments."""
    size, seen, *rest = case.split()
    dtype = jnp.float32 if "float32" in rest else jnp.bfloat16
    heads, picks, slots, rows = SIZES[size]
    width = LANES if "narrow" in rest else WIDTH
    devices = parse_slice(chip).devices[: 4 if "sharded" in rest else 1]
    mesh = Mesh(np.array(devices), ("data",))
    tokens = slots * rows
    one, all_layers = PartitionSpec("data"), PartitionSpec(None, "data")
    whole = PartitionSpec()

    def of(spec, *shape, dtype=dtype):
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def ints(spec, *shape):
        return of(spec, *shape, dtype=jnp.int32)

    table = (LAYERS, slots, ENTRIES, width)
    if "paged" in rest:
        table = (LAYERS, slots * ENTRIES // PAGE, PAGE, width)
    if seen == "chosen":
        table = jax.eval_shape(split_lanes, jax.ShapeDtypeStruct(table, dtype)).shape
    arguments = (
        of(one, tokens, heads * width),
        of(one, tokens, width),
        of(one, slots, WINDOW - 1, width),
        of(whole, heads, dtype=jnp.float32),
        ints(one, tokens),
        *[ints(one, slots)] * 3,
        *[of(one, tokens, TURNING, dtype=jnp.float32)] * 2,
        of(all_layers, *table),
        ints(whole),
        ints(one, tokens, picks) if seen == "chosen" else ints(one, tokens),
        *([ints(one, slots, ENTRIES // PAGE)] if "paged" in rest else []),
    )

    def attend(
        q, keys, before, sinks, slots_T, starts, offsets, counts, cos, sin, rows_L, at,
        which, *pages,
    ):  # fmt: skip
        ragged = Ragged(
            slots_T=slots_T,
            starts_B=starts,
            offsets_B=offsets,
            counts_B=counts,
            rows=rows,
        )
        name = "chosen_TX" if seen == "chosen" else "limits_T"
        entries = Entries(Table(rows_L, at, *pages), **{name: which})
        q = q.reshape(len(q), heads, width)
        operands = q, keys, before, sinks, ragged, entries
        turned = {"rotary": Rotary(cos, sin), "query_norm": 1e-6}
        o = sparse_attention(*operands, scale=width**-0.5, **turned)
        return o.reshape(len(q), heads // 8, -1)

    if "gradients" in rest:
        forward = attend

        def attend(*operands):
            def of(q, keys, before, sinks, rows_L):
                others = operands[4:10], operands[11:]
                return forward(q, keys, before, sinks, *others[0], rows_L, *others[1])

            o_TNH, back = jax.vjp(of, *operands[:4], operands[10])
            return back(o_TNH)

    if "sharded" in rest:
        specs = tuple(each.sharding.spec for each in arguments)
        attend = jax.shard_map(
            attend, mesh=mesh, in_specs=specs, out_specs=one, check_vma=False
        )
    with use_abstract_mesh(mesh.abstract_mesh), assembled() as notes:
        compiled = jax.jit(attend).lower(*arguments).compile()
    text = compiled.as_text()
    return {
        "kernels": sum(text.count(f'custom_call_target="{name}"') for name in KERNELS),
        "copies": new_arrays(text, math.prod(table) // LAYERS // len(devices)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        **notes,
    }


if __name__ == "__main__":
    chip, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(report(chip, case)))
