"""Queries on their way into a TPU's kernel, and outputs on theirs out of it.

In memory both lie as [T, S, K H]: head s K + k is at row s, from lane k H on. So XLA
lays out projections whose S groups of K heads have weights of their own, and no copy is
needed behind the kernel. In it, rows are [query, k, s]: pieces of S rows and H lanes,
which begin and end with tiles, change places and nothing else.

On the way in queries are normed and turned, on the way out outputs are turned back, in
float32. Pairs of channels are lanes side by side, of the last 128 of a head. The matrix
units give every pair turned by a right angle, exactly and sooner than lanes can change
places (see `Rotary.lanes`).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.precision import precision
from pallas_kernels.ragged import LANES, Ragged
from pallas_kernels.rotary import Rotary, right_angles

_TILE = 8  # rows of a tile


def head_grid(heads: int) -> tuple[int, int]:
    """S and K; K is 8 where it can be, which is how DeepSeek-V4 groups its outputs."""
    rows = heads // 8 if heads % (8 * _TILE) == 0 else _TILE
    return rows, heads // rows


def by_piece(x_N: Float[Array, " N"]) -> Float[Array, " N"]:
    """Of heads, in the order of a query's rows in the kernel."""
    return x_N.reshape(head_grid(len(x_N))).T.reshape(-1)


def turns_of(rotary: Rotary, ragged: Ragged) -> Float[Array, "G 2 Q L"]:
    """cos and sin of each group's queries, for the last lanes of a head."""
    return ragged.grouped(rotary.lanes(LANES), 0).swapaxes(1, 2)


def take_in(q_ref, rows_ref, turns_ref, *, norm):
    """Queries [Q, S, K H] to rows [Q K S, H], normed and turned where that is asked.

    Args:
      q_ref: as they came from memory.
      rows_ref: where they go.
      turns_ref: [1, 2, Q, 128], or None.
      norm: epsilon of their norm, or None.
    """
    Q, _, X = q_ref.shape
    M, H = rows_ref.shape
    N, dtype = M // Q, rows_ref.dtype

    def raw(query, first, width):
        lanes = [pl.ds(each + first, width) for each in range(0, X, H)]
        pieces = [q_ref[query, :, each].astype(jnp.float32) for each in lanes]
        return jnp.concatenate(pieces)

    if turns_ref is not None:
        last = [raw(query, H - LANES, LANES) for query in range(Q)]
        across = [_across(each_NL.astype(dtype)) for each_NL in last]
    for query in range(Q):
        x_NH = raw(query, 0, H)
        if turns_ref is not None:
            across_NL = across[query]
        if norm is not None:
            square_N1 = (x_NH * x_NH).sum(-1, keepdims=True)
            length_N1 = jax.lax.rsqrt(square_N1 * (1 / H) + norm)
            x_NH = x_NH * length_N1
            if turns_ref is not None:
                across_NL = across_NL * length_N1
        if turns_ref is not None:
            x_NH = _turned(x_NH, across_NL, turns_ref, query)
        rows_ref[pl.ds(query * N, N)] = x_NH.astype(dtype)


def give_out(sums_ref, weights_ref, o_ref, turns_ref):
    """Rows to outputs [Q, S, K H], turned back where that is asked.

    Args:
      sums_ref: [Q K S, H], of weighted values.
      weights_ref: [Q K S, 1], of weights.
      o_ref: where outputs go.
      turns_ref: as those of queries.
    """
    Q, S, _ = o_ref.shape
    M, H = sums_ref.shape
    N, dtype = M // Q, o_ref.dtype
    for query in range(Q):
        rows = pl.ds(query * N, N)
        o_NH = sums_ref[rows] * (1 / weights_ref[rows])
        if turns_ref is not None:
            across_NL = _across(o_NH[:, -LANES:].astype(dtype))
            o_NH = _turned(o_NH, -across_NL, turns_ref, query)
        for k in range(N // S):
            o_SH = o_NH[k * S : (k + 1) * S]
            o_ref[query, :, pl.ds(k * H, H)] = o_SH.astype(dtype)


def _across(x_NL):
    """Every pair of lanes turned by a right angle."""
    return jax.lax.dot(
        x_NL,
        right_angles(LANES).astype(x_NL.dtype),
        precision=precision(x_NL.dtype),
        preferred_element_type=jnp.float32,
    )


def _turned(x_NH, across_NL, turns_ref, query):
    """Turned to where a query is, of what is given with its pairs at right angles."""
    cos_1L, sin_1L = (turns_ref[0, n, pl.ds(query, 1)] for n in range(2))
    x_NL = x_NH[:, -LANES:] * cos_1L + across_NL * sin_1L
    if x_NH.shape[1] == LANES:
        return x_NL
    return jnp.concatenate([x_NH[:, :-LANES], x_NL], axis=1)


def clear_padding(slot_ref, out_any, row_ref, sem):
    """Zeros to where no slot's tokens lie; each core does its share, through a row."""
    T, core = len(slot_ref), pl.program_id(0)
    share = -(-T // pl.num_programs(0))
    row_ref[...] = jnp.zeros(row_ref.shape, row_ref.dtype)

    def each(act):
        @pl.loop(core * share, jnp.minimum((core + 1) * share, T))
        def _(t):
            copy = pltpu.make_async_copy(row_ref, out_any.at[t], sem)
            pl.when(slot_ref[t] < 0)(lambda: act(copy))

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())
