"""Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import upcast


def normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x_D / sqrt(mean_D(x^2) + eps) in float32."""
    x = upcast(x)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps)
