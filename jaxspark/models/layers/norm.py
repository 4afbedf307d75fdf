"""Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.channels import normalize
from pallas_kernels.precision import upcast


class RMSNorm(nnx.Module):
    """x_D / sqrt(mean_D(x^2) + eps) * w_D over the last axis."""

    def __init__(self, width: int, *, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Norms every row; rounded before the weight, as Llama does."""
        normed = normalize(x, self.eps).astype(x.dtype)
        return self.weight[...] * normed


class Float32RMSNorm(RMSNorm):
    """The same, weight included in float32 and rounded once, as DeepSeek does."""

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Norms every row."""
        weight_D = upcast(self.weight[...])
        return (weight_D * normalize(x, self.eps)).astype(x.dtype)
