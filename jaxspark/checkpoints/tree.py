"""The walk between a checkpoint's tensors and a module's parameters.

Parameter paths joined by dots *are* the checkpoint's names, shapes too. A module is
built abstractly (shapes, no numbers), names and shapes are compared before any tensor
is read, then tensors are read one by one, cast, and put in place.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np
from flax import nnx

from jaxspark.errors import CheckpointError
from jaxspark.parallel.mesh import put, sharding_for

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """A checkpoint's tensors, read on demand.

    Attributes:
      where: the folder or file, for errors.
      shapes: shape of every tensor by name.
      read: the array of a name, in its stored float type or dequantized to float32.
      types: how safetensors calls each tensor's type; empty for other files.
      blocks: reads the elements and scales of a tensor that is stored in blocks.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    types: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = field(
        default_factory=dict
    )

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors that `names` (new to old) lists, under their new names."""

        def under_new[T](values: Mapping[str, T]) -> dict[str, T]:
            return {new: values[old] for new, old in names.items() if old in values}

        return Tensors(
            where=self.where,
            shapes={new: self.shapes[old] for new, old in names.items()},
            read=lambda new: self.read(names[new]),
            types=under_new(self.types),
            blocks=under_new(self.blocks),
        )


def named_parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Every array of a module (parameters and buffers) by its dotted path."""
    state = nnx.split(module)[1]
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(state)
    }


def load_module[M: nnx.Module](build: Callable[[], M], tensors: Tensors) -> M:
    """Builds a module and fills it from a checkpoint, cast to the module's types.

    Where a mesh is in use, every parameter goes straight into its shards.

    Args:
      build: makes the module, e.g. `lambda: DenseDecoder(config, rngs=nnx.Rngs(0))`;
        only traced, so nothing is allocated or drawn.
      tensors: the checkpoint under the module's names.

    Raises:
      CheckpointError: tensors missing, extra, of another shape or type, or not finite;
        lists the first few with expected and seen shapes.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    flat = nnx.to_flat_state(state)
    places = {".".join(map(str, path)): variable for path, variable in flat}
    compare({name: tuple(v.shape) for name, v in places.items()}, tensors)

    # The mesh in use is this thread's.
    where = {name: sharding_for(name, v.shape) for name, v in places.items()}

    def read(name: str) -> jax.Array:
        return put(checked(name, tensors, places[name].dtype), where[name])

    # NumPy casts and dequantizes outside the interpreter lock; a few threads suffice.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        arrays = list(pool.map(read, places))
    filled = [
        (path, variable.replace(array))
        for (path, variable), array in zip(flat, arrays, strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_depth(tensors: Tensors, layers: int) -> None:
    """Raises `CheckpointError` unless tensors `layers.<i>.` exist for each of `layers`.

    To be called before a module is built: a damaged layer count may be in the billions.
    """
    seen = {n.split(".")[1] for n in tensors.shapes if n.startswith("layers.")}
    if len(seen) != layers:
        raise CheckpointError(
            f"{tensors.where}: the configuration says {layers} layers, but there are "
            f"tensors missing or extra: they make {len(seen)} layers"
        )


def compare(expected: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    """Names and shapes must be the same, neither more nor fewer."""
    seen = tensors.shapes
    missing = [f"{name} {expected[name]}" for name in expected if name not in seen]
    extra = [f"{name} {seen[name]}" for name in seen if name not in expected]
    wrong = [
        f"{name} expected {expected[name]}, found {seen[name]}"
        for name in expected
        if name in seen and seen[name] != expected[name]
    ]
    problems = [
        f"{len(items)} tensors {what}: {_some(items)}"
        for what, items in (
            ("missing", missing),
            ("not part of the model", extra),
            ("of the wrong shape", wrong),
        )
        if items
    ]
    if problems:
        raise CheckpointError(f"{tensors.where}: " + "; ".join(problems))


def _some(items: list[str]) -> str:
    shown = "; ".join(items[:_SHOWN])
    hidden = len(items) - _SHOWN
    return f"{shown}; and {hidden} more" if hidden > 0 else shown


def checked(name: str, tensors: Tensors, dtype) -> np.ndarray:
    """One tensor, cast to `dtype` and checked."""
    dtype = np.dtype(dtype)
    array = tensors.read(name)
    if np.issubdtype(dtype, np.integer):
        if not np.issubdtype(array.dtype, np.integer):
            raise CheckpointError(
                f"{tensors.where}: {name} has type {array.dtype}, expected integers"
            )
        return array.astype(dtype)
    if array.dtype.name not in _FLOATS:
        raise CheckpointError(
            f"{tensors.where}: {name} has type {array.dtype}, expected one of {_FLOATS}"
        )
    # Overflow shows as infinity below, with a better message than NumPy's warning.
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(dtype, copy=False)
    if not all_finite(array):
        raise CheckpointError(
            f"{tensors.where}: {name} holds infinities or NaN (as {dtype})"
        )
    return array


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is infinite or NaN."""
    if array.dtype.name == "bfloat16":
        # All exponent bits set; ml_dtypes' own isfinite is ten times slower.
        return not bool(((array.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array).all())
