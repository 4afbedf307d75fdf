"""Models as arguments of programs that a host calls over and over.

JAX flattens the arguments of every call. A model is hundreds of modules, which Flax
flattens in Python: milliseconds, as long as a round takes on a fast device. A flattened
model is a list of arrays, and what makes a model of it is known to the program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax


def flattened[T](tree: T) -> T:
    """What stands for a tree in calls of `unflattens` programs, and there alone."""
    leaves, structure = jax.tree.flatten(tree)
    return cast(T, _Flattened(leaves, _shared(structure)))


def unflattens[**P, T](program: Callable[P, T]) -> Callable[P, T]:
    """Makes a program, to be jitted, take flattened arguments too."""

    @functools.wraps(program)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given = (each.tree if isinstance(each, _Flattened) else each for each in args)
        return program(*cast(Any, given), **kwargs)

    return run


class _Structure:
    """Compared by what it is: equal ones are the same, see `_shared`."""

    def __init__(self, of: jax.tree_util.PyTreeDef):
        self.of = of


# Calls compare structures; those of two copies of a model must not differ.
_shared = functools.cache(_Structure)


@jax.tree_util.register_pytree_node_class
class _Flattened:
    """Leaves, and how they make a tree."""

    def __init__(self, leaves: Sequence[Any], structure: _Structure):
        self._leaves, self._structure = leaves, structure

    @property
    def tree(self) -> Any:
        """What was flattened."""
        return jax.tree.unflatten(self._structure.of, self._leaves)

    def tree_flatten(self) -> tuple[Sequence[Any], _Structure]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(
        cls, structure: _Structure, leaves: Sequence[Any]
    ) -> "_Flattened":
        return cls(leaves, structure)
