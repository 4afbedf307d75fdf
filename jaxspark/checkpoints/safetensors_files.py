"""Folders of safetensors: one file, or shards with an index.

The `safetensors` library checks a file's structure (header, offsets without gaps or
overlaps, length); here the files of a folder are checked against the index.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxspark.checkpoints.fields import Fields, read_json, write_json
from jaxspark.checkpoints.tree import Tensors
from jaxspark.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Types by safetensors' names that its NumPy interface does not know.
EIGHT_BITS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def open_safetensors(folder: Path) -> Tensors:
    """The tensors of a folder, read on demand.

    Raises:
      CheckpointError: no safetensors here, a truncated or foreign file, a missing
        shard, an index that disagrees with its shards.
    """
    if (folder / SINGLE).exists():
        files = {SINGLE: _open(folder / SINGLE)}
        index = None
    elif (folder / INDEX).exists():
        index = Fields(read_json(folder / INDEX), str(folder / INDEX))
        files = {name: _open(folder / name) for name in _shards(index)}
    else:
        raise CheckpointError(
            f"{folder}: expected {SINGLE} or {INDEX}; other weight formats (.bin, .pt) "
            "can execute code and are never read"
        )
    owners: dict[str, str] = {}
    for file_name, file in files.items():
        for name in file.keys():
            if name in owners:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in both {owners[name]} and {file_name}"
                )
            owners[name] = file_name
    if index is not None:
        _check_index(index, owners, files)
    slices = {name: files[file].get_slice(name) for name, file in owners.items()}
    return Tensors(
        where=str(folder),
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        types={name: part.get_dtype() for name, part in slices.items()},
        read=lambda name: _read(folder / owners[name], files[owners[name]], name),
    )


def _open(path: Path):
    try:
        return safe_open(path, "numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: is not a whole safetensors file ({error})"
        ) from error


def _read(path: Path, file, name: str) -> np.ndarray:
    kind = file.get_slice(name).get_dtype()
    if kind in EIGHT_BITS:
        return _read_raw(path, name, EIGHT_BITS[kind])
    try:
        return file.get_tensor(name)
    except Exception as error:  # The library raises several kinds for unknown types.
        raise CheckpointError(
            f"{path}: tensor {name} of type {kind} cannot be read ({error})"
        ) from error


def _read_raw(path: Path, name: str, dtype) -> np.ndarray:
    """A tensor of a type that the library checks but does not give to NumPy."""
    start, header = _header(path)
    begin, end = header[name]["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + begin)
        data = np.frombuffer(file.read(end - begin), dtype)
    return data.reshape(header[name]["shape"])


def _header(path: Path) -> tuple[int, dict]:
    """Where the data begin, and what lies where."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _shards(index: Fields) -> list[str]:
    """The files that an index names, each a plain name in its folder."""
    weights = index.table("weight_map")
    if weights is None or not weights.values:
        raise index.wrong("weight_map", "tensor names and their files")
    for name, file_name in weights.values.items():
        plain = isinstance(file_name, str) and file_name == Path(file_name).name
        if not plain or not file_name.endswith(".safetensors"):
            raise weights.wrong(name, "the name of a .safetensors file in the folder")
    return sorted(set(weights.values.values()))


def _check_index(index: Fields, owners: Mapping[str, str], files: Mapping) -> None:
    """The index must name exactly the shards' tensors and their total size."""
    weights = index.values["weight_map"]
    for name in sorted({*weights, *owners}):
        said, found = weights.get(name), owners.get(name)
        if said != found:
            raise CheckpointError(
                f"{index.where}: places tensor {name} in {said}, but it is in {found}"
            )
    metadata = index.table("metadata")
    if metadata is None or "total_size" not in metadata:
        return
    slices = [files[file].get_slice(name) for name, file in owners.items()]
    total = sum(_bits(part) for part in slices) // 8
    if metadata.values["total_size"] != total:
        raise metadata.wrong("total_size", f"{total}, the size of the shards' tensors")


def _bits(part) -> int:
    """Size of a tensor in bits; type names carry it (F32, BF16, F8_E4M3, I64)."""
    kind = part.get_dtype()
    digits = kind.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ").split("_")[0]
    width = 8 if kind == "BOOL" else int(digits)
    return int(np.prod(part.get_shape(), dtype=np.int64)) * width


def write_safetensors(
    folder: Path,
    arrays: Iterable[tuple[str, jax.Array | np.ndarray]],
    *,
    shard_bytes: int,
) -> None:
    """Writes named arrays as one file, or as indexed shards of at most `shard_bytes`.

    They are taken one after the other, so no more than a shard is on the host.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = size = 0

    def flush():
        # transformers refuses files that do not say which framework wrote them.
        save_file(pending, folder / _part(len(shards)), metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, array in arrays:
        host = np.asarray(array, order="C")
        if pending and size + host.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = host
        size += host.nbytes
        total += host.nbytes
    flush()
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _part(number: int) -> str:
    """A shard's name while their number is unknown."""
    return f"part-{number}.safetensors"
