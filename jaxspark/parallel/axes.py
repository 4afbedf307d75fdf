"""The axes of a mesh, and what traced code asks of the shards along them.

    data     slots
    expert   slots too, and experts: each shard holds some of both
    model    heads, hidden units and vocabulary, of the same slots

Programs for several devices run inside one `shard_map` (see `mesh`). A function here is
a collective where an axis is mapped over; on one device, or along an axis of one, it is
the identity and leaves nothing in the program.

A branch around a model call that only some shards take would leave the others waiting
in a collective. So whatever decides one (how many tokens are drafted, the token bucket,
whether a loop ends) is reduced over `SLOTS` first, by the functions named `..._of`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

DATA, EXPERT, MODEL = "data", "expert", "model"
# Slots are shared out over both, experts over the axes of the second.
SLOTS = (DATA, EXPERT)
EXPERTS = (EXPERT, MODEL)

Axes = str | tuple[str, ...]


def axis_names(axes: Axes | None) -> tuple[str, ...]:
    """One axis, several or none, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def bound(axes: Axes) -> tuple[str, ...]:
    """Those that the code being traced is mapped over, with more than one shard."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        name
        for name in axis_names(axes)
        if name in mesh.manual_axes and mesh.shape[name] > 1
    )


def size(axes: Axes) -> int:
    """Number of shards."""
    count = 1
    for name in bound(axes):
        count *= jax.sharding.get_abstract_mesh().shape[name]
    return count


def index(axes: Axes) -> int | Int[Array, ""]:
    """Which of them this one is."""
    names = bound(axes)
    return jax.lax.axis_index(names) if names else 0


def own(
    numbers: Int[Array, "..."], count: int, axes: Axes
) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """Numbers of things of which each shard has `count`.

    Returns:
      Numbers among this shard's own, and which of them are.
    """
    mine = numbers - index(axes) * count
    return mine, (mine >= 0) & (mine < count)


def own_slots(slots_N: Int[Array, " N"], count: int) -> Int[Array, " N"]:
    """Numbers among this shard's own `count` slots; `count` for other shards' slots."""
    if not bound(SLOTS):
        return slots_N
    mine_N, here_N = own(slots_N, count, SLOTS)
    return jnp.where(here_N, mine_N, count)


def total(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """The sum of what each shard has, on all of them."""
    names = bound(axes)
    return jax.lax.psum(x, names) if names else x


def largest(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """The elementwise maximum of what each shard has, on all of them."""
    names = bound(axes)
    return jax.lax.pmax(x, names) if names else x


def max_of(x: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    """The largest element of any slot's shard."""
    return largest(jnp.max(x), SLOTS)


def sum_of(x: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    """The sum over the elements of all slots' shards."""
    return total(jnp.sum(x), SLOTS)


def any_of(x: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether an element is true on any shard of slots."""
    return max_of(x.astype(jnp.int32)) > 0 if bound(SLOTS) else jnp.any(x)


def all_of(x: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether every element is true on every shard of slots."""
    return ~any_of(~x)
