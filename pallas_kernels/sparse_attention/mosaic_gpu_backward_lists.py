"""What XLA tells the kernels of `mosaic_gpu_backward` to read.

Rows are counted in a slot: recent ones from 0, entries from row `recent` on, `length`
in all.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.ragged import Ragged
from pallas_kernels.sparse_attention.entries import Entries
from pallas_kernels.sparse_attention.mosaic_gpu_backward_queries import CHUNK
from pallas_kernels.sparse_attention.mosaic_gpu_backward_rows import BLOCK, WORD
from pallas_kernels.sparse_attention.mosaic_gpu_backward_weights import (
    LIMIT,
    NEWEST,
    OLDEST,
)
from pallas_kernels.sparse_attention.mosaic_gpu_rows import TILE_ROWS
from pallas_kernels.sparse_attention.ref import recent_spans


def tokens_of(
    ragged: Ragged,
    entries: Entries | None,
    lookback: int,
    causal: bool,
    recent: int,
    length: int,
) -> Int[Array, "T 7"]:
    """Integers of every token, see `mosaic_gpu_backward_weights`.

    Padding has no chunks. Who chose entries is not limited.
    """
    slots_T = jnp.maximum(ragged.slots_T, 0)
    spans_T2 = ragged.flat(recent_spans(ragged, lookback, causal=causal))
    oldest_T, newest_T = spans_T2[:, 0], spans_T2[:, 1]
    first_T = oldest_T // TILE_ROWS * TILE_ROWS
    recent_T = -(-(newest_T - first_T) // CHUNK)
    limits_T = used_T = jnp.zeros_like(slots_T)
    if entries is not None and entries.chosen_TX is not None:
        place_X = 1 + jnp.arange(entries.chosen_TX.shape[1])
        used_T = jnp.where(entries.chosen_TX >= 0, place_X, 0).max(1)
        limits_T = jnp.full_like(slots_T, length - recent)
    elif entries is not None:
        assert entries.limits_T is not None
        limits_T = used_T = entries.limits_T
    chunks_T = jnp.where(ragged.slots_T >= 0, recent_T - (-used_T // CHUNK), 0)
    columns = (
        *(slots_T * length, first_T, recent_T, chunks_T),
        *(oldest_T, newest_T, limits_T),
    )
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def names_of(
    ragged: Ragged, chosen_TX: Int[Array, "T X"], recent: int, length: int
) -> Int[Array, "T c t"]:
    """Where chosen rows lie among all; ~ of one that a token chose for one it did not.

    So nothing is read that no one sees.
    """
    rest = ((0, 0), (0, -chosen_TX.shape[1] % CHUNK))
    chosen_TX = jnp.pad(chosen_TX, rest, constant_values=-1)
    one_T1 = chosen_TX.max(1, keepdims=True)
    first_T1 = jnp.maximum(ragged.slots_T, 0)[:, None] * length + recent
    names_TX = jnp.where(
        chosen_TX >= 0, first_T1 + chosen_TX, ~(first_T1 + jnp.maximum(one_T1, 0))
    )
    return names_TX.reshape(len(names_TX), -1, CHUNK).astype(jnp.int32)


def words_of(chosen_TX: Int[Array, "T X"], rows: int) -> Int[Array, "T w"]:
    """A bit for each entry: whether a token chose it; 32 to a word."""
    token_T1 = jnp.arange(len(chosen_TX))[:, None]
    bits_TX = jnp.left_shift(jnp.uint32(1), (chosen_TX % WORD).astype(jnp.uint32))
    words_Tw = jnp.zeros((len(chosen_TX), rows // WORD), jnp.uint32)
    place_TX = jnp.where(chosen_TX >= 0, chosen_TX // WORD, words_Tw.shape[1])
    words_Tw = words_Tw.at[token_T1, place_TX].add(bits_TX, mode="drop")
    return words_Tw.astype(jnp.int32)


def blocks_of(
    ragged: Ragged,
    tokens_TK: Int[Array, "T 7"],
    words_Tw: Int[Array, "T w"] | None = None,
    *,
    recent: int,
    length: int,
) -> Int[Array, "K 3"]:
    """Of every 64 rows: the first token that sees any, how many follow, the first row.

    Tokens between two that see some may see none of them.
    """
    row_k = jnp.arange(0, length, BLOCK)
    oldest_T1, newest_T1, limit_T1 = (
        tokens_TK[:, k, None] for k in (OLDEST, NEWEST, LIMIT)
    )
    recent_Tk = (oldest_T1 < row_k + BLOCK) & (newest_T1 > row_k)
    if words_Tw is None:
        entries_Tk = recent + limit_T1 > row_k
    else:
        some_Te = (words_Tw != 0).reshape(len(words_Tw), -1, BLOCK // WORD).any(-1)
        entries_Tk = jnp.pad(some_Te, ((0, 0), (recent // BLOCK, 0)))
    sees_Tk = jnp.where(row_k < recent, recent_Tk, entries_Tk)
    slots_B = jnp.arange(ragged.slots)[:, None, None]
    sees_BTk = sees_Tk & (ragged.slots_T[:, None] == slots_B)
    token_T1 = jnp.arange(len(tokens_TK))[:, None]
    first_Bk = jnp.where(sees_BTk, token_T1, len(tokens_TK)).min(1)
    end_Bk = jnp.where(sees_BTk, token_T1 + 1, 0).max(1)
    count_Bk = jnp.maximum(end_Bk - first_Bk, 0)
    row_Bk = jnp.broadcast_to(row_k, first_Bk.shape)
    blocks_Bk3 = jnp.stack([first_Bk, count_Bk, row_Bk], axis=-1)
    return blocks_Bk3.reshape(-1, 3).astype(jnp.int32)
