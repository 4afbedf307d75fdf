"""The XLA reference, and the specification, of `sparse_attention`.

Queries go in blocks of a window, so that a long prefill reads 2 windows of recent rows
per query, not all of them. Chosen entries are gathered where that reads fewer rows than
masking all entries does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.channels import normalize
from pallas_kernels.indexer_topk.ref import choices_of
from pallas_kernels.precision import accum_dtype, precision, upcast
from pallas_kernels.ragged import Ragged, Table
from pallas_kernels.rotary import Rotary
from pallas_kernels.sparse_attention.entries import Entries


def sparse_attention_xla(
    q_TNH: Float[Array, "T N H"],
    keys_TH: Float[Array, "T H"],
    before_BWH: Float[Array, "B W H"],
    sinks_N: Float[Array, " N"],
    ragged: Ragged,
    entries: Entries | None,
    rotary: Rotary | None,
    scale: float,
    causal: bool,
    query_norm: float | None,
) -> Float[Array, "T N H"]:
    """See `api.sparse_attention`."""
    q_TNH = turned_queries(q_TNH, rotary, query_norm)
    operands = (keys_TH, before_BWH, sinks_N, ragged, entries)
    o_TNH = _attend(q_TNH, *operands, scale, causal)
    return o_TNH if rotary is None else rotary.inverse(o_TNH)


def turned_queries(
    q_TNH: Float[Array, "T N H"], rotary: Rotary | None, query_norm: float | None
) -> Float[Array, "T N H"]:
    """Queries as they meet keys: normed and turned, rounded once."""
    dtype = q_TNH.dtype
    if query_norm is not None:
        q_TNH = normalize(q_TNH, query_norm)
    return (q_TNH if rotary is None else rotary(q_TNH)).astype(dtype)


def _attend(q_TNH, keys_TH, before_BWH, sinks_N, ragged, entries, scale, causal):
    """The attention itself."""
    recent_BRH = recent_rows(before_BWH, keys_TH, ragged)
    lookback, rows = before_BWH.shape[1], ragged.rows
    per_query = (
        ragged.padded(q_TNH, 0),
        recent_spans(ragged, lookback, causal=causal),
        *_padded_entries(entries, ragged),
    )

    def attend(recent_BrH, q_BqNH, spans_Bq2, limits_Bq, chosen_BqX):
        row_r = jnp.arange(recent_BrH.shape[1])
        seen_Bqr = (row_r >= spans_Bq2[..., :1]) & (row_r < spans_Bq2[..., 1:])
        parts = [masked_scores(q_BqNH, recent_BrH, seen_Bqr, scale)]
        values = [recent_BrH]
        if entries is not None:
            keys, seen = _entries(entries.table, limits_Bq, chosen_BqX)
            parts.append(masked_scores(q_BqNH, keys, seen, scale))
            values.append(keys)
        return _weighted(parts, values, sinks_N).astype(q_BqNH.dtype)

    window = lookback + 1
    if rows <= window or not causal:
        return ragged.flat(attend(recent_BRH, *per_query))
    blocks = -(-rows // window)
    missing = blocks * window - rows

    def blocked(x_BQ):
        if x_BQ is None:
            return None
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x_BQ.ndim - 2)
        x_BQ = jnp.pad(x_BQ, widths).reshape(len(x_BQ), blocks, window, *x_BQ.shape[2:])
        return jnp.moveaxis(x_BQ, 1, 0)

    recent_BRH = jnp.pad(recent_BRH, ((0, 0), (0, missing), (0, 0)))

    def block(inputs):
        index, q_BqNH, spans_Bq2, *seen = inputs
        start = index * window
        recent_BrH = jax.lax.dynamic_slice_in_dim(
            recent_BRH, start, lookback + window, axis=1
        )
        return attend(recent_BrH, q_BqNH, spans_Bq2 - start, *seen)

    # For gradients a block is computed again: its scores would be kept for all blocks.
    inputs = (jnp.arange(blocks), *map(blocked, per_query))
    o_nBqNH = jax.lax.map(jax.checkpoint(block), inputs)
    o_BQNH = jnp.moveaxis(o_nBqNH, 0, 1)
    o_BQNH = o_BQNH.reshape(ragged.slots, -1, *q_TNH.shape[1:])
    return ragged.flat(o_BQNH[:, :rows])


def recent_rows(
    before_BWH: Float[Array, "B W H"], keys_TH: Float[Array, "T H"], ragged: Ragged
) -> Float[Array, "B R H"]:
    """The W rows before each slot's tokens, then its own Q."""
    return jnp.concatenate([before_BWH, ragged.padded(keys_TH, 0)], axis=1)


def recent_spans(
    ragged: Ragged, lookback: int, *, causal: bool = True
) -> Int[Array, "B Q 2"]:
    """Of `recent_rows`, a query sees rows from .. to - 1.

    Row i lies at position start - lookback + i; none is seen before position 0.
    """
    row_Q = jnp.arange(ragged.rows)
    first_B1 = jnp.maximum(lookback - ragged.starts_B[:, None], 0)
    if causal:
        oldest_BQ = jnp.maximum(row_Q, first_B1)
        newest_BQ = jnp.broadcast_to(row_Q + lookback + 1, oldest_BQ.shape)
    else:
        oldest_BQ = jnp.broadcast_to(first_B1, (ragged.slots, ragged.rows))
        newest_BQ = jnp.broadcast_to(
            lookback + ragged.counts_B[:, None], oldest_BQ.shape
        )
    return jnp.stack([oldest_BQ, newest_BQ], axis=-1)


def _padded_entries(entries, ragged):
    """Limits and choices, one of which there is none of."""
    if entries is None:
        return None, None
    if not entries.some:
        return ragged.padded(entries.limits_T, 0), None
    return None, ragged.padded(choices_of(entries, ragged), -1)


def _entries(table: Table, limits_BQ, chosen_BQX):
    """Keys [B, C, H] that queries share or [B, Q, X, H], and which each sees."""
    count = table.length
    if chosen_BQX is None:
        return table.whole(), jnp.arange(count) < limits_BQ[..., None]
    if chosen_BQX[0].size < count:
        return table.take(jnp.maximum(chosen_BQX, 0)), chosen_BQX >= 0
    slots, rows, _ = chosen_BQX.shape
    slot_B11, row_Q1 = jnp.arange(slots)[:, None, None], jnp.arange(rows)[:, None]
    place_BQX = jnp.where(chosen_BQX < 0, count, chosen_BQX)
    seen_BQC = jnp.zeros((slots, rows, count), bool)
    seen_BQC = seen_BQC.at[slot_B11, row_Q1, place_BQX].set(True, mode="drop")
    return table.whole(), seen_BQC


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
        preferred_element_type=accum_dtype(keys.dtype),
    )
    return jnp.where(seen_BQS[:, :, None], scores_BQNS, -jnp.inf)


def _weighted(parts, values, sinks_N):
    """softmax over all parts and the sink, times values; the sink has none."""
    sinks_N1 = upcast(sinks_N)[:, None]
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
            preferred_element_type=accum_dtype(rows.dtype),
        )
    return output / total
