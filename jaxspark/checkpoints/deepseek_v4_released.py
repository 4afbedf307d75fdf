"""The released storage of DeepSeek-V4: which tensor is kept in which type.

Large matrices are FP8 with a scale for 128 x 128 elements, routed experts FP4 with one
for 32 (see `jaxspark.quantization.blocks`), routing tables int64, what is computed in
float32 stays float32, all else is bfloat16. A matrix `x.weight` has its scales beside
it in `x.scale`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from jaxspark.checkpoints.tree import Tensors
from jaxspark.errors import CheckpointError
from jaxspark.quantization import blocks
from pallas_kernels.quantized import LARGEST_SCALE

_FP4 = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
_FP8 = re.compile(
    r"(\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|\.indexer\.wq_b|\.shared_experts\.w[123]"
    r"|\.(e_proj|h_proj|main_proj))\.weight$"
)
_FLOAT32 = re.compile(r"(hc_\w+|attn_sink|\.ape|\.gate\.bias)$")
_INT64 = re.compile(r"\.tid2eid$")


@dataclass(frozen=True)
class Stored:
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def storage(name: str, *, expert_dtype: str = "fp4") -> str:
    """How a tensor is stored: "fp4", "fp8", "float32", "int64" or "bfloat16"."""
    if _FP4.search(name):
        return expert_dtype
    for kind, pattern in (("fp8", _FP8), ("float32", _FLOAT32), ("int64", _INT64)):
        if pattern.search(name):
            return kind
    return "bfloat16"


def scale_name(name: str) -> str:
    """Name of a matrix's scales."""
    return name.removesuffix("weight") + "scale"


def inventory(
    shapes: Mapping[str, tuple[int, ...]], *, expert_dtype: str = "fp4"
) -> dict[str, Stored]:
    """Every tensor of the files, scales included, from shapes of the plain ones."""
    found = {}
    for name, shape in shapes.items():
        kind = storage(name, expert_dtype=expert_dtype)
        if kind == "fp8":
            scales = blocks.fp8_scale_shape(*shape)
            found[name] = Stored(shape, np.dtype(blocks.FP8))
            found[scale_name(name)] = Stored(scales, np.dtype(blocks.SCALE))
        elif kind == "fp4":
            rows, columns = shape
            scales = (rows, columns // blocks.FP4_BLOCK)
            found[name] = Stored((rows, columns // 2), np.dtype(np.int8))
            found[scale_name(name)] = Stored(scales, np.dtype(blocks.SCALE))
        else:
            plain = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
            found[name] = Stored(shape, np.dtype(plain))
    return found


def stored(
    tensors: Iterable[tuple[str, np.ndarray]], *, expert_dtype: str = "fp4"
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as the files hold them, each followed by its scales."""
    for name, array in tensors:
        kind = storage(name, expert_dtype=expert_dtype)
        if kind in ("fp4", "fp8"):
            quantize = blocks.quantize_fp4 if kind == "fp4" else blocks.quantize_fp8
            elements, scales = quantize(np.asarray(array, np.float32))
            yield name, elements
            yield scale_name(name), scales
        else:
            plain = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
            yield name, np.asarray(array).astype(plain)


def dequantized(tensors: Tensors) -> Tensors:
    """The same tensors without scales: matrices are float32 when they are read.

    What the files hold of a matrix is read by `blocks`.

    Raises:
      CheckpointError: a scale is missing, has no matrix or the wrong shape; names both.
    """
    shapes, scaled = {}, {}
    for name, shape in tensors.shapes.items():
        kind = tensors.types.get(name)
        if kind == "F8_E8M0":
            continue
        if kind in ("I8", "F8_E4M3"):
            scaled[name] = _scale_of(name, shape, kind == "I8", tensors)
        shapes[name] = (shape[0], 2 * shape[1]) if kind == "I8" else shape
    used = set(scaled.values())
    for name, kind in tensors.types.items():
        if kind == "F8_E8M0" and name not in used:
            raise CheckpointError(f"{tensors.where}: {name} scales no matrix")

    def in_blocks(name: str) -> tuple[np.ndarray, np.ndarray]:
        elements, scales = tensors.read(name), tensors.read(scaled[name])
        if (scales.view(np.uint8) > LARGEST_SCALE).any():
            raise CheckpointError(
                f"{tensors.where}: {scaled[name]} holds NaN or more than 2^126"
            )
        if elements.dtype == blocks.FP8 and np.isnan(elements).any():
            raise CheckpointError(f"{tensors.where}: {name} holds NaN")
        return elements, scales

    def read(name: str) -> np.ndarray:
        if name not in scaled:
            return tensors.read(name)
        elements, scales = in_blocks(name)
        fp4 = elements.dtype == np.int8
        dequantize = blocks.dequantize_fp4 if fp4 else blocks.dequantize_fp8
        return dequantize(elements, scales)

    return Tensors(
        where=tensors.where,
        shapes=shapes,
        read=read,
        types={name: tensors.types[name] for name in shapes if name in tensors.types},
        blocks={name: partial(in_blocks, name) for name in scaled},
    )


def _scale_of(name, shape, fp4, tensors) -> str:
    """The name of a matrix's scales, which are there and fit."""
    beside = scale_name(name)
    if len(shape) != 2:
        raise CheckpointError(
            f"{tensors.where}: {name} has shape {shape}, expected a matrix"
        )
    if beside not in tensors.shapes:
        raise CheckpointError(
            f"{tensors.where}: {name} is quantized, but its scales {beside} are missing"
        )
    rows, columns = shape
    expected = (
        (rows, 2 * columns // blocks.FP4_BLOCK)
        if fp4
        else blocks.fp8_scale_shape(rows, columns)
    )
    if tensors.shapes[beside] != expected:
        raise CheckpointError(
            f"{tensors.where}: {beside} has shape {tensors.shapes[beside]}, expected "
            f"{expected} for {name} {shape}"
        )
    return beside
