"""Chunks of entries on their way into a TPU's VMEM, piece by piece (see `plan`)."""

import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Copies that are started in one turn of a loop.
TOGETHER = 64


def start(j, buffer, table_any, names_ref, sem, *, plan):
    """Starts copies of chunk j's pieces [tile, ...] out of the table.

    Args:
      j: which of the chunks that `names_ref` [1, 1, n] names pieces of.
      buffer: a chunk's place in VMEM.
      table_any: rows of all layers and slots.
      names_ref: first rows of pieces, in scalar memory.
      sem: counts what has arrived.
      plan: how large they are.
    """
    pieces = plan.tile // plan.piece
    together = math.gcd(pieces, TOGETHER)

    def some(i, _):
        first = i * together
        names = names_ref.at[0, 0, pl.ds(j * pieces + first, together)]
        target = buffer.at[pl.ds(first * plan.piece, together * plan.piece)]
        for k in range(together):
            place = names[k]
            if plan.piece > 1:
                place = pl.multiple_of(place, plan.piece)
            pltpu.make_async_copy(
                table_any.at[pl.ds(place, plan.piece)],
                target.at[pl.ds(k * plan.piece, plan.piece)],
                sem,
            ).start()
        return _

    jax.lax.fori_loop(0, pieces // together, some, 0)


def wait(buffer, sem):
    """Waits until all of a chunk is there."""
    pltpu.make_async_copy(buffer, buffer, sem).wait()
