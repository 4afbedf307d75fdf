"""What sums and products are computed in, whatever their inputs are stored in."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def accum_dtype(dtype):
    """float32, or float64 where that is asked for."""
    return jnp.promote_types(dtype, jnp.float32)


def upcast(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in at least float32."""
    return x.astype(accum_dtype(x.dtype))


def precision(dtype) -> jax.lax.Precision | None:
    """Of products: full for float32 and wider (no TF32 or bfloat16 passes)."""
    return jax.lax.Precision.HIGHEST if accum_dtype(dtype) == dtype else None


def product(
    a: Float[Array, "..."], b: Float[Array, "..."], axes: tuple[int, int]
) -> Float[Array, "..."]:
    """Of two matrices, summed over an axis of each, in float32: a kernel's product."""
    return jax.lax.dot_general(
        a,
        b,
        ((axes[:1], axes[1:]), ((), ())),
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def narrow(operands):
    """Integers in 32 bits: kernels know no others, whatever the program's setting."""

    def narrowed(x):
        x = jnp.asarray(x)
        return x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x

    return jax.tree.map(narrowed, operands)


def in_32_bits[**P, R](kernel: Callable[P, R]) -> Callable[P, R]:
    """Makes a kernel's function one that is traced with integers of 32 bits."""

    @functools.wraps(kernel)
    def run(*operands: P.args, **static: P.kwargs) -> R:
        with jax.enable_x64(False):
            return kernel(*narrow(operands), **static)

    return run
