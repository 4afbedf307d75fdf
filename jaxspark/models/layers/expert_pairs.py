"""Outputs of experts for pairs: a row, and one of the experts it goes to.

    out_a = W_down,e swiglu(W_gate_up,e x_r)    for pair a = (r, e), of A = R X

Pairs are sorted by expert, and each expert multiplies the rows it got. One shard of n
has the experts of one pair in n on average, in the worst case of all. So it goes
through its pairs in blocks of `SLACK` times its share, as many as it has: one where
routing is about even, up to n / SLACK where all goes to one shard. Another block has
other experts, but for the one they part in, so what skewed routing costs follows the
pairs too. Nothing but the room for outputs is as large as the worst case.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.models.layers.mlp import clamped_swiglu
from jaxspark.parallel.exchange import apart
from pallas_kernels import grouped_matmul
from pallas_kernels.precision import accum_dtype
from pallas_kernels.quantized import Quantized

# Matrices [G, 2 F, D] and [G, D, F] of groups of experts.
type Matrices = tuple[Float[Array, "G _ _"] | Quantized, ...]
# How uneven routing may be before a shard takes a second block.
SLACK = 1.5
# A TPU's tile has as many rows of bfloat16.
_ROWS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """A pairs, sorted by expert.

    Attributes:
      row_A: row of each pair, in the order of experts; those of none come last.
      pair_A: number r X + x of each.
      rank_A: of each among the numbers of those that have an expert.
      group_sizes_E: pairs of each expert.
    """

    row_A: Int[Array, " A"]
    pair_A: Int[Array, " A"]
    rank_A: Int[Array, " A"]
    group_sizes_E: Int[Array, " E"]

    @classmethod
    def of(cls, experts_RX: Int[Array, "R X"], count: int) -> "Pairs":
        """Of rows and their experts among `count`, -1 for none."""
        expert_A = jnp.where(experts_RX < 0, count, experts_RX).ravel()
        pair_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
        rank_A = jnp.cumsum(expert_A < count, dtype=jnp.int32) - 1
        return cls(
            pair_A // experts_RX.shape[1],
            pair_A,
            rank_A[pair_A],
            jnp.sum(expert_A[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32),
        )

    def block(self, number: Int[Array, ""], size: int) -> "Pairs":
        """`size` of them; those without an expert have ranks past all pairs."""
        start, total = number * size, len(self.row_A)
        place_C = start + jnp.arange(size, dtype=jnp.int32)
        ends_E = jnp.cumsum(self.group_sizes_E)
        within_E = jnp.clip(ends_E - start, 0, size)
        row_C, pair_C, rank_C = (
            x.at[place_C].get(mode="clip")
            for x in (self.row_A, self.pair_A, self.rank_A)
        )
        return Pairs(
            row_C,
            pair_C,
            jnp.where(place_C < ends_E[-1], rank_C, total + place_C),
            jnp.diff(within_E, prepend=0),
        )

    def blocks(self, size: int) -> Int[Array, ""]:
        """How many blocks have pairs with an expert."""
        return -(-jnp.sum(self.group_sizes_E) // size)


def outputs(
    x_RD: Float[Array, "R D"],
    weights: Matrices,
    pairs: Pairs,
    offset: Int[Array, ""],
    *,
    limit: float,
) -> Float[Array, "A D"]:
    """Of all pairs, in the order of their numbers; 0 for those of no expert.

    Args:
      x_RD: rows.
      weights: of experts.
      pairs: what goes to which.
      offset: the group that is expert 0.
      limit: of what is gated.
    """
    x_AD = x_RD[pairs.row_A]
    out_AD = _products(x_AD, weights, pairs.group_sizes_E, offset, limit)
    return out_AD[jnp.argsort(pairs.pair_A)]


def _products(x_AD, weights, group_sizes_E, offset, limit: float):
    """Of rows in the order of their experts."""
    multiply = partial(grouped_matmul, group_sizes_E=group_sizes_E, group_offset=offset)
    gate_up, down = weights
    gate_AF, up_AF = jnp.split(multiply(x_AD, gate_up), 2, axis=1)
    return multiply(clamped_swiglu(gate_AF, up_AF, limit), down)


def packed_outputs(
    x_RD: Float[Array, "R D"],
    weights: Matrices,
    pairs: Pairs,
    offset: Int[Array, ""],
    *,
    limit: float,
    share: int,
) -> Float[Array, "A D"]:
    """Of those that have an expert, in the order of their numbers, then anything.

    Args:
      x_RD: rows.
      weights: of experts.
      pairs: what goes to which, on average one in `share` to any.
      offset: the group that is expert 0.
      limit: of what is gated.
      share: shards of experts.
    """
    size = block_size(len(pairs.row_A), share)
    return _packed(limit, size, x_RD, weights, pairs, offset)


def block_size(pairs: int, share: int) -> int:
    """Pairs of a block, of so many on all of so many shards."""
    return min(pairs, _ROWS * math.ceil(SLACK * pairs / (share * _ROWS)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed(limit, size, x_RD, weights, pairs, offset):
    total, D = len(pairs.row_A), x_RD.shape[1]
    x_RYZ = apart(x_RD)

    def step(number, out_AYZ):
        block = pairs.block(number, size)
        x_CD = x_RYZ[block.row_A].reshape(size, D)
        out_CD = _products(x_CD, weights, block.group_sizes_E, offset, limit)
        return out_AYZ.at[block.rank_A].set(
            apart(out_CD), mode="drop", unique_indices=True
        )

    out_AYZ = jax.lax.empty((total, *x_RYZ.shape[1:]), x_RD.dtype)
    out_AYZ = jax.lax.fori_loop(0, pairs.blocks(size), step, out_AYZ)
    return out_AYZ.reshape(total, D)


def _forward(limit, size, *operands):
    return _packed(limit, size, *operands), operands


def _backward(limit, size, operands, dout_AD):
    """Block by block, each of which is computed again."""
    x_RD, weights, pairs, offset = operands
    # Quantized matrices have no gradients.
    frozen = any(isinstance(each, Quantized) for each in weights)
    inputs = (x_RD,) if frozen else (x_RD, weights)

    def step(number, sums):
        block = pairs.block(number, size)

        def products(x_RD, weights=weights):
            x_CD = x_RD[block.row_A]
            return _products(x_CD, weights, block.group_sizes_E, offset, limit)

        _, pull = jax.vjp(products, *inputs)
        dout_CD = dout_AD.at[block.rank_A].get(mode="fill", fill_value=0)
        return jax.tree.map(lambda sum_, d: sum_ + d, sums, pull(dout_CD))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accum_dtype(x.dtype)), inputs)
    sums = jax.lax.fori_loop(0, pairs.blocks(size), step, zeros)
    dx_RD, *dweights = jax.tree.map(lambda d, x: d.astype(x.dtype), sums, inputs)
    return dx_RD, *(dweights or [None]), None, None


_packed.defvjp(_forward, _backward)
