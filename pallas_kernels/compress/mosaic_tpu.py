"""`compress` on TPUs: only windows that end are read.

Moved: every row of the pass into its place in the ring, one copy each; then, for each
window that ends, the channels of its series, out of the ring, in pieces that do not
wrap around; the finished entry to its place in the table. A window of 128 positions
ends in one of some twenty passes of a slot, which XLA, whose shapes are those of the
worst pass, reads in all of them, several times. Ring and tables are changed where they
lie, out of all layers' stacks.

Computed: a softmax over positions for every channel, the norm, and the turn of the
last channels; all by vector units, which takes less time than the copies.

Windows that end are listed first, in scalar memory. Copies of the next ones are on
their way while one is computed. A row of a table in bfloat16 shares its words with
neighbours, so there the rows around an entry are read, changed and written, unless
rows lie by themselves (see `split_lanes`). A TPU of two cores gives each half of the
slots; windows of one slot, which may be neighbours in the table, stay in order.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compress.mosaic_tpu_kernel import kernel
from pallas_kernels.compress.mosaic_tpu_sizes import TILE, Sizes
from pallas_kernels.compress.ref import compress_xla, misfit, windows
from pallas_kernels.gradients import with_gradients_of
from pallas_kernels.ragged import LANES, Ragged, Table

_CORES = 2
_VMEM = 16 << 20
# Windows of a pass: some words of each lie in scalar memory, their angles in VMEM.
_MOST_WINDOWS = 1 << 11
# Of a window in VMEM, and copies of its parts.
_MOST_BYTES, _MOST_COPIES = 1 << 20, 64


def supports(
    rows_TX, pending, entries, weight_H, frequencies_h, ragged, *, ratio, eps, amplitude
) -> str | None:
    """Why the kernel cannot compress these; None if it can."""
    if reason := misfit(rows_TX, pending, weight_H, ragged, ratio):
        return reason
    (H,), table = weight_H.shape, entries.rows_LBCH
    if table.dtype not in (jnp.float32, jnp.bfloat16):
        return f"writes entries in float32 or bfloat16, not {table.dtype}"
    if table.ndim == 4 and table.dtype != jnp.float32 and table.shape[2] % TILE:
        return f"writes entries by {TILE}, got {table.shape[2]} of a slot or page"
    series = rows_TX.shape[1] // (2 * H)
    if (size := 8 * series * ratio * H) > _MOST_BYTES:
        return f"holds windows of up to {_MOST_BYTES:,} bytes, got {size:,}"
    if series * ratio // math.gcd(ratio, pending.length) > _MOST_COPIES:
        return f"cannot read windows of {ratio} out of {pending.length} rows in pieces"
    if (count := ragged.slots * -(-ragged.rows // ratio)) > _MOST_WINDOWS:
        return f"ends up to {_MOST_WINDOWS} windows, not {count}"
    return None


@with_gradients_of(compress_xla)
def compress_mosaic_tpu(
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
    (T, X), H, B = rows_TX.shape, len(weight_H), ragged.slots
    ring, table = pending.rows_LBCH, entries.rows_LBCH
    entry_BC, ended_BC = windows(ragged, ratio)
    count = entry_BC.shape[1]
    per = -(-B // _CORES)
    slot_N = jnp.repeat(jnp.arange(B), count)
    place_N, may_N = entries.written(slot_N, entry_BC.ravel(), ended_BC.ravel())
    place_N = jnp.where(may_N, place_N, -1)
    missing = _CORES * per - B

    def padded(x_B, fill=0, each=1):
        return jnp.pad(x_B.astype(jnp.int32), (0, missing * each), constant_values=fill)

    apart = table.ndim == 5
    sizes = Sizes(
        ratio=ratio,
        series=X // (2 * H),
        width=H,
        slots=B,
        slots_per_core=per,
        windows=count,
        length=pending.length,
        piece=math.gcd(ratio, pending.length),
        shared=not apart and table.dtype != jnp.float32,
        eps=eps,
    )
    block = (TILE, H) if sizes.shared else (H // LANES, LANES) if apart else (1, H)
    turns = turning_lanes(ratio * entry_BC, frequencies_h, amplitude)
    there = pl.BlockSpec(memory_space=pltpu.HBM)
    flat_ring = ring.reshape(-1, X)
    flat_table = table.reshape(-1, *table.shape[3:])
    # On the average; XLA wants to know how long it takes.
    windows_ended = min(B * count, T / ratio)
    visited = int(windows_ended * sizes.span * H)
    made = -(-per * count // sizes.together) * sizes.together
    flat_ring, flat_table = pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (flat_ring, flat_table)
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(_CORES,),
            in_specs=[there] * 6,
            out_specs=[there, there],
            scratch_shapes=[
                pltpu.VMEM(
                    (sizes.depth, sizes.together, 2, sizes.span, H),
                    jnp.float32,
                ),
                pltpu.VMEM((made, *block), table.dtype),
                *[pltpu.VMEM(each.shape, jnp.float32) for each in turns],
                pltpu.VMEM((1, H), jnp.float32),
                *[pltpu.SMEM((per * count + 1,), jnp.int32)] * 4,
                pltpu.SemaphoreType.DMA((3 + sizes.depth,)),
            ],
        ),
        input_output_aliases={9: 0, 10: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,
            vmem_limit_bytes=_VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=5 * visited,
            transcendentals=visited,
            bytes_accessed=8 * (visited + T * X)
            + int(2 * windows_ended * math.prod(block)) * table.dtype.itemsize,
        ),
        name="compress",
    )(
        jnp.asarray(pending.layer, jnp.int32).reshape(1),
        padded(ragged.starts_B),
        padded(ragged.counts_B),
        padded(ragged.offsets_B),
        padded(place_N, -1, count),
        rows_TX,
        *turns,
        weight_H.astype(jnp.float32).reshape(1, H),
        flat_ring,
        flat_table,
    )
    return flat_ring.reshape(ring.shape), flat_table.reshape(table.shape)


def turning_lanes(
    position_BC: Int[Array, "B C"], frequencies_h: Float[Array, " h"], amplitude: float
) -> tuple[Float[Array, "N R"], Float[Array, "N R"]]:
    """Factors of the last R channels, and of their neighbours, at each position.

    Made as they lie, each angle twice: XLA needs more time to move lanes.
    """
    still, h = -2 * len(frequencies_h) % LANES, len(frequencies_h)
    frequencies_R = jnp.pad(jnp.repeat(frequencies_h, 2), (still, 0))
    angles_NR = position_BC.reshape(-1, 1).astype(jnp.float32) * frequencies_R
    sign_R = amplitude * np.pad(np.tile([-1.0, 1.0], h), (still, 0))
    cos_NR = jnp.where(sign_R == 0, 1.0, amplitude * jnp.cos(angles_NR))
    return cos_NR, jnp.asarray(sign_R, jnp.float32) * jnp.sin(angles_NR)
