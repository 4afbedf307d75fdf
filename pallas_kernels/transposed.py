"""Block-scaled matrices turned over, so that a TPU can multiply with them as they are.

DeepSeek's files hold FP8 and FP4 matrices by output: [O, I], with pairs of FP4 along I
(`quantized`). Matrix units take weights by input, a TPU before v7 has no arithmetic for
either type, and a decode step leaves it some six vector instructions for 2,048 weights
until memory has the next ones. So matrices are turned over once, when they are loaded:

    FP8   [I, O]     E4M3 with bias 11 in place of 7, which vector units widen
    FP4   [I/2, O]   of 128 rows i, byte row j holds rows j and j + 64, as s m 0 e e ...

Bits of a byte, s for signs, e and m for exponents and mantissas of E2M1:

    7    6    5    4    3    2    1    0
    s_j  m_j  s'   e_j  e_j  e'   e'   m'       ' is row j + 64

Either number is one of E4M3 with bias 11, times 2^10, after a mask and a shift: E2M1's
mantissa is E4M3's highest, its subnormal numbers are subnormal there. That type has
no -0, so none is kept. A scale stands for 32 rows (FP4) or 128 (FP8) of one column.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.quantized import FP4_BLOCK, FP8_BLOCK, Quantized

CHUNK = 128
FP8 = jnp.float8_e4m3b11fnuz
# What elements read as that type are to be multiplied with, as exponents of 2.
_FP4_SHIFT, _FP8_SHIFT = 10, 4
# 2^117: with its shift, the largest scale that float32 holds.
LARGEST_SCALE = 254 - _FP4_SHIFT


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed(Quantized):
    """Matrices [..., O, I], turned over; I is a multiple of 128.

    Attributes:
      elements: FP8 [..., I, O], or pairs of FP4 as uint8 [..., I/2, O].
      scales: uint8 [..., I/128, O] or [..., I/32, O], at most 2^117.
      dtype: of the dequantized matrices.
    """

    @property
    def packed(self) -> bool:
        """Whether a byte holds two elements."""
        return self.elements.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        *lead, width, rows = self.elements.shape
        return *lead, rows, 2 * width if self.packed else width

    @property
    def block(self) -> int:
        """Rows of a column that share a scale."""
        return FP4_BLOCK if self.packed else FP8_BLOCK

    def dense(self) -> Float[Array, "... O I"]:
        """The matrices themselves."""
        elements = self.elements
        if self.packed:
            *lead, half, rows = elements.shape
            chunks = elements.reshape(*lead, -1, CHUNK // 2, rows)
            pair = [jax.lax.bitcast_convert_type(x, FP8) for x in halves(chunks)]
            elements = jnp.concatenate(pair, -2).reshape(*lead, 2 * half, rows)
        scales = jnp.repeat(factors(self.scales, self.packed), self.block, -2)
        w = elements.astype(jnp.float32) * scales
        return w.swapaxes(-1, -2).astype(self.dtype)


def halves(byte: Any) -> tuple[Any, Any]:
    """Both elements of pairs as E4M3 with bias 11, in any integers that hold bytes."""
    repeat = sum(1 << 8 * i for i in range(byte.dtype.itemsize))

    def mask(bits):
        return np.array(bits * repeat, f"u{byte.dtype.itemsize}").view(byte.dtype)

    def shift(by):
        return np.array(by, byte.dtype)

    down, up = jax.lax.shift_right_logical, jax.lax.shift_left
    first = (byte & mask(0x98)) | (down(byte, shift(4)) & mask(0x04))
    return first, up(byte, shift(2)) & mask(0x9C)


def factors(scales: Any, packed: bool) -> Float[Array, "..."]:
    """What to multiply elements with, read as E4M3 with bias 11."""
    exponents = scales.astype(jnp.int32) + (_FP4_SHIFT if packed else _FP8_SHIFT)
    return jax.lax.bitcast_convert_type(exponents << 23, jnp.float32)


def fits(rows: int, columns: int) -> bool:
    """Whether matrices [rows, columns] can be turned over for the kernel."""
    return rows % CHUNK == 0 and columns % CHUNK == 0


def transpose(elements: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Elements and scales of `Transposed`, of one matrix on the host.

    Args:
      elements: as in `Quantized`: FP8 [O, I] or pairs of FP4 as int8 [O, I/2].
      scales: [ceil(O/128), ceil(I/128)] or [O, I/32], UE8M0 as bytes.

    Raises:
      ValueError: I is not a multiple of 128, or a scale is above 2^117.
    """
    packed = elements.dtype == np.int8
    rows, columns = len(elements), elements.shape[1] * (1 + packed)
    if columns % CHUNK:
        raise ValueError(f"rows of {columns} elements are no multiple of {CHUNK} long")
    byte, scale = elements.view(np.uint8).T, scales.view(np.uint8).T
    if scale.max(initial=0) > LARGEST_SCALE:
        raise ValueError(
            f"a scale of 2^{scale.max() - 127} is above 2^{LARGEST_SCALE - 127}; "
            "dequantize these matrices instead"
        )
    if not packed:
        positive = np.where(byte == 0x80, 0, byte).astype(np.uint8)
        scale = np.repeat(scale, FP8_BLOCK, 1)[:, :rows]
        return positive.view(FP8), np.ascontiguousarray(scale)
    nibble = np.stack([byte & 0xF, byte >> 4], 1).reshape(-1, 2, CHUNK // 2, rows)
    nibble = np.where(nibble == 8, 0, nibble)
    first, second = nibble[:, 0], nibble[:, 1]
    pairs = (first & 8) << 4 | (first & 1) << 6 | (first & 6) << 2
    pairs = pairs | (second & 8) << 2 | second & 7
    return pairs.reshape(-1, rows).astype(np.uint8), np.ascontiguousarray(scale)


def transposed(w: Quantized) -> Transposed:
    """The same matrices, turned over on the host, one after the other."""
    lead = w.elements.shape[:-2]
    pairs = [
        transpose(np.asarray(w.elements[at]), np.asarray(w.scales[at]))
        for at in np.ndindex(*lead)
    ]
    elements, scales = (np.stack(parts) for parts in zip(*pairs))
    elements, scales = (x.reshape(*lead, *x.shape[1:]) for x in (elements, scales))
    return Transposed(jnp.asarray(elements), jnp.asarray(scales), w.dtype)


__all__ = ["LARGEST_SCALE", "Transposed", "fits", "halves", "transpose", "transposed"]
