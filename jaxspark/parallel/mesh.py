"""Meshes, and programs that run on all their devices.

    with jax.set_mesh(make_mesh("data:2,expert:4")):
        target = load_target("a/folder")
        completions = generate(target, prompts, drafter)

The mesh in use is JAX's own. Where there is one, the functions of the decode loop run
inside one `shard_map`: every shard packs its own slots into its own flat tokens, and
what all must agree on goes through the helpers of `axes`. The same functions inside a
caller's own `shard_map` find the axes mapped over and leave it at that.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspark.parallel.axes import (
    DATA,
    EXPERT,
    EXPERTS,
    MODEL,
    SLOTS,
    Axes,
    axis_names,
)
from jaxspark.parallel.rules import parameter_specs, replicated_specs, rule_for

AXES = (DATA, EXPERT, MODEL)
# Numbers of a configuration that have to be shared out evenly.
_SHARED: tuple[tuple[str, str, Axes], ...] = (
    ("n_routed_experts", "experts", EXPERTS),
    ("num_attention_heads", "attention heads", MODEL),
    ("num_key_value_heads", "key/value heads", MODEL),
    ("o_groups", "output groups", MODEL),
    ("intermediate_size", "hidden units", MODEL),
    ("vocab_size", "tokens of the vocabulary", MODEL),
    ("draft_vocab_size", "tokens of the draft vocabulary", MODEL),
)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of a mesh's axes, of a text such as "data:4,expert:16".

    Raises:
      ValueError: an axis that is unknown or named twice, or a size below 1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition(":")
        if name not in AXES or name in sizes:
            raise ValueError(
                f"mesh {text!r}: expected sizes of {', '.join(AXES)}, each at most "
                f"once, such as data:2,expert:4; got {part!r}"
            )
        if not size.isdecimal() or not int(size):
            raise ValueError(f"mesh {text!r}: {name} must be at least 1, got {size!r}")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, expert and model, to be used by `jax.set_mesh`.

    Args:
      text: sizes of its axes; those that are not named have one shard.
      devices: as many as the mesh has shards; None takes all there are.

    Raises:
      ValueError: sizes that cannot be read, or that do not make the devices.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else list(devices)
    shards = int(np.prod(list(sizes.values())))
    if shards != len(devices):
        raise ValueError(
            f"mesh {text!r} has {shards} shards, there are {len(devices)} devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def check_mesh(config: Any, mesh: Any = None) -> None:
    """Whether a model or drafter can be shared out over a mesh.

    Args:
      config: it, or its configuration.
      mesh: None takes the one in use, if any.

    Raises:
      ValueError: it cannot; names what and the axes.
    """
    mesh = mesh or mesh_in_use()
    if mesh is None or config is None:
        return
    for name, what, axes in _SHARED:
        count = getattr(config, name, None)
        if isinstance(count, int):
            _check_even(count, what, axes, mesh)
    # A drafter's configuration has those of its layers, a hybrid its model.
    for part in ("config", "model", "backbone", "target"):
        check_mesh(getattr(config, part, None), mesh)


def _check_even(count: int, what: str, axes: Axes, mesh: Any) -> None:
    names = axis_names(axes)
    shards = _product(mesh, names)
    if count % shards:
        sizes = " x ".join(f"{name} {mesh.shape[name]}" for name in names)
        raise ValueError(f"{count} {what} cannot be shared out evenly over {sizes}")


def slot_shards() -> int:
    """Shards of the mesh in use that have slots of their own; 1 without a mesh."""
    mesh = mesh_in_use()
    return 1 if mesh is None else _product(mesh, SLOTS)


def slots_per_shard(slots: int) -> int:
    """Slots of each shard of the mesh in use.

    Raises:
      ValueError: they cannot be shared out evenly.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return slots
    _check_even(slots, "slots", SLOTS, mesh)
    return slots // slot_shards()


def _product(mesh: Any, names: Sequence[str]) -> int:
    return int(np.prod([mesh.shape[name] for name in names]))


def mesh_in_use() -> Any:
    """The abstract mesh whose shards what is traced or made now is for; else None.

    Inside a `shard_map` over it there is none: everything is one shard's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_names) != set(AXES) or mesh.manual_axes:
        return None
    return mesh


# Shardings of an argument's leaves, in their places.
Specs = Callable[[Any], Any]


# Of a result: whose argument's it is, or a sharding, or a tree of either.
Out = int | PartitionSpec | tuple[Any, ...]


def over_mesh(*kinds: Specs, out: Out):
    """Decorates a function of arrays to run on every shard of the mesh in use.

    Args:
      *kinds: how each positional argument is shared out: `parameter_specs`,
        `state_specs` or `replicated_specs`. Keywords are static.
      out: the argument whose kind and structure the result has, or the shardings of
        what is in it; of several results, a tuple of these.
    """

    def decorate[**P, T](function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*arguments: P.args, **keywords: P.kwargs) -> T:
            if mesh_in_use() is None:
                return function(*arguments, **keywords)
            given = signature.bind(*arguments, **keywords)
            given.apply_defaults()
            specs = tuple(kind(each) for kind, each in zip(kinds, given.args))
            shard: Callable[..., T] = functools.partial(function, **given.kwargs)
            program = jax.shard_map(
                shard,
                in_specs=specs,
                out_specs=jax.tree.map(
                    lambda each: specs[each] if isinstance(each, int) else each,
                    out,
                    is_leaf=lambda each: isinstance(each, PartitionSpec),
                ),
                check_vma=False,
            )
            return program(*given.args)

        return run

    return decorate


def create[T](make: Callable[[], T], specs: Specs) -> T:
    """What a function makes, in shards from the start.

    Args:
      make: takes nothing and returns arrays.
      specs: how they are shared out.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return make()
    shapes = jax.eval_shape(make)
    return jax.jit(make, out_shardings=specs(shapes))()


def sharding_for(path: str, shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a parameter of a path lies on the mesh in use; None without one."""
    if mesh_in_use() is None:
        return None
    return NamedSharding(jax.sharding.get_mesh(), rule_for(path).spec(shape))


def shard[ModelT](model: ModelT) -> ModelT:
    """A model or drafter, its parameters in shards of the mesh in use, if any.

    Raises:
      ValueError: they cannot be shared out.
    """
    if mesh_in_use() is None:
        return model
    check_mesh(model)
    return place(model, parameter_specs)


def place[T](tree: T, specs: Specs) -> T:
    """Arrays in shards of the mesh in use, if any.

    Every process has them whole, or they lie in shards already.
    """
    if mesh_in_use() is None:
        return tree
    mesh = jax.sharding.get_mesh()

    def placed(leaf, spec):
        where = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.Array):
            if where.is_equivalent_to(leaf.sharding, leaf.ndim):
                return leaf
            if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                return jax.device_put(leaf, where)
        return put(np.asarray(leaf), where)

    return jax.tree.map(placed, tree, specs(tree))


def put(numbers: np.ndarray, where: jax.sharding.Sharding | None) -> jax.Array:
    """A host's array on its devices; each process gives its own their shards."""
    if where is None:
        return jax.device_put(numbers)
    return jax.make_array_from_callback(
        numbers.shape, where, lambda index: numbers[index]
    )


def constrain[T](tree: T, specs: Specs) -> T:
    """Inside a program: where its arrays lie on the mesh in use, if any."""
    if mesh_in_use() is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree))


def replicated[T](tree: T) -> T:
    """Inside a program: results that every process can read."""
    return constrain(tree, replicated_specs)


def readable[T](tree: T) -> T:
    """Outside of one: arrays as every process can read them."""
    return tree if mesh_in_use() is None else jax.jit(replicated)(tree)


def read(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array on the host, wherever its shards are; all processes call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = readable(array)
    return np.asarray(array)
