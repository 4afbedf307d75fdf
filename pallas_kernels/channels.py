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
    a = upcast(turning)
    # Neighbours by shifts: pairs on an axis of their own would lie elsewhere.
    right, left = (jnp.roll(a, shift, axis=-1) for shift in (-1, 1))
    b = jnp.where(jnp.arange(a.shape[-1]) % 2 == 0, -right, left)
    cos, sin = (jnp.repeat(each, 2, axis=-1) for each in (cos, sin))
    turned = (a * cos + b * sin).astype(x.dtype)
    return jnp.concatenate([plain, turned], axis=-1)
