"""Rows of a batch: each process makes, holds and feeds those of its own shards.

Rows lie along `data` and `expert` like slots. A process need not have the others' rows:
arrays over all processes are put together from what each has.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

from jaxspark.parallel.axes import SLOTS
from jaxspark.parallel.mesh import mesh_in_use, slot_shards


def row_sharding() -> NamedSharding | None:
    """Where the rows of an array lie on the mesh in use; None without one."""
    if mesh_in_use() is None:
        return None
    return NamedSharding(jax.sharding.get_mesh(), PartitionSpec(SLOTS))


def own_rows(count: int) -> Int[np.ndarray, " P"]:
    """Which of a batch's rows are this process's, ascending; all without a mesh.

    Raises:
      ValueError: they cannot be shared out evenly.
    """
    if count % slot_shards():
        raise ValueError(
            f"{count} sequences of a batch cannot be shared out evenly over "
            f"{slot_shards()} shards"
        )
    where, every = row_sharding(), np.arange(count)
    if where is None:
        return every
    parts = where.addressable_devices_indices_map((count,)).values()
    # Shards along `model` have the same rows.
    return np.unique(np.concatenate([every[part] for part in parts]))


def from_own_rows[T](tree: T) -> T:
    """Arrays of all rows, of what each process has of its own ones."""
    where = row_sharding()
    if where is None:
        return tree
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(where, np.asarray(rows)),
        tree,
    )


def read_own_rows(tree: Any) -> Any:
    """This process's rows of arrays that lie in shards by their rows."""
    return jax.tree.map(_read, tree)


def _read(array: jax.Array) -> Shaped[np.ndarray, "P ..."]:
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {each.index[0].start or 0: each.data for each in array.addressable_shards}
    return np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])


def abstract_rows(tree: Any) -> Any:
    """Shapes of arrays of all rows, in their shards."""
    where = row_sharding()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )
