"""The best of up to 8 rows of scores in a TPU's VMEM, without a sort, and their union.

A register holds 128 scores of each row, as integers in the order of the scores. The
k-th best of a row is found by halving the interval that it lies in: from the least
maximum of k buckets to the highest score, until k scores are above the middle, which
for scores that differ takes about a dozen passes, of a compare and an add per register.
Equal scores are parted by another such search, over their places.

What any row chose is then counted along the registers, and comes out in order: the j-th
entry of the union lies in the register before which at most j are counted and behind
which more are, there in the first lane up to which more are. Both are compares and sums
of [registers, 128], and of [128, 128]; the counts of one register are picked by a
product with a 0/1 matrix, since a core has no gather of its own. (Counts up to 128 and
members up to 255 are exact in bfloat16.)

    R  rows, 8     n  registers     b  lanes, 128     X  places of the union, by 128
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged import LANES, QUERIES

# Registers that are worked on together, at most, and that are counted together.
TOGETHER = 16
PART = 128
LOWEST = jnp.iinfo(jnp.int32).min


class Scratch(NamedTuple):
    """Memory of a step.

    Attributes:
      keys: [n, R, b] int32, the scores' order.
      bits: [n, b] float32, which rows chose an entry.
      upto: [n, b] float32, how many entries of a register are chosen up to a lane.
      before, after: [n, b] float32, how many are before, and up to the end of, a
        register, the same in all lanes.
    """

    keys: Any
    bits: Any
    upto: Any
    before: Any
    after: Any


def select(score_ref, scratch, outputs, *, limits, picks, registers, together):
    """Writes the union of each row's best scores.

    Args:
      score_ref: [n, R, b] float32; rows without a limit hold anything.
      scratch: see there.
      outputs: rows and members of the union, int32 [1, 1, .], and [1, 1, 1] how many.
      limits: of each row, how many scores it may choose from, the first ones.
      picks: how many it chooses.
      registers: how many hold scores; a multiple of
      together: registers that are worked on at once.
    """
    limit_R1 = jnp.zeros((QUERIES, 1), jnp.int32)
    row_R1 = jax.lax.broadcasted_iota(jnp.int32, (QUERIES, 1), 0)
    for row, limit in enumerate(limits):
        limit_R1 = jnp.where(row_R1 == row, limit, limit_R1)
    rows = _Rows(scratch.keys, registers // together, together)
    bests_nRb = rows.order(score_ref, limit_R1)
    kth_R1, reach_R1 = _kth_best(rows, bests_nRb, limit_R1, picks)
    bound_R1 = _bound(rows, kth_R1, reach_R1, picks)
    bit_R1 = jnp.left_shift(1, row_R1).astype(jnp.float32)
    # What is counted together but holds no scores.
    size = min(PART, scratch.bits.shape[0])
    parts = pl.cdiv(registers, size)
    last = pl.ds(jnp.maximum(parts - 1, 0) * size, size)
    scratch.bits[last] = jnp.zeros((size, LANES), jnp.float32)

    def unite(group, _):
        key_nRb = rows.keys(group)
        first_nRb = (key_nRb > LOWEST) & (rows.places(group) < bound_R1)
        chosen_nRb = (key_nRb > kth_R1) | ((key_nRb == kth_R1) & first_nRb)
        bits_nb = jnp.sum(jnp.where(chosen_nRb, bit_R1, 0.0), axis=1)
        scratch.bits[rows.at(group)] = bits_nb
        return _

    jax.lax.fori_loop(0, rows.groups, unite, 0)
    _write_union(scratch, outputs, parts, size)


class _Rows(NamedTuple):
    """Keys in VMEM, and passes over them, a group of registers at a time."""

    ref: Any
    groups: Any
    together: int

    def at(self, group):
        return pl.ds(group * self.together, self.together)

    def keys(self, group):
        return self.ref[self.at(group)]

    def places(self, group):
        shape = (self.together, QUERIES, LANES)
        register = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        return (group * self.together + register) * LANES + lane

    def order(self, score_ref, limit_R1):
        """Writes keys, LOWEST beyond the limits; the highest of groups' like lanes."""

        def turn(group, bests_nRb):
            score_nRb = score_ref[self.at(group)]
            score_nRb = jnp.where(score_nRb == 0, 0.0, score_nRb)  # -0 too
            bits_nRb = pltpu.bitcast(score_nRb, jnp.int32)
            key_nRb = jnp.where(bits_nRb < 0, bits_nRb ^ 0x7FFFFFFF, bits_nRb)
            key_nRb = jnp.where(self.places(group) < limit_R1, key_nRb, LOWEST)
            self.ref[self.at(group)] = key_nRb
            return jnp.maximum(bests_nRb, key_nRb)

        start = jnp.full((self.together, QUERIES, LANES), LOWEST, jnp.int32)
        return jax.lax.fori_loop(0, self.groups, turn, start)

    def count(self, holds):
        """How many keys of each row `holds(group)` holds for; exact, as float32."""
        size = -(-self.together // 2)  # sums that do not wait for each other

        def turn(group, count_nRb):
            one_nRb = jnp.where(holds(group), 1.0, 0.0)
            if self.together > size:
                one_nRb = one_nRb[:size] + one_nRb[size:]
            return count_nRb + one_nRb

        zeros_nRb = jnp.zeros((size, QUERIES, LANES), jnp.float32)
        count_nRb = jax.lax.fori_loop(0, self.groups, turn, zeros_nRb)
        return jnp.sum(jnp.sum(count_nRb, axis=0), axis=1, keepdims=True)


def _kth_best(rows, bests_nRb, limit_R1, picks):
    """The lowest key that is chosen, and how many reach it; LOWEST where all do."""
    best_R1 = jnp.max(jnp.max(bests_nRb, axis=0), axis=1, keepdims=True)
    low_R1 = jnp.full((QUERIES, 1), LOWEST, jnp.int32)
    # As many buckets' bests are no lower than the least of them.
    buckets = -(-picks // LANES)
    if buckets <= rows.together:
        bucket_nRb = bests_nRb[:buckets]
        for n in range(buckets, rows.together - buckets + 1, buckets):
            bucket_nRb = jnp.maximum(bucket_nRb, bests_nRb[n : n + buckets])
        low_R1 = jnp.min(jnp.min(bucket_nRb, axis=0), axis=1, keepdims=True)
    all_R1 = limit_R1 <= picks
    low_R1 = jnp.where(all_R1, LOWEST, low_R1)
    high_R1 = jnp.where(all_R1, LOWEST, best_R1) + 1

    # Unknown yet: more than are chosen.
    reach_R1 = jnp.where(all_R1, picks, picks + 1).astype(jnp.float32)

    def halve(low_R1, high_R1, reach_R1):
        middle_R1 = (low_R1 >> 1) + (high_R1 >> 1) + (low_R1 & high_R1 & 1)
        count_R1 = rows.count(lambda group: rows.keys(group) >= middle_R1)
        enough_R1 = count_R1 >= picks
        low_R1 = jnp.where(enough_R1, middle_R1, low_R1)
        high_R1 = jnp.where(enough_R1, high_R1, middle_R1)
        high_R1 = jnp.where(count_R1 == picks, low_R1 + 1, high_R1)
        return low_R1, high_R1, jnp.where(enough_R1, count_R1, reach_R1)

    kth_R1, _, reach_R1 = narrow(halve, low_R1, high_R1, reach_R1)
    return kth_R1, reach_R1


def _bound(rows, kth_R1, reach_R1, picks):
    """Below which place a key that equals the k-th best is chosen."""
    every = rows.groups * rows.together * LANES
    tied_R1 = reach_R1 > picks
    high_R1 = jnp.broadcast_to(every, kth_R1.shape).astype(jnp.int32)

    def halve(low_R1, high_R1):
        middle_R1 = (low_R1 + high_R1) >> 1

        def chosen(group):
            first_nRb = rows.places(group) < middle_R1
            key_nRb = rows.keys(group)
            return (key_nRb > kth_R1) | ((key_nRb == kth_R1) & first_nRb)

        enough_R1 = rows.count(chosen) >= picks
        low_R1 = jnp.where(enough_R1, low_R1, middle_R1)
        return low_R1, jnp.where(enough_R1, middle_R1, high_R1)

    return narrow(halve, jnp.where(tied_R1, 0, high_R1 - 1), high_R1)[1]


def narrow(halve, *interval):
    """Halves intervals (low, high, ...) until each holds but its lower end."""

    def open_(interval):
        low_R1, high_R1, *_ = interval
        return jnp.max(jnp.where(low_R1 + 1 < high_R1, 1, 0)) > 0

    def turn(interval):
        return halve(*interval)

    return jax.lax.while_loop(open_, turn, interval)


def _write_union(scratch, outputs, parts, size):
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
