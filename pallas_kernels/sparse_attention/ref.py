"""The XLA reference, and the specification, of `sparse_attention`.

Queries go in blocks of `window`, so that a long prefill reads 2 windows of recent rows
per query, not all of them. Chosen entries are gathered where that reads fewer rows than
masking all entries does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.precision import precision, wide_type, widened


def sparse_attention_xla(
    q_BQNH: Float[Array, "B Q N H"],
    recent_BRH: Float[Array, "B R H"],
    spans_BQ2: Int[Array, "B Q 2"],
    sinks_N: Float[Array, " N"],
    entries_LBCH: Float[Array, "L B C H"] | None,
    layer: int | Int[Array, ""],
    limits_BQ: Int[Array, "B Q"] | None,
    chosen_BQX: Int[Array, "B Q X"] | None,
    window: int,
    scale: float,
) -> Float[Array, "B Q N H"]:
    """See `api.sparse_attention`."""

    def attend(q_BqNH, recent_BrH, spans_Bq2, limits_Bq, chosen_BqX):
        row_r = jnp.arange(recent_BrH.shape[1])
        seen_Bqr = (row_r >= spans_Bq2[..., :1]) & (row_r < spans_Bq2[..., 1:])
        parts = [masked_scores(q_BqNH, recent_BrH, seen_Bqr, scale)]
        values = [recent_BrH]
        if entries_LBCH is not None:
            keys, seen = _entries(entries_LBCH, layer, limits_Bq, chosen_BqX)
            parts.append(masked_scores(q_BqNH, keys, seen, scale))
            values.append(keys)
        return _weighted(parts, values, sinks_N).astype(q_BqNH.dtype)

    rows = q_BQNH.shape[1]
    if rows <= window:
        return attend(q_BQNH, recent_BRH, spans_BQ2, limits_BQ, chosen_BQX)
    blocks = -(-rows // window)
    before = recent_BRH.shape[1] - rows
    missing = blocks * window - rows

    def blocked(x_BQ):
        if x_BQ is None:
            return None
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x_BQ.ndim - 2)
        x_BQ = jnp.pad(x_BQ, widths).reshape(len(x_BQ), blocks, window, *x_BQ.shape[2:])
        return jnp.moveaxis(x_BQ, 1, 0)

    recent_BRH = jnp.pad(recent_BRH, ((0, 0), (0, missing), (0, 0)))

    def block(inputs):
        index, q_BqNH, spans_Bq2, limits_Bq, chosen_BqX = inputs
        start = index * window
        length = before + window
        recent_BrH = jax.lax.dynamic_slice_in_dim(recent_BRH, start, length, axis=1)
        return attend(q_BqNH, recent_BrH, spans_Bq2 - start, limits_Bq, chosen_BqX)

    inputs = (q_BQNH, spans_BQ2, limits_BQ, chosen_BQX)
    o_nBqNH = jax.lax.map(block, (jnp.arange(blocks), *map(blocked, inputs)))
    o_BQNH = jnp.moveaxis(o_nBqNH, 0, 1)
    return o_BQNH.reshape(len(q_BQNH), -1, *q_BQNH.shape[2:])[:, :rows]


def _entries(entries_LBCH, layer, limits_BQ, chosen_BQX):
    """Keys [B, C, H] that queries share or [B, Q, X, H], and which each sees."""
    layers, slots, count, width = entries_LBCH.shape
    slot_B11 = jnp.arange(slots)[:, None, None]
    if chosen_BQX is not None and chosen_BQX[0].size < count:
        # Out of all layers' entries: a layer's own would first be copied.
        row_BQX = (layer * slots + slot_B11) * count + jnp.maximum(chosen_BQX, 0)
        return entries_LBCH.reshape(-1, width)[row_BQX], chosen_BQX >= 0
    if layers == 1:
        entries_BCH = entries_LBCH[0]
    else:
        entries_BCH = jax.lax.dynamic_index_in_dim(entries_LBCH, layer, keepdims=False)
    if chosen_BQX is None:
        return entries_BCH, jnp.arange(count) < limits_BQ[..., None]
    rows = chosen_BQX.shape[1]
    row_Q1 = jnp.arange(rows)[:, None]
    place_BQX = jnp.where(chosen_BQX < 0, count, chosen_BQX)
    seen_BQC = jnp.zeros((slots, rows, count), bool)
    return entries_BCH, seen_BQC.at[slot_B11, row_Q1, place_BQX].set(True, mode="drop")


def masked_scores(
    q_BQNH: Float[Array, "B Q N H"],
    keys: Float[Array, "..."],
    seen_BQS: Bool[Array, "B Q S"],
    scale: float,
) -> Float[Array, "B Q N S"]:
    """float32 scores [B, Q, N, S] of shared keys or each query's own; unseen -inf."""
    shape = "BSH" if keys.ndim == 3 else "BQSH"
    scores_BQNS = scale * jnp.einsum(
        f"BQNH,{shape}->BQNS",
        q_BQNH,
        keys,
        precision=precision(keys.dtype),
        preferred_element_type=wide_type(keys.dtype),
    )
    return jnp.where(seen_BQS[:, :, None], scores_BQNS, -jnp.inf)


def _weighted(parts, values, sinks_N):
    """softmax over all parts and the sink, times values; the sink has none."""
    sinks_N1 = widened(sinks_N)[:, None]
    highest = sinks_N1
    for scores_BQNS in parts:
        highest = jnp.maximum(highest, scores_BQNS.max(-1, keepdims=True))
    highest = jax.lax.stop_gradient(highest)
    total, output = jnp.exp(sinks_N1 - highest), 0.0
    for scores_BQNS, rows in zip(parts, values):
        weights_BQNS = jnp.exp(scores_BQNS - highest)
        total = total + weights_BQNS.sum(-1, keepdims=True)
        shape = "BSH" if rows.ndim == 3 else "BQSH"
        output = output + jnp.einsum(
            f"BQNS,{shape}->BQNH",
            weights_BQNS.astype(rows.dtype),
            rows,
            precision=precision(rows.dtype),
            preferred_element_type=wide_type(rows.dtype),
        )
    return output / total
