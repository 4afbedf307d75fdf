"""tokamax's grouped product, simulated and compiled for a TPU; prints figures as JSON.

A program of its own, since tokamax comes from another environment (`.venv-aot`).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import tokamax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from pallas_kernels import grouped_matmul

V5E = AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=1)
# The experts of many layers, of which one has rows.
LAYERS, EXPERTS, OUT, IN = 8, 16, 512, 256


def multiply(x_AI, w_GOI, group_sizes_E, group_offset):
    return grouped_matmul(
        x_AI,
        w_GOI,
        group_sizes_E,
        group_offset=group_offset,
        implementation="mosaic_tpu",
    )


def simulated(dtype) -> float:
    """The largest difference from XLA's loop, in values and gradients, over cases."""
    random = np.random.default_rng(0)
    cases = ([3, 0, 130, 1], [0, 0, 0, 0], [40, 40, 40, 40], [0, 300, 0, 0])
    return max(difference(random, sizes, dtype) for sizes in cases)


def difference(random, sizes, dtype) -> float:
    """The same of one case: groups 4 to 7 of 12."""
    x_AI = jnp.asarray(random.normal(size=(sum(sizes) + 5, 256)), dtype)
    w_GOI = jnp.asarray(random.normal(size=(12, 128, 256)) / 16, dtype)
    dy_AO = jnp.asarray(random.normal(size=(len(x_AI), 128)), dtype)

    def with_gradients(product):
        def of_groups(x_AI, w_GOI):
            return product(x_AI, w_GOI, jnp.array(sizes), group_offset=jnp.int32(4))

        y_AO, back = jax.vjp(of_groups, x_AI, w_GOI)
        return y_AO, *back(dy_AO)

    abstract = AbstractMesh((), (), abstract_device=V5E)
    with use_abstract_mesh(abstract), pltpu.force_tpu_interpret_mode():
        seen = with_gradients(multiply)
    return max(
        float(jnp.abs(mine.astype("f4") - theirs.astype("f4")).max(initial=0.0))
        for mine, theirs in zip(seen, with_gradients(grouped_matmul), strict=True)
    )


def compiled(rows: int) -> dict:
    """What the program for a v5e holds beside its arguments."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())

    def shape(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype, sharding=place)

    weights = shape(LAYERS * EXPERTS, OUT, IN)
    tokamax.config.cross_compile(True)
    with use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(multiply).lower(
            shape(rows, IN),
            weights,
            shape(EXPERTS, dtype=jnp.int32),
            shape(dtype=jnp.int32),
        )
    program = lowered.compile()
    return {
        "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "weight_bytes": weights.size * 2,
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "float32": simulated(jnp.float32),
                "bfloat16": simulated(jnp.bfloat16),
                "few rows": compiled(48),
                "many rows": compiled(3000),
            }
        )
    )
