"""Affine maps of token rows, y_TO = x_TI W_OI^T + b_O.

Activations are token-major, [T, D], as everywhere in the field and as kernels read
them; weights keep the checkpoint's output-major layout [O, I].
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspark.parallel.axes import MODEL, own, total
from pallas_kernels.precision import accum_dtype, precision
from pallas_kernels.quantized import dense

# Up to so many float32 rows, a product is computed as (W x^T)^T, see `matmul`.
_STREAMED_ROWS = 16


def matmul(
    x: Float[Array, "..."], w_OI: Float[Array, "O I *J"], dtype=None
) -> Float[Array, "*T O"]:
    """x W^T as `dtype`; float32 in full precision (no TF32 or bfloat16 passes).

    All axes of W but its first are summed over: rows need not lie in one piece.

    How it is written matters on CPUs (`jaxspark bench --suite=layout`). A few float32
    rows, as decoding has them, are multiplied as (W x^T)^T, which streams each row of W
    once: 1.2 to 1.5 times as fast, a single row 4 times. The barrier keeps XLA from
    folding the transpose into the product. In bfloat16 contracting both last axes is 4
    times as fast as `x @ W.T`, and a single row goes as two.
    """
    exact = precision(w_OI.dtype)
    shape = x.shape[: x.ndim - w_OI.ndim + 1]
    rows = math.prod(shape)
    if w_OI.dtype == jnp.float32 and 1 <= rows <= _STREAMED_ROWS:
        x_IT = x.reshape(rows, -1).T
        w_OI = w_OI.reshape(len(w_OI), -1)
        y_OT = jnp.dot(w_OI, x_IT, precision=exact, preferred_element_type=dtype)
        y_TO = jax.lax.optimization_barrier(y_OT).T
        return y_TO.reshape(*shape, -1)
    if w_OI.dtype == jnp.bfloat16 and rows == 1:
        twice = jnp.broadcast_to(x, (2, *x.shape))
        return _contract(twice, w_OI, exact, dtype)[0]
    return _contract(x, w_OI, exact, dtype)


def _contract(x, w_OI, exact, dtype):
    axes = range(1, w_OI.ndim)
    return jax.lax.dot_general(
        x,
        w_OI,
        (([x.ndim - w_OI.ndim + axis for axis in axes], axes), ((), ())),
        precision=exact,
        preferred_element_type=dtype,
    )


def head_logits(
    x: Float[Array, "*T D"], w_VD: Float[Array, "V D"]
) -> Float[Array, "*T V"]:
    """x W^T in float32: nothing is rounded to bfloat16 on the way.

    Near 16 its steps of 0.125 make ties.
    """
    return matmul(x, w_VD, accum_dtype(x.dtype))


class Buffer(nnx.Variable):
    """An array that belongs to a model but is not trained."""


class Linear(nnx.Module):
    """y_TO = x_TI W_OI^T (+ b_O); `weight` and `bias` as in the checkpoint.

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

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """Maps every row."""
        return self._shifted(matmul(x, self.matrix))

    def summed(self, x: Float[Array, "..."], axes: int = 1) -> Float[Array, "*T O"]:
        """Maps rows of which each shard along `model` has some columns.

        A row may be several axes, which need not lie in one piece.
        """
        matrix = self.matrix.reshape(-1, *x.shape[x.ndim - axes :])
        return self._shifted(total(matmul(x, matrix), MODEL))

    def _shifted(self, y):
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Rows of a [V, D] table; the same table may serve as the LM head."""

    def __init__(self, vocab: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (vocab, width), dtype)
        )
        self.vocab = vocab

    def __call__(self, ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Looks up one row per id, on whichever shard along `model` it is."""
        table = self.weight[...]
        if len(table) == self.vocab:
            return table[ids_T]
        mine_T, here_T = own(ids_T, len(table), MODEL)
        rows_TD = table[jnp.clip(mine_T, 0, len(table) - 1)]
        return total(jnp.where(here_T[:, None], rows_TD, 0), MODEL)
