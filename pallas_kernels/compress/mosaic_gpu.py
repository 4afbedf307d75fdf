"""`compress` on Hopper GPUs: only windows that end are read.

Moved: for each window that ends, the channels of its series, out of the ring and out of
all layers' stack, once; the pooled entry. Computed: a softmax over positions for every
channel, whose greatest logit and sums are carried from some rows to the next, in
float32.

A block of threads serves 128 channels of one window, a thread one of them, so nothing
is exchanged between threads. Rows of 512 bytes come straight into registers, up to 16
at a time. What is short, XLA does: the pass's rows into the ring, before, and the norm,
the turn and the entry's place in its table, after. By XLA alone, whose shapes are those
of the worst pass, all windows that may end are read in all passes, several times.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import rings
from pallas_kernels.compress.ref import compress_xla, misfit, store, windows
from pallas_kernels.dispatch import not_hopper
from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.ragged import LANES, Ragged, Table

# Rows on their way to a thread's registers at once.
_TOGETHER = 16
_LEAST = -1e30


def supports(
    rows_TX, pending, entries, weight_H, frequencies_h, ragged, *, ratio, eps, amplitude
) -> str | None:
    """Why the kernel cannot compress these; None if it can."""
    return not_hopper() or misfit(rows_TX, pending, weight_H, ragged, ratio)


@with_gradients_of(compress_xla)
def compress_mosaic_gpu(
    rows_TX: Float[Array, "T X"],
    pending: Table,
    entries: Table,
    weight_H: Float[Array, " H"],
    frequencies_h: Float[Array, " h"],
    ragged: Ragged,
    *,
    ratio: int,
    eps: float,
    amplitude: float,
) -> tuple[Float[Array, "L B S X"], Float[Array, "L B C *H"]]:
    """See `api.compress`; gradients are the reference's."""
    H = len(weight_H)
    series = rows_TX.shape[1] // (2 * H)
    entry_BC, ended_BC = windows(ragged, ratio)
    position_T = ragged.starts_B[ragged.slots_T] + ragged.rows_T
    pending = rings.append(pending, position_T, rows_TX, ragged)
    # Chunks of a window's rows lie together in the ring, which wraps between them.
    chunk = math.gcd(ratio, pending.length, _TOGETHER)
    first_BC = ratio * (entry_BC + 1 - series)
    skipped_BC = jnp.where(first_BC < 0, ratio, 0)  # entry 0 has no window before it
    end_BC = jnp.where(ended_BC, series * ratio, skipped_BC)
    ring_BC = pending.places(jnp.zeros_like(entry_BC))
    table_BC4 = jnp.stack(
        [ring_BC, first_BC % pending.length, skipped_BC // chunk, end_BC // chunk], -1
    )
    pooled_NH = plgpu.kernel(
        functools.partial(
            _pool, length=pending.length, chunk=chunk, later=ratio // chunk
        ),
        out_type=jax.ShapeDtypeStruct((entry_BC.size, H), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=5 * rows_TX.size // 2,
            transcendentals=rows_TX.size // 2,
            # Of a pass on average, over which a row is read when its window ends.
            bytes_accessed=4 * (rows_TX.size + entry_BC.size * H),
        ),
        grid=(entry_BC.size, H // LANES),
        grid_names=("window", "lanes"),
        kernel_name="compress",
    )(
        table_BC4.reshape(-1, 4).astype(jnp.int32),
        pending.rows_LBCH.reshape(-1, rows_TX.shape[1]),
    )
    entries = store(
        pooled_NH.reshape(*entry_BC.shape, H),
        (entry_BC, ended_BC),
        *(entries, weight_H, frequencies_h),
        ratio=ratio,
        eps=eps,
        amplitude=amplitude,
    )
    return pending.rows_LBCH, entries.rows_LBCH


def _pool(windows_ref, ring_ref, pooled_ref, *, length, chunk, later):
    """128 channels of a window; zeros if it does not end.

    Args:
      windows_ref: [N, 4] where the slot's ring begins; the first position's place in
        it; the window's chunks from .. to - 1.
      ring_ref: [places, X], v of each series, then z of each.
      pooled_ref: [N, H].
      length: of the ring.
      chunk: rows of a chunk.
      later: the first chunk of the second series, where there are two.
    """
    n, H = jax.lax.axis_index("window"), pooled_ref.shape[1]
    lanes = jax.lax.axis_index("lanes") * LANES
    ring, first, begin, end = (windows_ref[n, k] for k in range(4))
    layout = plgpu.Layout.WG_STRIDED((LANES,), 1)
    X = ring_ref.shape[1]

    def rows(place, channel):
        here = pl.ds(pl.multiple_of(channel, LANES), LANES)
        refs = [ring_ref.at[place + r, here] for r in range(chunk)]
        return [plgpu.load(ref, layout=layout, optimized=False) for ref in refs]

    def add(j, carry):
        greatest_H, total_H, sum_H = carry
        place = ring + jax.lax.rem(first + j * chunk, length)
        channel = lanes
        if X > 2 * H:
            channel += jnp.where(j < later, 0, H)
        values, logits = rows(place, channel), rows(place, X // 2 + channel)
        new_H = functools.reduce(jnp.maximum, logits, greatest_H)
        keep_H = jnp.exp(greatest_H - new_H)
        total_H, sum_H = total_H * keep_H, sum_H * keep_H
        for value_H, logit_H in zip(values, logits):
            weight_H = jnp.exp(logit_H - new_H)
            total_H, sum_H = total_H + weight_H, sum_H + weight_H * value_H
        return new_H, total_H, sum_H

    def filled(value):
        return plgpu.layout_cast(jnp.full((LANES,), value, jnp.float32), layout)

    start = filled(_LEAST), filled(0.0), filled(0.0)
    _, total_H, sum_H = jax.lax.fori_loop(begin, end, add, start)
    out = pooled_ref.at[n, pl.ds(pl.multiple_of(lanes, LANES), LANES)]
    pooled_H = jnp.where(total_H > 0, sum_H / jnp.maximum(total_H, 1e-30), 0.0)
    plgpu.store(out, pooled_H, optimized=False)
