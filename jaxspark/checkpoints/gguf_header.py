"""The header of a GGUF file: metadata and where each tensor lies.

    magic "GGUF" · version · tensor count · key count · keys with typed values ·
    name, shape, type, offset of each tensor · padding · tensor data

Types, block sizes and dequantization are the `gguf` library's. The header itself is
walked here: every length is checked against the file's end, so a truncated or foreign
file is named as such, and a vocabulary of 49,152 strings takes 0.1 s instead of 3.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from jaxspark.errors import CheckpointError

_VERSIONS = (2, 3)
_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """One stored tensor.

    Attributes:
      shape: its shape, slowest axis first (GGUF stores the fastest first).
      kind: its storage type.
      start: position of its first byte in the file.
      size: how many bytes it takes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A parsed GGUF file; `data` maps its bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: mmap.mmap

    def bytes_of(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, [rows, bytes per row] (a view of the file)."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self.data, np.uint8, tensor.size, tensor.start)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header and maps the data.

    Raises:
      CheckpointError: the file is absent, foreign, truncated, or inconsistent.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file.
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    cursor = _Cursor(path, data)
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path}: does not begin with GGUF; not a GGUF file")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path}: GGUF version is {version}, expected one of {_VERSIONS} "
            "(little-endian)"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{path}: metadata key {key} occurs twice")
        metadata[key] = cursor.value(cursor.value_type(key), key)
    places = {}
    for _ in range(tensor_count):
        name = cursor.text()
        if name in places:
            raise CheckpointError(f"{path}: tensor {name} occurs twice")
        places[name] = _tensor(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(
            f"{path}: general.alignment is {alignment}, expected a positive integer"
        )
    base = -(-cursor.position // alignment) * alignment
    tensors = {
        name: GGUFTensor(shape=shape, kind=kind, start=base + offset, size=size)
        for name, (shape, kind, offset, size) in places.items()
    }
    _check_extents(path, tensors, len(data))
    return GGUFFile(path=path, metadata=metadata, tensors=tensors, data=data)


def _tensor(cursor: "_Cursor", name: str):
    """Shape, type, offset and size of one tensor from its entry in the header."""
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has {dimensions} dimensions, expected 1 to "
            f"{_MOST_DIMENSIONS}"
        )
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    code, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has unknown type {code}"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has the empty shape {shape}"
        )
    if shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has rows of {shape[-1]}, expected a "
            f"multiple of {block} for {kind.name}"
        )
    return shape, kind, offset, math.prod(shape) // block * block_bytes


def _check_extents(path: Path, tensors: dict[str, GGUFTensor], length: int) -> None:
    """Tensors lie in the file and do not overlap."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise CheckpointError(f"{path}: tensors {before} and {name} overlap")
        end, before = tensor.start + tensor.size, name
        if end > length:
            raise CheckpointError(
                f"{path}: is truncated: tensor {name} ends at byte {end}, the file at "
                f"{length}"
            )


class _Cursor:
    """Reads typed values in turn; running past the end is a `CheckpointError`."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path}: is truncated or damaged: its header needs byte {end}, "
                f"the file ends at {len(self.data)}"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: is damaged: a string before byte {self.position} is not "
                "UTF-8"
            ) from error

    def value_type(self, key: str) -> GGUFValueType:
        code = self.number("I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: metadata key {key} has unknown type {code}"
            ) from None

    def value(self, kind: GGUFValueType, key: str) -> Any:
        """A number, a string, or a list of either (lists do not nest)."""
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(_NUMBERS[kind])
        item, count = self.value_type(key), self.number("Q")
        if item == GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.path}: metadata key {key} nests arrays")
        if item == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        size = struct.calcsize("<" + _NUMBERS[item])
        return list(struct.unpack(f"<{count}{_NUMBERS[item]}", self.take(count * size)))
