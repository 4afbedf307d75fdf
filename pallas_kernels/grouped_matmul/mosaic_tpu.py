"""Grouped products on TPUs, by tokamax's kernel (megablox, arXiv 2211.15841).

XLA multiplies all groups with all rows there; the kernel visits the groups that have
rows. It wants tiles of 128 rows, so it pays from a few dozen rows on.
"""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import expected_platform
from pallas_kernels.grouped_matmul.ref import backward
from pallas_kernels.precision import precision
from pallas_kernels.quantized import Quantized

_LEAST = 128
_TILE = 1024
# Rows [A, I] and matrices [G, O, I]: what a kernel calls the transposed product.
_OUTPUT_MAJOR = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def supports(x_AI, w_GOI, group_sizes_E, group_offset) -> str | None:
    """Why the kernel cannot multiply these; None if it can."""
    if find_spec("tokamax") is None:
        return "is tokamax's, which is not installed: pip install 'jaxspark[tpu]'"
    if expected_platform() != "tpu":
        return (
            "chooses tiles for a kind of TPU; to compile for one that is not here, "
            "trace inside jax.sharding.use_abstract_mesh with its abstract device"
        )
    if isinstance(w_GOI, Quantized):
        return "multiplies plain matrices, not quantized ones"
    if min(w_GOI.shape[1:]) < _LEAST:
        return f"needs matrices of {_LEAST} x {_LEAST} or more, got {w_GOI.shape[1:]}"
    return None


@jax.custom_vjp
def grouped_matmul_mosaic_tpu(
    x_AI: Float[Array, "A I"],
    w_GOI: Float[Array, "G O I"],
    group_sizes_E: Int[Array, " E"],
    group_offset: Int[Array, ""],
) -> Float[Array, "A O"]:
    """See `api.grouped_matmul`; gradients are those of XLA's loop."""
    import tokamax  # Optional, and slow to import.

    rows = x_AI.shape[0]
    tile = min(_TILE, max(_LEAST, 1 << (rows - 1).bit_length()))
    padded_AI = jnp.pad(x_AI, ((0, -rows % tile), (0, 0)))
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    sizes_G = jnp.zeros(len(w_GOI), jnp.int32)
    y_AO = tokamax.ragged_dot_general(
        padded_AI,
        w_GOI,
        jax.lax.dynamic_update_slice(sizes_G, group_sizes_E, (group_offset,)),
        _OUTPUT_MAJOR,
        precision=precision(x_AI.dtype),
        preferred_element_type=x_AI.dtype,
        implementation="mosaic_tpu",
    )[:rows]
    # The kernel leaves rows of no group as they were in memory.
    return jnp.where((jnp.arange(rows) < jnp.sum(group_sizes_E))[:, None], y_AO, 0)


def _forward(x_AI, w_GOI, group_sizes_E, group_offset):
    y_AO = grouped_matmul_mosaic_tpu(x_AI, w_GOI, group_sizes_E, group_offset)
    return y_AO, (x_AI, w_GOI, group_sizes_E, group_offset)


grouped_matmul_mosaic_tpu.defvjp(_forward, backward)
