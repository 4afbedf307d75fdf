"""Gumbel noise as a function of (key, counter), which kernels and XLA compute alike.

The noise of token v under a key is `jax.random.gumbel(key, (V,), mode="low")[v]` with
JAX's partitionable Threefry-2x32 (Salmon et al. 2011), bit for bit: of each counter
alone, so any part of a vocabulary has its noise without the rest. About 120 integer
operations and two logarithms per token; int32 throughout, which wraps like uint32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ONE = 0x3F800000  # 1.0 in float32; its mantissa takes the highest bits
_TINY = 2.0**-126


def gumbel(
    first: Int[Array, "*R"], second: Int[Array, "*R"], counters: Int[Array, "*N"]
) -> Float[Array, "..."]:
    """Noise in float32, in the shape that keys and counters broadcast to.

    Args:
      first: the first words of keys.
      second: their second words.
      counters: token ids.
    """
    bits = _threefry(first, second, counters)
    bits = jax.lax.shift_right_logical(bits, jnp.int32(9)) | jnp.int32(_ONE)
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, _TINY)))


def _threefry(first, second, counters):
    """32 random bits of each counter: both words of the hash of (0, counter)."""
    keys = first, second, first ^ second ^ jnp.int32(_PARITY)
    x = jnp.broadcast_to(first, jnp.broadcast_shapes(first.shape, counters.shape))
    y = counters + second
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            x = x + y
            left = jax.lax.shift_left(y, jnp.int32(rotation))
            right = jax.lax.shift_right_logical(y, jnp.int32(32 - rotation))
            y = (left | right) ^ x
        x = x + keys[(turn + 1) % 3]
        y = y + keys[(turn + 2) % 3] + jnp.int32(turn + 1)
    return x ^ y
