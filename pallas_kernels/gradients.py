"""Gradients of kernels that have none of their own: those of a reference."""

import functools
from collections.abc import Callable

import jax

from pallas_kernels.precision import in_32_bits


def with_gradients_of(reference: Callable) -> Callable[[Callable], Callable]:
    """Makes of a kernel's function an op that is differentiated as `reference` is.

    Nothing is kept for gradients but the operands. The kernel is traced with integers
    of 32 bits, whatever the program's setting.

    Args:
      reference: the same function of the same operands and static keywords, by XLA.
    """

    def decorate(kernel):
        narrowed = in_32_bits(kernel)

        @functools.wraps(kernel)
        def run(*operands, **static):
            @jax.custom_vjp
            def op(*operands):
                return narrowed(*operands, **static)

            def backward(operands, dy):
                _, back = jax.vjp(functools.partial(reference, **static), *operands)
                return back(dy)

            op.defvjp(lambda *operands: (op(*operands), operands), backward)
            return op(*operands)

        return run

    return decorate
