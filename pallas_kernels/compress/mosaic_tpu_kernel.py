"""What a core of a TPU does of `compress`: appends rows, then makes entries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compress.mosaic_tpu_entry import entry_lanes

# Windows on their way and in work, of which some are computed together; entries, those
# that are being written included.
DEPTH, TOGETHER, ENTRIES = 8, 4, 16
# Rows around an entry that are written together.
TILE = 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Static sizes.

    Attributes:
      ratio, series, width: m; series of a row; H.
      slots, slots_per_core: B; slots of a core, those that fill up the last included.
      windows: most that end of a slot.
      length: S, rows of the ring.
      piece: positions that lie together in the ring wherever a window begins.
      shared: whether an entry is written with the rows around it.
      eps: of the norm.
    """

    ratio: int
    series: int
    width: int
    slots: int
    slots_per_core: int
    windows: int
    length: int
    piece: int
    shared: bool
    eps: float


def kernel(
    layer_ref,
    starts_ref,
    counts_ref,
    offsets_ref,
    place_ref,
    rows_any,
    cos_ref,
    sin_ref,
    weight_ref,
    _ring_in,
    _table_in,
    ring_any,
    table_any,
    window_buf,
    entry_buf,
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
    first = pl.program_id(0) * sizes.slots_per_core
    slots = (first, first + sizes.slots_per_core)

    def ring_row(slot, place):
        """Where a place lies that may be past one end of the slot's ring."""
        place = place + jnp.where(place < 0, S, 0) - jnp.where(place >= S, S, 0)
        return (layer_ref[0] * sizes.slots + slot) * S + place

    def append(act):
        @pl.loop(*slots)
        def _(slot):
            place = jax.lax.rem(starts_ref[slot], S)

            @pl.loop(0, tokens_of(counts_ref, slot))
            def _(token):
                new = rows_any.at[pl.ds(offsets_ref[slot] + token, 1)]
                here = ring_any.at[pl.ds(ring_row(slot, place + token), 1)]
                act(pltpu.make_async_copy(new, here, sems.at[0]))

    def list_windows(slot, count):
        for i in range(sizes.windows):
            window, entry = slot * sizes.windows + i, starts_ref[slot] // m + i
            list_ref[count] = window
            slot_ref[count], first_ref[count] = slot, jax.lax.rem(m * entry, S)
            earlier_ref[count] = jnp.where(entry > 0, 1, 0)
            count += jnp.where(ends(place_ref, window), 1, 0)
        return count

    def read(j, act):
        side = jax.lax.rem(j, DEPTH)

        def series(s):
            for begin in range(0, m, sizes.piece):
                place = first_ref[j] + m * (s + 1 - sizes.series) + begin
                row = pl.multiple_of(ring_row(slot_ref[j], place), sizes.piece)
                here = pl.ds(s * m + begin, sizes.piece)
                for part in range(2):
                    channels = pl.ds((part * sizes.series + s) * H, H)
                    target = window_buf.at[side, part, here]
                    source = ring_any.at[pl.ds(row, sizes.piece), channels]
                    act(pltpu.make_async_copy(source, target, sems.at[1 + side]))

        # Entry 0 has no window before it.
        for s in range(sizes.series - 1):
            pl.when(earlier_ref[j] > 0)(lambda s=s: series(s))
        series(sizes.series - 1)
        if sizes.shared:
            copy = entry_copy(j, sems.at[1 + side], out=False)
            pl.when(jnp.logical_not(beside_last(j)))(lambda: act(copy))

    def beside_last(j):
        """Whether the entry before this one lies among the same rows."""
        last, this = (
            place_ref[list_ref[i]] // TILE for i in (jnp.maximum(j - 1, 0), j)
        )
        return (j > 0) & (last == this)

    def entry_copy(j, sem, *, out):
        place, buffer = place_ref[list_ref[j]], entry_buf.at[entry_side(j)]
        if len(table_any.shape) == 3:
            there = table_any.at[place]
        else:
            rows = TILE if sizes.shared else 1
            begin = pl.multiple_of(place // rows * rows, rows)
            there = table_any.at[pl.ds(begin, rows)]
        ends_ = (buffer, there) if out else (there, buffer)
        return pltpu.make_async_copy(*ends_, sem)

    def write(j, act):
        copy = entry_copy(j, sems.at[1 + DEPTH + entry_side(j)], out=True)
        if not sizes.shared:
            return act(copy)
        # Rows that the next entry is written among are written with it.
        following = jnp.minimum(j + 1, count - 1)
        last = jnp.logical_not((following > j) & beside_last(following))
        pl.when(last)(lambda: act(copy))

    append(lambda copy: copy.start())
    count = jax.lax.fori_loop(*slots, list_windows, jnp.int32(0))
    append(lambda copy: copy.wait())
    turns = (count + TOGETHER - 1) // TOGETHER

    def entry(j):
        side = jax.lax.rem(j, DEPTH)
        return entry_lanes(
            window_buf.at[side, 0],
            window_buf.at[side, 1],
            earlier_ref[j] > 0,
            weight_ref,
            cos_ref[pl.ds(list_ref[j], 1)],
            sin_ref[pl.ds(list_ref[j], 1)],
            sizes,
        )

    def start(j):
        pl.when(j < count)(lambda: read(j, lambda copy: copy.start()))

    def await_write(j):
        pl.when((j >= 0) & (j < count))(lambda: write(j, lambda copy: copy.wait()))

    def store(j, lanes):
        buffer = entry_buf.at[entry_side(j)]
        if not sizes.shared:
            axis = 0 if len(table_any.shape) == 3 else 1
            buffer[...] = jnp.concatenate(lanes, axis).astype(buffer.dtype)
            return

        @pl.when(beside_last(j))
        def _():
            buffer[...] = entry_buf[entry_side(j - 1)]

        new_1H, rows = jnp.concatenate(lanes, 1), buffer[...].astype(jnp.float32)
        mine = place_ref[list_ref[j]] % TILE
        row_R1 = jax.lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
        buffer[...] = jnp.where(row_R1 == mine, new_1H, rows).astype(buffer.dtype)

    pl.loop(0, DEPTH - TOGETHER)(start)

    @pl.loop(0, turns)
    def _(turn):
        windows = [TOGETHER * turn + i for i in range(TOGETHER)]
        for j in windows:
            await_write(j - DEPTH - TOGETHER)
            start(j + DEPTH - TOGETHER)
        for j in windows:
            pl.when(j < count)(lambda j=j: read(j, lambda copy: copy.wait()))
        entries = [entry(jnp.minimum(j, count - 1)) for j in windows]
        for j, lanes in zip(windows, entries):

            @pl.when(j < count)
            def _(j=j, lanes=lanes):
                store(j, lanes)
                write(j, lambda copy: copy.start())

    pl.loop(TOGETHER * (turns - 1) - DEPTH, count)(await_write)


def entry_side(j):
    """Which buffer an entry is made in."""
    return jax.lax.rem(j, ENTRIES)


def tokens_of(counts_ref, slot):
    """Tokens of a slot."""
    return counts_ref[slot]


def ends(place_ref, window):
    """Whether a window's entry is to be written."""
    return place_ref[window] >= 0
