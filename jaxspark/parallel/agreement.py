"""What the processes of a job decide: once, and alike on all of them.

Every process runs the same program, and one that takes another branch leaves the others
waiting in a collective. So what depends on a file, a clock or a signal is asked of all
of them, or of process 0, by a function of this module. All processes call it, in the
same order; alone, a process decides for itself and nothing is sent.
"""

from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from jaxspark.parallel.mesh import replicated


def leads() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


@overload
def agreed(value: int) -> int: ...
@overload
def agreed(value: np.ndarray) -> np.ndarray: ...
def agreed(value):
    """What process 0 says: a number of at most 32 bits, or an array."""
    if jax.process_count() == 1:
        return value
    said = np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))
    return int(said) if isinstance(value, int) else said


def everywhere(*flags: bool) -> tuple[bool, ...]:
    """Which flags are true on all processes."""
    if jax.process_count() == 1:
        return flags
    every = multihost_utils.process_allgather(np.array(flags))
    return tuple(bool(each) for each in np.asarray(every).all(axis=0))


def anywhere(flag: bool) -> Bool[Array, ""]:
    """Whether a flag is true on any process; who reads it waits, nobody else does."""
    mesh = jax.sharding.get_mesh()
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    own = np.full(len(where.addressable_devices), flag)
    return _any(jax.make_array_from_process_local_data(where, own))


@jax.jit
def _any(flags: Bool[Array, " N"]) -> Bool[Array, ""]:
    return replicated(jnp.any(flags))


def by_first[T](function: Callable[[], T]) -> T | None:
    """What a function returns that process 0 alone runs; None elsewhere.

    Raises:
      ValueError: it failed there, so that no process goes on; process 0 raises the
        error itself.
    """
    return _settled(function if leads() else None)


def in_turn[T](function: Callable[[], T]) -> T:
    """What a function returns that process 0 runs first, and then all others.

    What it makes on disk the others find there, and do not make a second time.

    Raises:
      ValueError: it failed elsewhere; where it did, the error itself.
    """
    first = by_first(function)
    rest = _settled(None if leads() else function)
    return first if leads() else rest  # type: ignore[return-value]


def _settled[T](function: Callable[[], T] | None) -> T | None:
    """Runs a function where there is one; an error anywhere is one on all processes."""
    result = problem = None
    if function is not None:
        try:
            result = function()
        except Exception as error:
            problem = error
    [fine] = everywhere(problem is None)
    if problem is not None:
        raise problem
    if not fine:
        raise ValueError("another process of this job cannot go on; it says why")
    return result
