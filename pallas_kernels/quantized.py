"""Matrices in block-scaled FP8 or FP4 as operands, dequantized where they are used.

A number is element * 2^(byte - 127), and a block of elements shares the byte (UE8M0):

    FP8   E4M3, one scale for 128 x 128 elements
    FP4   E2M1, two in a byte, the earlier one low; one scale for 32 along a row

Each number is one of bfloat16 too, so only quantizing has rounded.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

FP8_BLOCK, FP4_BLOCK = 128, 32
# 2^126: the elements of a block with a larger scale leave the range of float32.
LARGEST_SCALE = 253


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Matrices [..., O, I]; a pytree whose two leaves have the same leading axes.

    Attributes:
      elements: FP8 [..., O, I], or pairs of FP4 as int8 [..., O, I/2].
      scales: [..., ceil(O/128), ceil(I/128)] or [..., O, I/32], at most 2^126.
      dtype: of the dequantized matrices.
    """

    elements: Shaped[Array, "... O J"]
    scales: UInt8[Array, "... P Q"]
    dtype: Any = field(metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether a byte holds two elements."""
        return self.elements.dtype == jnp.int8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        *lead, width = self.elements.shape
        return *lead, 2 * width if self.packed else width

    def __getitem__(self, index) -> "Quantized":
        """Some of the matrices, by their leading axes."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def dense(self) -> Float[Array, "... O I"]:
        """The matrices themselves."""
        # 2^(byte - 126) is a normal number for all bytes, 2^(byte - 127) is not.
        exponents = (self.scales.astype(jnp.uint32) + 1) << 23
        scales = jax.lax.bitcast_convert_type(exponents, jnp.float32)
        if self.packed:
            halves = 0.5 * _fp4(self.elements)
            w = halves * jnp.repeat(scales, FP4_BLOCK, -1)
        else:
            rows, columns = self.shape[-2:]
            halves = 0.5 * self.elements.astype(jnp.float32)
            scales = jnp.repeat(scales, FP8_BLOCK, -2)[..., :rows, :]
            w = halves * jnp.repeat(scales, FP8_BLOCK, -1)[..., :columns]
        return w.astype(self.dtype)


def dense(w: Float[Array, "..."] | Quantized) -> Float[Array, "..."]:
    """An array as it is, quantized matrices dequantized."""
    return w.dense() if isinstance(w, Quantized) else w


def _fp4(packed: Shaped[Array, "... J"]) -> Float[Array, "... I"]:
    """E2M1 elements in float32: a sign, two bits of exponent, one of mantissa."""
    byte = packed.astype(jnp.uint8)
    bits = jnp.stack([byte & 0xF, byte >> 4], -1).reshape(*byte.shape[:-1], -1)
    exponent, mantissa = (bits >> 1) & 3, bits & 1
    normal = (2 + mantissa) << jnp.maximum(exponent, 1) - 1
    twice = jnp.where(exponent == 0, mantissa, normal).astype(jnp.float32)
    return jnp.where(bits >= 8, -0.5, 0.5) * twice
