"""Chunks of entries: on their way into a TPU's VMEM, piece by piece, and as rows there.

See `plan`.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Copies that are started in one turn of a loop.
TOGETHER = 64
# JAX's simulator of TPU memory cannot read a buffer as words; tests there go without.
AS_WORDS = True


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


def rows_of(buffer, side):
    """A chunk [tile, H]; rows that came one by one lie as [tile, H / 128, 128]."""
    if len(buffer.shape) == 3:
        return buffer[side]
    _, tile, pieces, lanes = buffer.shape
    if buffer.dtype != jnp.bfloat16 or pieces % 2 or not AS_WORDS:
        return buffer[side].reshape(tile, pieces * lanes)
    return rows_of_words(buffer.bitcast(jnp.uint32), side)


def rows_of_words(words, side):
    """The same of rows in bfloat16, as words [tile, H / 256, 128].

    A word holds two of a row's pieces, where the matrix units want two rows' of a
    piece. Words of even and of odd rows, loaded apart, are recombined in registers,
    which takes half the time that a reshape does.
    """
    _, tile, pairs, _ = words.shape
    low, columns = jnp.uint32(0xFFFF), []
    for pair in range(pairs):
        even = words[side, pl.ds(0, tile // 2, stride=2), pair]
        odd = words[side, pl.ds(1, tile // 2, stride=2), pair]
        columns += [even & low | odd << 16, even >> 16 | odd & ~low]
    return jnp.concatenate([pltpu.bitcast(c, jnp.bfloat16) for c in columns], axis=1)
