"""Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.precision import widened


def normalise(x_DT: Float[Array, "... D T"], eps: float) -> Float[Array, "... D T"]:
    """x_D / sqrt(mean_D(x^2) + eps) in float32."""
    x_DT = widened(x_DT)
    mean_square = jnp.mean(jnp.square(x_DT), axis=-2, keepdims=True)
    return x_DT * jax.lax.rsqrt(mean_square + eps)


class RMSNorm(nnx.Module):
    """x_D / sqrt(mean_D(x^2) + eps) * w_D over the feature axis of `[..., D, T]`."""

    def __init__(self, width: int, *, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x_DT: Float[Array, "... D T"]) -> Float[Array, "... D T"]:
        """Norms every column; rounded before the weight, as Llama does."""
        x = normalise(x_DT, self.eps).astype(x_DT.dtype)
        return self.weight[...][:, None] * x


class Float32RMSNorm(RMSNorm):
    """The same, weight included in float32 and rounded once, as DeepSeek does."""

    def __call__(self, x_DT: Float[Array, "... D T"]) -> Float[Array, "... D T"]:
        """Norms every column."""
        weight_D = widened(self.weight[...])
        return (weight_D[:, None] * normalise(x_DT, self.eps)).astype(x_DT.dtype)
