"""The k-th best of up to 8 rows of scores in a TPU's VMEM, by halving.

The interval that it lies in begins between the least maximum of k buckets and the
highest score, and is halved until k scores are above the middle, which for scores that
differ takes about a dozen passes, of a compare and an add per register. Equal scores
are parted by another such search, over their places.

    R  rows, 8     n  registers     b  lanes, 128
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged import LANES, QUERIES

LOWEST = jnp.iinfo(jnp.int32).min


class Rows(NamedTuple):
    """Keys in VMEM, and passes over them, a group of registers at a time."""

    ref: Any
    groups: Any
    together: int

    def at(self, group):
        """The registers of a group."""
        return pl.ds(group * self.together, self.together)

    def keys(self, group):
        """Its keys, [n, R, b]."""
        return self.ref[self.at(group)]

    def places(self, group):
        """Their places in a row."""
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


def kth_best(rows, bests_nRb, limit_R1, picks):
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


def bound(rows, kth_R1, reach_R1, picks):
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
