"""What a core of a TPU does of `compress`: appends rows, then makes entries.

Windows that end are listed in scalar memory and made some at a time, a *turn*: their
copies are started in one go, a few turns ahead, and awaited as one, so that all between
is one stretch of arithmetic. The last turn is filled up with its last window. Entries
have buffers of their own, and leave while others are made.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compress.mosaic_tpu_append import Appending
from pallas_kernels.compress.mosaic_tpu_entry import entry_lanes
from pallas_kernels.compress.mosaic_tpu_sizes import TILE, Sizes


def kernel(
    layer_ref,
    starts_ref,
    counts_ref,
    offsets_ref,
    place_ref,
    rows_any,
    cos_any,
    sin_any,
    weight_any,
    _ring_in,
    _table_in,
    ring_any,
    table_any,
    window_buf,
    entry_buf,
    cos_buf,
    sin_buf,
    weight_buf,
    list_ref,
    slot_ref,
    first_ref,
    earlier_ref,
    sems,
    *,
    sizes: Sizes,
):
    """The slots of one core.

    Scalars are the ring's layer, [B] first position, tokens and first flat place of
    each slot, and [B windows] where an entry goes, -1 if nowhere.
    """
    m, S, H = sizes.ratio, sizes.length, sizes.width
    together, ahead = sizes.together, sizes.depth - 1
    first = pl.program_id(0) * sizes.slots_per_core
    slots = (first, first + sizes.slots_per_core)
    append_sem, constant_sem, write_sem = (sems.at[i] for i in range(3))
    constants = [
        pltpu.make_async_copy(there, here, constant_sem)
        for there, here in (
            (cos_any, cos_buf),
            (sin_any, sin_buf),
            (weight_any, weight_buf),
        )
    ]

    def ring_of(slot):
        """Its first row."""
        return (layer_ref[0] * sizes.slots + slot) * S

    def list_windows(slot, count):
        for i in range(sizes.windows):
            window, entry = slot * sizes.windows + i, starts_ref[slot] // m + i
            list_ref[count] = window
            slot_ref[count] = slot
            # Entry 0 has no window before it, and reads one all the same.
            earlier_ref[count] = jnp.where(entry > 0, 1, 0)
            first_ref[count] = jax.lax.rem(m * (entry + 1 - sizes.series) + S, S)
            count += jnp.where(ends(place_ref, window), 1, 0)
        return count

    def read(turn, i):
        """Starts copies of a window, and of the rows around its entry."""
        j, side = jnp.minimum(together * turn + i, count - 1), side_of(turn)
        base, sem = ring_of(slot_ref[j]), sems.at[3 + side]
        for s in range(sizes.series):
            for begin in range(0, m, sizes.piece):
                place = first_ref[j] + s * m + begin
                place -= jnp.where(place >= S, S, 0)
                row = pl.multiple_of(base + place, sizes.piece)
                here = pl.ds(s * m + begin, sizes.piece)
                for part in range(2):
                    channels = pl.ds((part * sizes.series + s) * H, H)
                    source = ring_any.at[pl.ds(row, sizes.piece), channels]
                    target = window_buf.at[side, i, part, here]
                    pltpu.make_async_copy(source, target, sem).start()
        if sizes.shared:
            ends_ = rows_around(j), entry_buf.at[together * turn + i]
            pltpu.make_async_copy(*ends_, sem).start()

    def await_reads(turn):
        windows = window_buf.at[side_of(turn)]
        sem = sems.at[3 + side_of(turn)]
        pltpu.make_async_copy(windows, windows, sem).wait()
        if sizes.shared:
            around = entry_buf.at[pl.ds(together * turn, together)]
            pltpu.make_async_copy(around, around, sem).wait()

    def side_of(turn):
        return jax.lax.rem(turn, sizes.depth)

    def rows_around(j):
        """Where an entry is written, by itself or with the rows around it."""
        place = place_ref[list_ref[j]]
        if len(table_any.shape) == 3:
            return table_any.at[place]
        rows = TILE if sizes.shared else 1
        return table_any.at[pl.ds(pl.multiple_of(place // rows * rows, rows), rows)]

    def beside_last(j):
        """Whether the entry before this one lies among the same rows."""
        last, this = (
            place_ref[list_ref[i]] // TILE for i in (jnp.maximum(j - 1, 0), j)
        )
        return (j > 0) & (last == this)

    def store(j, lanes):
        buffer = entry_buf.at[j]
        if not sizes.shared:
            axis = 0 if len(table_any.shape) == 3 else 1
            buffer[...] = jnp.concatenate(lanes, axis).astype(buffer.dtype)
            return
        new_1H, last = jnp.concatenate(lanes, 1), jnp.maximum(j - 1, 0)
        beside = beside_last(jnp.minimum(j, count - 1))
        rows = jnp.where(beside, entry_buf[last], buffer[...]).astype(jnp.float32)
        mine = place_ref[list_ref[jnp.minimum(j, count - 1)]] % TILE
        row_R1 = jax.lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
        buffer[...] = jnp.where(row_R1 == mine, new_1H, rows).astype(buffer.dtype)

    def leaves(j):
        """Whether an entry is written; rows of several are, with the last of them."""
        if not sizes.shared:
            return j < count
        return (j < count) & ~(
            (j + 1 < count) & beside_last(jnp.minimum(j + 1, count - 1))
        )

    for copy in constants:
        copy.start()
    rings = Appending(
        rows_any, ring_any, starts_ref, counts_ref, offsets_ref, append_sem, sizes
    )
    pl.loop(*slots)(lambda slot: rings.start(slot, ring_of(slot)))
    count = jax.lax.fori_loop(*slots, list_windows, jnp.int32(0))
    turns = (count + together - 1) // together
    pl.loop(*slots)(rings.wait)

    def start(turn):
        @pl.when(turn < turns)
        def _():
            for i in range(together):
                read(turn, i)

    pl.loop(0, ahead)(start)
    for copy in constants:
        copy.wait()

    def make(turn, written):
        start(turn + ahead)
        await_reads(turn)
        entries = []
        for i in range(together):
            j = jnp.minimum(together * turn + i, count - 1)
            window = list_ref[j]
            entries.append(
                entry_lanes(
                    window_buf.at[side_of(turn), i, 0],
                    window_buf.at[side_of(turn), i, 1],
                    earlier_ref[j] > 0,
                    weight_buf,
                    cos_buf[pl.ds(window, 1)],
                    sin_buf[pl.ds(window, 1)],
                    sizes,
                )
            )
        for i, lanes in enumerate(entries):
            j = together * turn + i
            store(j, lanes)

            @pl.when(leaves(j))
            def _(j=j):
                ends_ = entry_buf.at[j], rows_around(j)
                pltpu.make_async_copy(*ends_, write_sem).start()

            written += jnp.where(leaves(j), 1, 0)
        return written

    written = jax.lax.fori_loop(0, turns, make, jnp.int32(0))

    @pl.loop(0, written)
    def _(_):
        pltpu.make_async_copy(entry_buf.at[0], entry_buf.at[0], write_sem).wait()


def ends(place_ref, window):
    """Whether a window's entry is to be written."""
    return place_ref[window] >= 0
