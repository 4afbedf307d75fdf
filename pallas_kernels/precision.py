"""What sums and products are computed in, whatever their inputs are stored in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wide_type(dtype):
    """float32, or float64 where that is asked for."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in at least float32."""
    return x.astype(wide_type(x.dtype))


def precision(dtype) -> jax.lax.Precision | None:
    """Of products: full for float32 and wider (no TF32 or bfloat16 passes)."""
    return jax.lax.Precision.HIGHEST if wide_type(dtype) == dtype else None
