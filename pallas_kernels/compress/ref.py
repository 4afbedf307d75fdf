"""compress in XLA.

A pass that leaves in the ring all that its windows hold is remembered first: windows
are then gathered out of the ring alone. The windows of a longer pass are gathered out
of its own rows and those before it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import rings
from pallas_kernels.channels import normalize, turn_neighbours
from pallas_kernels.precision import upcast
from pallas_kernels.ragged import LANES, Ragged, Table


def compress_xla(
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
    """See `api.compress`."""
    H = len(weight_H)
    series = rows_TX.shape[1] // (2 * H)
    entry_BC, ended_BC = windows(ragged, ratio)
    first_BC = ratio * (entry_BC + 1 - series)
    place_BCp = first_BC[..., None] + jnp.arange(series * ratio)
    lookback = series * ratio - 1
    position_T = ragged.starts_B[ragged.slots_T] + ragged.rows_T
    if rings.kept_whole(pending, ragged, lookback):
        pending = rings.append(pending, position_T, rows_TX, ragged)
        rows_BCpX = pending.take(place_BCp % pending.length)
    else:
        before_BKX, pending = rings.advance(
            pending, lookback, position_T, rows_TX, ragged
        )
        around_BRX = jnp.concatenate([before_BKX, ragged.padded(rows_TX, 0)], axis=1)
        place_BCp += (lookback - ragged.starts_B)[:, None, None]
        # Rows past the pass belong to windows that are not complete.
        place_BCp = jnp.minimum(place_BCp, around_BRX.shape[1] - 1)
        rows_BCpX = jax.vmap(lambda around_RX, place: around_RX[place])(
            around_BRX, place_BCp
        )
    pooled_BCH = pool(rows_BCpX, entry_BC, series)
    entries = store(
        pooled_BCH,
        (entry_BC, ended_BC),
        *(entries, weight_H, frequencies_h),
        ratio=ratio,
        eps=eps,
        amplitude=amplitude,
    )
    return pending.rows_LBCH, entries.rows_LBCH


def misfit(rows_TX, pending: Table, weight_H, ragged: Ragged, ratio: int) -> str | None:
    """Why a kernel cannot read windows out of their ring; None if it may."""
    (H,), ring = weight_H.shape, pending.rows_LBCH
    if rows_TX.dtype != jnp.float32 or ring.dtype != jnp.float32:
        return f"remembers rows in float32, not {rows_TX.dtype} in {ring.dtype}"
    if H % LANES:
        return f"needs entries that are a multiple of {LANES} wide, got {H}"
    series = rows_TX.shape[1] // (2 * H)
    if not rings.kept_whole(pending, ragged, series * ratio - 1):
        return (
            f"reads windows of {series * ratio} positions out of a ring, and "
            f"{ragged.rows} tokens do not fit beside one in {pending.length} rows"
        )
    return None


def store(
    pooled_BCH: Float[Array, "B C H"],
    windows: tuple[Int[Array, "B C"], Bool[Array, "B C"]],
    entries: Table,
    weight_H: Float[Array, " H"],
    frequencies_h: Float[Array, " h"],
    *,
    ratio: int,
    eps: float,
    amplitude: float,
) -> Table:
    """Norms and turns what was pooled, and writes it where a window ended."""
    entry_BC, ended_BC = windows
    new_BCH = upcast(weight_H) * normalize(pooled_BCH, eps)
    turns = angles(entry_BC, frequencies_h, ratio=ratio, amplitude=amplitude)
    new_BCH = turn_neighbours(new_BCH, *turns)
    slot_BC = jnp.broadcast_to(jnp.arange(len(entry_BC))[:, None], entry_BC.shape)
    new_NH = new_BCH.reshape(-1, len(weight_H))
    return entries.put(slot_BC.ravel(), entry_BC.ravel(), new_NH, ended_BC.ravel())


def windows(ragged: Ragged, ratio: int) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
    """The entries that may end in a pass, and whether they do.

    A pass of Q positions ends at most ceil(Q / m) windows.
    """
    count = -(-ragged.rows // ratio)
    entry_BC = (ragged.starts_B // ratio)[:, None] + jnp.arange(count)
    ends_B = ragged.starts_B + ragged.counts_B
    return entry_BC, ratio * (entry_BC + 1) <= ends_B[:, None]


def pool(
    rows_BCpX: Float[Array, "B C p X"], entry_BC: Int[Array, "B C"], series: int
) -> Float[Array, "B C H"]:
    """Sums of values by softmax of logits, per channel over a window's positions."""
    values, logits = jnp.split(rows_BCpX, 2, axis=-1)
    if series == 2:
        values, logits = map(_overlapping, (values, logits))
        # Entry 0 has no window before it.
        span = values.shape[2]
        missing_BCp = (entry_BC == 0)[..., None] & (jnp.arange(span) < span // 2)
        logits = jnp.where(missing_BCp[..., None], -jnp.inf, logits)
        values = jnp.where(missing_BCp[..., None], 0.0, values)
    return jnp.sum(jax.nn.softmax(logits, axis=2) * values, axis=2)


def _overlapping(rows_BCpX):
    """The first series of the earlier window, the second of the later one."""
    earlier, later = jnp.split(rows_BCpX, 2, axis=2)
    width = rows_BCpX.shape[-1] // 2
    return jnp.concatenate([earlier[..., :width], later[..., width:]], axis=2)


def angles(
    entry_BC: Int[Array, "B C"],
    frequencies_h: Float[Array, " h"],
    *,
    ratio: int,
    amplitude: float,
) -> tuple[Float[Array, "B C h"], Float[Array, "B C h"]]:
    """cos and sin at each entry's first position, in float32."""
    position_BC1 = (ratio * entry_BC).astype(jnp.float32)[..., None]
    angles_BCh = position_BC1 * frequencies_h
    return jnp.cos(angles_BCh) * amplitude, jnp.sin(angles_BCh) * amplitude
