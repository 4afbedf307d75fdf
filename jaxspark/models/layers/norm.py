"""Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x_D / sqrt(mean_D(x^2) + eps) * w_D over the feature axis of `[..., D, T]`."""

    def __init__(self, width: int, *, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x_DT: Float[Array, "... D T"]) -> Float[Array, "... D T"]:
        """Norms every column."""
        x = x_DT.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-2, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + self.eps)
        return self.weight[...][:, None] * x.astype(x_DT.dtype)
