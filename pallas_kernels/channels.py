"""What is done to the channels of a row: root-mean-square norm, rotation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import upcast


def normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x_D / sqrt(mean_D(x^2) + eps) in float32 (Zhang & Sennrich 2019)."""
    x = upcast(x)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps)


def turn_neighbours(
    x: Float[Array, "... H"], cos: Float[Array, "... h"], sin: Float[Array, "... h"]
) -> Float[Array, "... H"]:
    """Turns the last 2h channels, in pairs of neighbours; those before stay.

    `cos` and `sin` have as many axes as `x`.
    """
    plain, turning = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    pairs = upcast(turning).reshape(*turning.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.reshape(turning.shape).astype(x.dtype)
    return jnp.concatenate([plain, turned], axis=-1)
