"""The best of up to 8 rows of scores in a TPU's VMEM, without a sort, and their union.

A register holds 128 scores of each row, as integers in the order of the scores. The
k-th best of each row is found by `selection_search`; what any row chose comes out in
order by `selection_union`.

    R  rows, 8     n  registers     b  lanes, 128     X  places of the union, by 128
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.indexer_topk.selection_search import (
    LOWEST,
    Rows,
    bound,
    kth_best,
)
from pallas_kernels.indexer_topk.selection_union import write_union
from pallas_kernels.ragged import LANES, QUERIES

# Registers that are worked on together, at most, and that are counted together.
TOGETHER = 16
PART = 128


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
    rows = Rows(scratch.keys, registers // together, together)
    bests_nRb = rows.order(score_ref, limit_R1)
    kth_R1, reach_R1 = kth_best(rows, bests_nRb, limit_R1, picks)
    bound_R1 = bound(rows, kth_R1, reach_R1, picks)
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
    write_union(scratch, outputs, parts, size)
