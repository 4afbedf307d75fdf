"""Block-scaled FP8 and FP4 on the host, as DeepSeek-V4's released files hold them.

The format is that of `pallas_kernels.quantized`, where matrices stay so on the device;
the scale byte 255 is NaN. Scales are rounded up, so no element overflows:
2^ceil(log2(max / largest)).
"""

import ml_dtypes
import numpy as np

from pallas_kernels.quantized import FP4_BLOCK, FP8_BLOCK

FP8, FP4, SCALE = (
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float8_e8m0fnu,
)
_FP8_MAX, _FP4_MAX = 448.0, 6.0
_BIAS = 127
# Elements by their four bits: the sign, two bits of exponent, one of mantissa.
_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4_VALUES, -_FP4_VALUES])


def fp8_scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of an FP8 matrix."""
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def quantize_fp8(w_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elements [O, I] and scales [ceil(O/128), ceil(I/128)] of a matrix."""
    rows, columns = w_OI.shape
    blocks = fp8_scale_shape(rows, columns)
    padded = np.zeros((blocks[0] * FP8_BLOCK, blocks[1] * FP8_BLOCK), np.float32)
    padded[:rows, :columns] = w_OI
    tiles = padded.reshape(blocks[0], FP8_BLOCK, blocks[1], FP8_BLOCK)
    exponent = _exponent(np.abs(tiles).max(axis=(1, 3)), _FP8_MAX)
    scaled = np.ldexp(tiles, -exponent[:, None, :, None])
    elements = scaled.reshape(padded.shape)[:rows, :columns].astype(FP8)
    return elements, _byte(exponent)


def dequantize_fp8(elements_OI: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix."""
    exponent = _unbyte(scales)
    each = np.repeat(np.repeat(exponent, FP8_BLOCK, 0), FP8_BLOCK, 1)
    rows, columns = elements_OI.shape
    return np.ldexp(elements_OI.astype(np.float32), each[:rows, :columns])


def quantize_fp4(w_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed elements [O, I/2] (int8) and scales [O, I/32] of a matrix.

    Raises:
      ValueError: rows are not a multiple of 32 long.
    """
    rows, columns = w_OI.shape
    if columns % FP4_BLOCK:
        raise ValueError(f"FP4 rows come in blocks of 32, got {columns} columns")
    tiles = w_OI.astype(np.float32).reshape(rows, -1, FP4_BLOCK)
    exponent = _exponent(np.abs(tiles).max(axis=2), _FP4_MAX)
    scaled = np.ldexp(tiles, -exponent[..., None]).reshape(rows, columns)
    bits = scaled.astype(FP4).view(np.uint8) & 0xF
    return (bits[:, 0::2] | bits[:, 1::2] << 4).view(np.int8), _byte(exponent)


def dequantize_fp4(packed_OI: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix, twice as wide as its bytes."""
    bits = packed_OI.view(np.uint8)
    both = np.stack([bits & 0xF, bits >> 4], axis=-1).reshape(len(bits), -1)
    exponent = np.repeat(_unbyte(scales), FP4_BLOCK, axis=1)
    return np.ldexp(_FP4_VALUES[both], exponent)


def _exponent(largest, limit):
    """ceil(log2(largest / limit)), exactly; the least exponent for zeros."""
    mantissa, exponent = np.frexp((largest / limit).astype(np.float32))
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = np.where(largest > 0, exponent, -_BIAS)
    return np.clip(exponent, -_BIAS, _BIAS).astype(np.int32)


def _byte(exponent):
    return (exponent + _BIAS).astype(np.uint8).view(SCALE)


def _unbyte(scales):
    return np.asarray(scales).view(np.uint8).astype(np.int32) - _BIAS


__all__ = [
    "FP4",
    "FP8",
    "SCALE",
    "dequantize_fp4",
    "dequantize_fp8",
    "fp8_scale_shape",
    "quantize_fp4",
    "quantize_fp8",
]
