"""Affine maps in column convention: tokens are columns, y_OT = W_OI x_IT + b_O.

Weights keep the checkpoint's output-major layout [O, I] and activations are stored
feature-major. A product then streams every weight row once, whatever the number of
tokens, which keeps the extra rows of speculative verification cheap
(`launch/bench.py --suite=layout` compares the layouts).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import precision, wide_type
from pallas_kernels.quantized import dense


def product(
    w_OI: Float[Array, "O I"], x_IT: Float[Array, "I T"], dtype=None
) -> Float[Array, "O T"]:
    """W x as `dtype`; float32 in full precision (no TF32 or bfloat16 passes)."""
    exact = precision(w_OI.dtype)
    return jnp.dot(w_OI, x_IT, precision=exact, preferred_element_type=dtype)


def row_product(
    w_OI: Float[Array, "O I"], x_IT: Float[Array, "I T"]
) -> Float[Array, "T O"]:
    """(W x)^T in float32: a contiguous row of outputs per token, as sampling reads it.

    Nothing is rounded to bfloat16 on the way: near 16 its steps of 0.125 make ties.

    Without the barrier XLA folds the transpose into the product, which then reads W
    column-wise: 97 ms instead of 7 for two tokens and a head of 49152 x 576 on CPU.
    """
    y_OT = product(w_OI, x_IT, wide_type(x_IT.dtype))
    return jax.lax.optimization_barrier(y_OT).T


class Buffer(nnx.Variable):
    """An array that belongs to a model but is not trained."""


class Linear(nnx.Module):
    """y_OT = W_OI x_IT (+ b_O); `weight` and `bias` as in the checkpoint.

    The weight may be `Quantized`; `matrix` is what it stands for.
    """

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool = False, dtype, rngs: nnx.Rngs
    ):
        scale = d_in**-0.5
        self.weight = nnx.Param(
            scale * jax.random.normal(rngs.params(), (d_out, d_in), dtype)
        )
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None

    @property
    def matrix(self) -> Float[Array, "O I"]:
        """W, dequantized if it is kept in blocks."""
        return dense(self.weight[...])

    def __call__(self, x_IT: Float[Array, "I T"]) -> Float[Array, "O T"]:
        """Maps every column."""
        y_OT = product(self.matrix, x_IT)
        return y_OT if self.bias is None else y_OT + self.bias[...][:, None]


class Embedding(nnx.Module):
    """Rows of a [V, D] table as columns; the same table may serve as the LM head."""

    def __init__(self, vocab: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (vocab, width), dtype)
        )

    def __call__(self, ids_T: Int[Array, " T"]) -> Float[Array, "D T"]:
        """Looks up one column per id."""
        return self.weight[...][ids_T].T
