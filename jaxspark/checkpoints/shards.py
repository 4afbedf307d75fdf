"""Parameters put together from the tensors of a file, each shard from its own part.

A parameter may be made of many tensors (experts are stored one by one), and lie on many
devices. A tensor is read once, only where a shard of this process needs some of it, and
written into the shards where they lie; so the host never holds more than a tensor at a
time, and no device more than its own shards.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# First and last index, the last not included, along every axis.
type Box = tuple[tuple[int, int], ...]


class Assembly:
    """An array that is being put together."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        where: jax.sharding.Sharding | None = None,
    ):
        """Makes its shards, full of zeros.

        Args:
          shape: of the array.
          dtype: of the array; parts are cast.
          where: how it is sharded; None leaves it on the default device.
        """
        self.shape, self._where = tuple(shape), where
        self._devices: dict[Box, list[Any]] = {}
        if where is None:
            self._devices[tuple((0, size) for size in shape)] = [None]
        else:
            indices = where.addressable_devices_indices_map(self.shape)
            for device, index in indices.items():
                slices = index or ()
                box = tuple(
                    (each.indices(size)[0], each.indices(size)[1])
                    for each, size in zip(slices, shape)
                )
                self._devices.setdefault(box, []).append(device)
        self._shards = {
            box: jnp.zeros(
                [end - begin for begin, end in box], dtype, device=devices[0]
            )
            for box, devices in self._devices.items()
        }

    def wants(self, start: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether a part that begins at `start` belongs to a shard of this process."""
        part = self._part(start, shape)
        return any(_common(box, part) is not None for box in self._shards)

    def add(self, start: Sequence[int], numbers: np.ndarray) -> None:
        """Puts a part in its place; it may have fewer axes, the last ones."""
        part = self._part(start, numbers.shape)
        numbers = numbers.reshape([end - begin for begin, end in part])
        for box, devices in self._devices.items():
            if (common := _common(box, part)) is not None:
                cut = numbers[_slices(common, part)]
                place = [begin - first for (begin, _), (first, _) in zip(common, box)]
                moved = jax.device_put((cut, np.array(place, np.int32)), devices[0])
                # Each shard by itself, not as a program over the mesh.
                with jax.set_mesh(None):
                    self._shards[box] = _put(self._shards[box], *moved)

    def finish(self) -> jax.Array:
        """The array; what was not added is 0."""
        if self._where is None:
            [array] = self._shards.values()
            return array
        copies = [
            jax.device_put(self._shards[box], device)
            for box, devices in self._devices.items()
            for device in devices
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self._where, copies)

    def _part(self, start: Sequence[int], shape: Sequence[int]) -> Box:
        shape = (1,) * (len(self.shape) - len(shape)) + tuple(shape)
        return tuple((begin, begin + size) for begin, size in zip(start, shape))


def _common(box: Box, part: Box) -> Box | None:
    """What two boxes share; None if nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, part))
    return common if all(begin < end for begin, end in common) else None


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where an inner box lies in an outer one."""
    return tuple(
        slice(begin - first, end - first)
        for (begin, end), (first, _) in zip(inner, outer)
    )


@partial(jax.jit, donate_argnums=0)
def _put(array, numbers, start):
    """The array with a part in its place; the old one's memory is used again."""
    return jax.lax.dynamic_update_slice(array, numbers.astype(array.dtype), start)
