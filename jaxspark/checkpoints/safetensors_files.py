"""Folders of safetensors: one file, or shards with an index.

The `safetensors` library checks a file's structure (header, offsets without gaps or
overlaps, length); here the files of a folder are checked against the index.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxspark.checkpoints.errors import CheckpointError
from jaxspark.checkpoints.fields import Fields, read_json, write_json
from jaxspark.checkpoints.tree import Tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
    return Tensors(
        where=str(folder),
        shapes={
            name: tuple(files[file_name].get_slice(name).get_shape())
            for name, file_name in owners.items()
        },
        read=lambda name: _read(folder, files[owners[name]], name),
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


def _read(folder: Path, file, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except Exception as error:  # The library raises several kinds for unknown types.
        kind = file.get_slice(name).get_dtype()
        raise CheckpointError(
            f"{folder}: tensor {name} of type {kind} cannot be read ({error})"
        ) from error


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
    folder: Path, arrays: Mapping[str, jax.Array | np.ndarray], *, shard_bytes: int
) -> None:
    """Writes arrays as one file, or as indexed shards of at most `shard_bytes`."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, array in arrays.items():
        if shards[-1] and array.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= array.nbytes
    # transformers refuses files that do not say which framework wrote them.
    metadata = {"format": "pt"}
    if len(shards) == 1:
        host = {name: np.asarray(array) for name, array in arrays.items()}
        save_file(host, folder / SINGLE, metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        host = {name: np.asarray(arrays[name]) for name in names}
        save_file(host, folder / file_name, metadata=metadata)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(array.nbytes for array in arrays.values())
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
