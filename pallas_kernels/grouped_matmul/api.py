"""Products of rows, sorted by group, with their group's matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.grouped_matmul import mosaic_tpu
from pallas_kernels.grouped_matmul.ref import grouped_matmul_xla
from pallas_kernels.quantized import Quantized

IMPLEMENTATIONS = {
    "xla": Implementation(run=grouped_matmul_xla),
    "mosaic_tpu": Implementation(
        run=mosaic_tpu.grouped_matmul_mosaic_tpu,
        platforms=("tpu",),
        supports=mosaic_tpu.supports,
    ),
}


def grouped_matmul(
    x_AI: Float[Array, "A I"],
    w_GOI: Float[Array, "G O I"] | Quantized,
    group_sizes_E: Int[Array, " E"],
    *,
    group_offset: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "A O"]:
    """y_a = W_g(a) x_a, where rows come in the order of their groups.

    The first rows belong to group `group_offset`, as many as `group_sizes_E[0]` says,
    the next `group_sizes_E[1]` to the group after it, and so on. Work and weights read
    follow the rows and the groups that have some; groups without rows cost nothing. So
    the matrices of many layers can lie in one array of which `group_offset` names a
    layer's.

    Args:
      x_AI: rows, sorted by group.
      w_GOI: one output-major matrix per group; of quantized ones only those of groups
        that have rows are dequantized. These have no gradients.
      group_sizes_E: rows of each of E groups, from `group_offset` on; their sum is at
        most A.
      group_offset: the group of the first rows.
      implementation: "xla", or "mosaic_tpu", a kernel for matrices in multiples of 128
        that are plain or `Transposed`; None takes that in programs for TPUs where it
        can.

    Returns:
      One row of outputs per row, in the type of `x_AI`; 0 where no group is.

    Raises:
      ValueError: an implementation that is unknown or does not support the operands,
        or widths that do not match.
    """
    if x_AI.shape[-1] != w_GOI.shape[-1]:
        raise ValueError(
            f"rows of width {x_AI.shape[-1]} do not fit matrices of {w_GOI.shape[1:]}"
        )
    x_AI, w_GOI, group_sizes_E = jax.tree.map(jnp.asarray, (x_AI, w_GOI, group_sizes_E))
    operands = (x_AI, w_GOI, group_sizes_E, jnp.asarray(group_offset, jnp.int32))
    with jax.named_scope("grouped_matmul"):
        return call("grouped_matmul", IMPLEMENTATIONS, implementation, *operands)
