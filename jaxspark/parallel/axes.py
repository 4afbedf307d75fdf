"""What all devices must agree on, said by the one function that makes them agree.

Inside `shard_map` each device holds some of the slots. A branch around a model call
that only some devices take would leave the others waiting in a collective, so whatever
decides one (how many tokens are drafted, the token bucket, whether a loop ends) is
reduced over the mesh axis of slots first. With no axis, on one device, these are the
reductions of `jax.numpy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

# The name of a mesh axis, several of them, or None on one device.
Axis = str | tuple[str, ...] | None


def max_of(x: Shaped[Array, "..."], axis: Axis = None) -> Shaped[Array, ""]:
    """The largest element on any device."""
    largest = jnp.max(x)
    return largest if axis is None else jax.lax.pmax(largest, axis)


def sum_of(x: Shaped[Array, "..."], axis: Axis = None) -> Shaped[Array, ""]:
    """The sum over all elements of all devices."""
    total = jnp.sum(x)
    return total if axis is None else jax.lax.psum(total, axis)


def any_of(x: Bool[Array, "..."], axis: Axis = None) -> Bool[Array, ""]:
    """Whether an element on any device is true."""
    return max_of(x.astype(jnp.int32), axis) > 0 if axis else jnp.any(x)


def all_of(x: Bool[Array, "..."], axis: Axis = None) -> Bool[Array, ""]:
    """Whether every element on every device is true."""
    return ~any_of(~x, axis)
