"""JAX's global settings belong to the program that imports us; exactness is ours.

A program may have chosen another random number generator, 64-bit types, strict
promotion of types or ranks, or transfer guards, for code of its own. What we trace runs
under JAX's defaults whatever it chose: everything public that decodes, loads or trains
is decorated with `@standard_settings()`, and every key names its generator. Inside a
caller's `jit` this holds as well, since it decides at trace time.

Left as they are: settings that choose how products are rounded
(`jax_default_matmul_precision`), since they are meant for all code and both sides of an
exactness claim obey them, and those for debugging (`jax_debug_nans`,
`jax_disable_jit`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jaxtyping import Array, Key

# With "rbg" a vmapped draw comes from the first key of its batch alone, so a request's
# randomness would depend on the requests beside it.
GENERATOR = "threefry2x32"


@contextmanager
def standard_settings() -> Iterator[None]:
    """JAX's default settings for what is traced inside; also a decorator."""
    with (
        jax.enable_x64(False),
        jax.default_prng_impl(GENERATOR),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


def random_key(seed) -> Key[Array, ""]:
    """`jax.random.key` of the one generator that everything here uses."""
    return jax.random.key(seed, impl=GENERATOR)
