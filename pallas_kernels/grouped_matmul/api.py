"""Products of rows, sorted by group, with their group's matrix."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import resolve
from pallas_kernels.grouped_matmul.ref import grouped_matmul_xla

IMPLEMENTATIONS = {"xla": grouped_matmul_xla}


def grouped_matmul(
    x_AI: Float[Array, "A I"],
    w_GOI: Float[Array, "G O I"],
    sizes_E: Int[Array, " E"],
    *,
    first: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "A O"]:
    """y_a = W_g(a) x_a, where rows come in the order of their groups.

    The first sizes_E[0] rows belong to group `first`, the next sizes_E[1] to the group
    after it, and so on. Work and weights read follow the rows and the groups that have
    some; groups without rows cost nothing. So the matrices of many layers can lie in
    one array of which `first` names a layer's.

    Args:
      x_AI: rows, sorted by group.
      w_GOI: one output-major matrix per group.
      sizes_E: rows of each of E groups, from `first` on; their sum is at most A.
      first: the group of the first rows.
      implementation: "xla", which None also means.

    Returns:
      One row of outputs per row, in the type of `x_AI`; 0 where no group is.

    Raises:
      ValueError: unknown implementation, or widths that do not match.
    """
    if x_AI.shape[-1] != w_GOI.shape[-1]:
        raise ValueError(
            f"rows of width {x_AI.shape[-1]} do not fit matrices of {w_GOI.shape[1:]}"
        )
    multiply = resolve("grouped_matmul", IMPLEMENTATIONS, implementation)
    with jax.named_scope("grouped_matmul"):
        return multiply(x_AI, w_GOI, sizes_E, first)
