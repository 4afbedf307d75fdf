"""A pass's rows on their way into a TPU's rings, one copy each: none lies by itself."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compress.mosaic_tpu_sizes import Sizes


class Appending(NamedTuple):
    """From where to where.

    Attributes:
      rows: [T, X], the pass's.
      rings: [L B S, X], of all layers and slots.
      starts, counts, offsets: [B] first position, tokens and first flat place.
      sem: counts what has arrived.
      sizes: of the rings.
    """

    rows: Any
    rings: Any
    starts: Any
    counts: Any
    offsets: Any
    sem: Any
    sizes: Sizes

    def start(self, slot, ring):
        """Copies of a slot's rows into its ring, which begins at row `ring`."""
        length = self.sizes.length

        def one(token, place):
            new = self.rows.at[pl.ds(self.offsets[slot] + token, 1)]
            here = self.rings.at[pl.ds(ring + place, 1)]
            pltpu.make_async_copy(new, here, self.sem).start()
            return jnp.where(place == length - 1, 0, place + 1)

        place = jax.lax.rem(self.starts[slot], length)
        jax.lax.fori_loop(0, tokens_of(self.counts, slot), one, place)

    def wait(self, slot):
        """Until a slot's rows are there."""
        row = self.rings.at[pl.ds(0, 1)]

        @pl.loop(0, tokens_of(self.counts, slot))
        def _(_):
            pltpu.make_async_copy(row, row, self.sem).wait()


def tokens_of(counts_ref, slot):
    """Tokens of a slot."""
    return counts_ref[slot]
