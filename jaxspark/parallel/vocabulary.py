"""Reductions over a vocabulary, which tensor parallelism shares out over `model`.

Logits are the largest thing a round makes, so each shard keeps those of its own rows of
the LM head, and only numbers per token travel. The last axis W is a shard's part of the
vocabulary; places and token ids count through the whole of it. On one device every
function gives what the plain one of `jax.numpy` does.

    argmax      the pair (value, -place) that is largest on any shard: ties go to the
                lowest place, as on one device
    logsumexp   m + log sum_shards sum exp(x - m), with m the largest of all
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxspark.parallel.axes import MODEL, bound, index, largest, own, size, total
from pallas_kernels.dispatch import expected_platform
from pallas_kernels.draws import Draws, Rows, combined


def first(width: int) -> int | Int[Array, ""]:
    """The place at which this shard's part begins."""
    return index(MODEL) * width


def places(width: int) -> Int[Array, " W"]:
    """Those of this shard's part."""
    return first(width) + jnp.arange(width)


def here(ids: Int[Array, "*N"], width: int) -> Int[Array, "*N"]:
    """Where tokens are in this shard's part; `width` for those that are not in it.

    For scatters that drop what is out of range; -1 is no token.
    """
    mine, inside = own(ids, width, MODEL)
    return jnp.where(inside, mine, width)


def part(x: Shaped[Array, "... V"]) -> Shaped[Array, "... W"]:
    """This shard's part of what is known of the whole vocabulary."""
    width = x.shape[-1] // size(MODEL)
    if width == x.shape[-1]:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first(width), width, axis=-1)


def whole(x: Shaped[Array, "... W"]) -> Shaped[Array, "... V"]:
    """All shards' parts, on each of them."""
    names = bound(MODEL)
    if not names:
        return x
    return jax.lax.all_gather(x, names, axis=x.ndim - 1, tiled=True)


def maximum(x: Float[Array, "... W"]) -> Float[Array, "... 1"]:
    """The largest value of each row."""
    return largest(jnp.max(x, axis=-1, keepdims=True), MODEL)


def argmax(x: Float[Array, "... W"]) -> Int[Array, "..."]:
    """The place of each row's largest value, the first of equals."""
    if not bound(MODEL):
        return _argmax(x)
    has_it = jnp.max(x, axis=-1, keepdims=True) == maximum(x)
    place = first(x.shape[-1]) + _argmax(x)
    nowhere = jnp.iinfo(jnp.int32).max
    return -largest(-jnp.where(has_it[..., 0], place, nowhere).astype(jnp.int32), MODEL)


def _argmax(x: Float[Array, "... W"]) -> Int[Array, "..."]:
    if expected_platform() != "cpu":
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    # CPUs take six times as long to reduce pairs as for two plain reductions. Numbers
    # that were computed twice might be rounded twice, and the largest be nowhere.
    x = jax.lax.optimization_barrier(x)
    last = x.shape[-1] - 1
    is_best = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_best, jnp.arange(last + 1), last), axis=-1)


def sums(x: Shaped[Array, "... W"]) -> Shaped[Array, "..."]:
    """The sum of each row."""
    return total(jnp.sum(x, axis=-1), MODEL)


def logsumexp(x: Float[Array, "... W"]) -> Float[Array, "..."]:
    """The log of the sum of each row's exponentials."""
    if not bound(MODEL):
        return jax.nn.logsumexp(x, axis=-1)
    top = jax.lax.stop_gradient(maximum(x))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(sums(jnp.exp(x - top))) + top[..., 0]


def log_softmax(x: Float[Array, "... W"]) -> Float[Array, "... W"]:
    """Log-probabilities of each row."""
    if not bound(MODEL):
        return jax.nn.log_softmax(x)
    return x - logsumexp(x)[..., None]


def pick(
    x_TW: Shaped[Array, "T W"], rows: Int[Array, "*N"], place: Int[Array, "*N"]
) -> Shaped[Array, "*N"]:
    """Values of some rows, each at one place."""
    if not bound(MODEL):
        return x_TW[rows, place]
    width = x_TW.shape[-1]
    mine, here = own(place, width, MODEL)
    return total(jnp.where(here, x_TW[rows, jnp.clip(mine, 0, width - 1)], 0), MODEL)


def united(draws: Draws, rows: Rows, first: int | Int[Array, ""]) -> Draws:
    """Draws from the whole vocabulary of those from each shard's part."""
    draws = replace(draws, place_R=draws.place_R + first)
    names = bound(MODEL)
    if not names:
        return draws
    parts = jax.tree.map(lambda x_R: jax.lax.all_gather(x_R, names), draws)
    return combined(parts, rows.rate_R)
