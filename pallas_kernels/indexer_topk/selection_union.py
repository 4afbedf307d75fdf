"""The entries of a TPU's VMEM that have a bit, in order, without a gather.

Bits are counted along the registers: the j-th entry lies in the register before which
at most j are counted and behind which more are, there in the first lane up to which
more are. Both are compares and sums of [registers, 128], and of [128, 128]; the counts
of one register are picked by a product with a 0/1 matrix, since a core has no gather of
its own. (Counts up to 128 and members up to 255 are exact in bfloat16.)

    n  registers     b  lanes, 128     X  places of the union, by 128
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ragged import LANES


def write_union(scratch, outputs, parts, size):
    """Entries that have a bit, in order."""
    rows_ref, members_ref, used_ref = outputs
    from_bb, to_bb = (
        jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1)
    )
    upto_bb = jnp.where(from_bb <= to_bb, 1.0, 0.0)
    below_nn = jnp.where(from_bb > to_bb, 1.0, 0.0)[:size, :size]
    every_bb = jnp.ones((LANES, LANES), jnp.float32)

    def at(part):
        return pl.ds(pl.multiple_of(part * size, size), size)

    def count(part, before_1b):
        one_nb = jnp.minimum(scratch.bits[at(part)], 1.0)
        all_nb = _dot(one_nb, every_bb)
        scratch.upto[at(part)] = _dot(one_nb, upto_bb)
        before_nb = before_1b + _dot(below_nn, all_nb)
        scratch.before[at(part)] = before_nb
        scratch.after[at(part)] = before_nb + all_nb
        return before_1b + jnp.sum(all_nb, axis=0, keepdims=True)

    zeros_1b = jnp.zeros((1, LANES), jnp.float32)
    used_1b = jax.lax.fori_loop(0, parts, count, zeros_1b)
    used = jnp.max(used_1b).astype(jnp.int32)
    used_ref[0, 0, 0] = used
    rows_ref[...] = jnp.zeros(rows_ref.shape, jnp.int32)
    members_ref[...] = jnp.zeros(members_ref.shape, jnp.int32)
    register_n1 = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)

    def write(block, _):
        rank_1X = (block * LANES + to_bb[:1]).astype(jnp.float32)

        def pick(part, picked):
            """Of the part's registers, if the rank lies in one of them."""
            start_1X, register_1X, upto_bX, bits_bX = picked
            before_nX, after_nX = scratch.before[at(part)], scratch.after[at(part)]
            is_nX = (before_nX <= rank_1X) & (rank_1X < after_nX)
            one_nX = jnp.where(is_nX, 1.0, 0.0)
            register_nX = jnp.where(is_nX, register_n1 + part * size, 0)
            start_nX = jnp.where(is_nX, before_nX, 0.0)
            return (
                start_1X + jnp.sum(start_nX, axis=0, keepdims=True),
                register_1X + jnp.sum(register_nX, axis=0, keepdims=True),
                upto_bX + _dot(scratch.upto[at(part)], one_nX, contracted=0),
                bits_bX + _dot(scratch.bits[at(part)], one_nX, contracted=0),
            )

        zeros_bX = jnp.zeros((LANES, LANES), jnp.float32)
        nothing = zeros_1b, jnp.zeros((1, LANES), jnp.int32), zeros_bX, zeros_bX
        picked = jax.lax.fori_loop(0, parts, pick, nothing)
        start_1X, register_1X, upto_bX, bits_bX = picked
        behind_bX = upto_bX <= rank_1X - start_1X
        lane_1X = jnp.sum(jnp.where(behind_bX, 1, 0), axis=0, keepdims=True)
        bits_bX = jnp.where(from_bb == lane_1X, bits_bX, 0.0)
        bits_1X = jnp.sum(bits_bX, axis=0, keepdims=True).astype(jnp.int32)
        there_1X = rank_1X < used_1b
        row_1X = LANES * register_1X + lane_1X
        here = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
        rows_ref[0, :, here] = jnp.where(there_1X, row_1X, 0)
        members_ref[0, :, here] = jnp.where(there_1X, bits_1X, 0)
        return _

    jax.lax.fori_loop(0, blocks_of(used), write, 0)


def blocks_of(used):
    """Registers of places that a union of so many entries fills."""
    return pl.cdiv(used, LANES)


def _dot(a, b, contracted=1):
    """Of small integers, exactly."""
    dimensions = ((contracted,), (0,)), ((), ())
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
