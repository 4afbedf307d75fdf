"""What a core of a TPU does of `compress`: appends rows, then makes entries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged import LANES

# Windows on their way and in work; rows around an entry that are written together.
DEPTH, TILE = 4, 16
_UNSEEN = -1e30


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
    sems,
    *,
    sizes: Sizes,
):
    """The slots of one core.

    Scalars are the ring's layer, [B] first position, tokens and first flat place of
    each slot, and [B windows] where an entry goes, -1 if nowhere.
    """
    m, H = sizes.ratio, sizes.width
    first = pl.program_id(0) * sizes.slots_per_core

    def ring_row(slot, position):
        row = jax.lax.rem(position, sizes.length)
        return (layer_ref[0] * sizes.slots + slot) * sizes.length + row

    def append(act):
        @pl.loop(first, first + sizes.slots_per_core)
        def _(slot):
            @pl.loop(0, tokens_of(counts_ref, slot))
            def _(token):
                new = rows_any.at[pl.ds(offsets_ref[slot] + token, 1)]
                place = ring_row(slot, starts_ref[slot] + token)
                act(
                    pltpu.make_async_copy(new, ring_any.at[pl.ds(place, 1)], sems.at[0])
                )

    def add(i, count):
        window = first * sizes.windows + i
        list_ref[count] = window
        return count + jnp.where(ends(place_ref, window), 1, 0)

    def entry_of(window):
        return starts_ref[window // sizes.windows] // m + window % sizes.windows

    def read(j, act):
        window, side = list_ref[j], jax.lax.rem(j, DEPTH)
        entry = entry_of(window)

        def series(s):
            for begin in range(0, m, sizes.piece):
                position = m * (entry + 1 - sizes.series + s) + begin
                place = ring_row(window // sizes.windows, position)
                there = pl.ds(pl.multiple_of(place, sizes.piece), sizes.piece)
                here = pl.ds(s * m + begin, sizes.piece)
                for part in range(2):
                    channels = pl.ds((part * sizes.series + s) * H, H)
                    target = window_buf.at[side, part, here]
                    source = ring_any.at[there, channels]
                    act(pltpu.make_async_copy(source, target, sems.at[1 + side]))

        # Entry 0 has no window before it.
        for s in range(sizes.series - 1):
            pl.when(entry > 0)(lambda s=s: series(s))
        series(sizes.series - 1)
        if sizes.shared:
            around = jnp.logical_not(beside_last(j))
            pl.when(around)(lambda: act(entry_copy(j, sems.at[1 + side], out=False)))

    def beside_last(j):
        """Whether the entry before this one lies among the same rows."""
        last = place_ref[list_ref[jnp.maximum(j - 1, 0)]] // TILE
        return (j > 0) & (last == place_ref[list_ref[j]] // TILE)

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

    def write(j):
        return entry_copy(j, sems.at[1 + DEPTH], out=True)

    append(lambda copy: copy.start())
    count = jax.lax.fori_loop(
        0, sizes.slots_per_core * sizes.windows, add, jnp.int32(0)
    )
    append(lambda copy: copy.wait())

    def start(j):
        pl.when(j < count)(lambda: read(j, lambda copy: copy.start()))

    for j in range(DEPTH - 1):
        start(jnp.int32(j))

    @pl.loop(0, count)
    def _(j):
        start(j + DEPTH - 1)
        read(j, lambda copy: copy.wait())
        window = list_ref[j]
        side = jax.lax.rem(j, DEPTH)
        lanes = entry_lanes(
            window_buf.at[side, 0],
            window_buf.at[side, 1],
            entry_of(window) > 0,
            weight_ref,
            cos_ref[pl.ds(window, 1)],
            sin_ref[pl.ds(window, 1)],
            sizes,
        )
        buffer = entry_buf.at[entry_side(j)]
        if not sizes.shared:
            axis = 0 if len(table_any.shape) == 3 else 1
            buffer[...] = jnp.concatenate(lanes, axis).astype(buffer.dtype)
        else:

            @pl.when(beside_last(j))
            def _():
                buffer[...] = entry_buf[entry_side(j - 1)]

            new_1H, rows = jnp.concatenate(lanes, 1), buffer[...].astype(jnp.float32)
            mine = place_ref[window] % TILE
            row_R1 = jax.lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
            buffer[...] = jnp.where(row_R1 == mine, new_1H, rows).astype(buffer.dtype)
        pl.when(j > 0)(lambda: write(j - 1).wait())
        write(j).start()

    pl.when(count > 0)(lambda: write(count - 1).wait())


def entry_lanes(values_ref, logits_ref, earlier, weight_ref, cos_1R, sin_1R, sizes):
    """A window's entry, 128 channels at a time."""
    parts, span = range(0, sizes.width, LANES), sizes.series * sizes.ratio
    position_p1 = jax.lax.broadcasted_iota(jnp.int32, (span, 1), 0)
    there_p1 = (position_p1 >= span - sizes.ratio) | earlier
    pooled = []
    for part in parts:
        value_pl = values_ref[:, pl.ds(part, LANES)]
        logit_pl = logits_ref[:, pl.ds(part, LANES)]
        if sizes.series > 1:
            value_pl = jnp.where(there_p1, value_pl, 0.0)
            logit_pl = jnp.where(there_p1, logit_pl, _UNSEEN)
        weight_pl = jnp.exp(logit_pl - logit_pl.max(0, keepdims=True))
        total_1l = weight_pl.sum(0, keepdims=True)
        pooled.append((weight_pl * value_pl).sum(0, keepdims=True) / total_1l)
    squares = sum(x_1l * x_1l for x_1l in pooled).sum(1, keepdims=True)
    norm = jax.lax.rsqrt(squares / sizes.width + sizes.eps)
    lanes = [
        x * norm * weight_ref[:, pl.ds(part, LANES)] for x, part in zip(pooled, parts)
    ]
    turning = cos_1R.shape[1] // LANES
    for place in range(turning):
        here = slice(place * LANES, (place + 1) * LANES)
        part = len(lanes) - turning + place
        lanes[part] = (
            lanes[part] * cos_1R[:, here] + swapped(lanes[part]) * sin_1R[:, here]
        )
    return lanes


def swapped(x_1l):
    """Neighbours in each other's places."""
    lane_1l = jax.lax.broadcasted_iota(jnp.int32, x_1l.shape, 1)
    after, before = pltpu.roll(x_1l, LANES - 1, 1), pltpu.roll(x_1l, 1, 1)
    return jnp.where(lane_1l % 2 == 0, after, before)


def entry_side(j):
    """Which buffer an entry is made in: its last copy ended two entries ago."""
    return jax.lax.rem(j, DEPTH + 1)


def tokens_of(counts_ref, slot):
    """Tokens of a slot."""
    return counts_ref[slot]


def ends(place_ref, window):
    """Whether a window's entry is to be written."""
    return place_ref[window] >= 0
