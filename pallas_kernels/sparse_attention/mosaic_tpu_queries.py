"""Queries on their way into a TPU's kernel, and outputs on theirs out of it.

Queries come as a projection leaves them, in tiles of 8 tokens and 128 lanes: a group
asks for the tiles of its tokens, of which it may have one in common with the group
before it. Outputs leave as [T, S, K H]: head s K + k is at row s, from lane k H on. So
XLA lays out projections whose S groups of K heads have weights of their own, and
nothing is copied before or behind the kernel. In it, rows are [query, k, s].

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

from pallas_kernels.precision import product
from pallas_kernels.ragged import LANES, Ragged
from pallas_kernels.rotary import Rotary, right_angles

_TILE = 8  # rows of a tile
# JAX's simulator of TPU memory cannot read a buffer as words; tests there go without.
AS_WORDS = True


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


def in_tiles(q_TNH: Float[Array, "T N H"]) -> Float[Array, "t x L"]:
    """Queries as they lie behind a projection, row 8 x + r of lanes x, token r."""
    q_TX = q_TNH.reshape(len(q_TNH), -1)
    q_TX = jnp.pad(q_TX, ((0, -len(q_TX) % _TILE), (0, 0)))
    q_t8xL = q_TX.reshape(-1, _TILE, q_TX.shape[1] // LANES, LANES)
    return q_t8xL.swapaxes(1, 2).reshape(len(q_t8xL), -1, LANES)


def fetch(first, count, q_any, tiles_ref, there_ref, sems):
    """Asks for the tiles of some tokens that are not there yet.

    Args:
      first: of the tokens.
      count: of them, 8 at most.
      q_any: see `in_tiles`.
      tiles_ref: [2, 8 x, 128], even tiles and odd ones.
      there_ref: [2, 2] in scalar memory: which tiles are there or on their way, and
        whether they are on their way.
      sems: of both.
    """
    for k in range(2):
        tile = first // _TILE + k
        side = tile % 2
        wanted = (count > 0) & (tile * _TILE < first + count)

        @pl.when(wanted & (there_ref[0, side] != tile))
        def _(tile=tile, side=side):
            ends = q_any.at[tile], tiles_ref.at[side]
            pltpu.make_async_copy(*ends, sems.at[side]).start()
            there_ref[0, side], there_ref[1, side] = tile, 1


def arrive(tiles_ref, tokens_ref, there_ref, sems):
    """Waits for tiles that are on their way, and takes their tokens apart.

    Args:
      tiles_ref: see `fetch`.
      tokens_ref: [2, 8, K S, H], where those of even tiles and odd ones go.
      there_ref: see `fetch`.
      sems: of both tiles.
    """

    @pl.loop(0, 2)
    def _(side):
        @pl.when(there_ref[1, side] == 1)
        def _():
            tile = tiles_ref.at[side]
            pltpu.make_async_copy(tile, tile, sems.at[side]).wait()
            there_ref[1, side] = 0
            for row in range(_TILE):
                tokens_ref[side, row] = _heads(
                    tiles_ref, side, row, *tokens_ref.shape[2:]
                )


def take_in(first, tokens_ref, rows_ref, turns_ref, *, norm):
    """Queries of a group to rows [Q K S, H], normed and turned where that is asked.

    Args:
      first: the first query's token.
      tokens_ref: see `arrive`.
      rows_ref: where they go.
      turns_ref: [1, 2, Q, 128], or None.
      norm: epsilon of their norm, or None.
    """
    (M, H), dtype = rows_ref.shape, rows_ref.dtype
    N = tokens_ref.shape[2]
    Q = M // N

    def raw(query, lanes):
        token = first + query
        x_NH = tokens_ref[token // _TILE % 2, token % _TILE, :, lanes]
        return x_NH.astype(jnp.float32)

    if turns_ref is not None:
        last = [raw(query, pl.ds(H - LANES, LANES)) for query in range(Q)]
        across = [_across(each_NL.astype(dtype)) for each_NL in last]
    for query in range(Q):
        x_NH = raw(query, pl.ds(0, H))
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


def _heads(tiles_ref, side, row, heads, width):
    """A token's heads [K S, H] out of a tile."""
    S, K = head_grid(heads)
    columns = width // LANES
    stride = K * columns * _TILE

    def piece(column):
        """128 lanes of S heads."""
        if tiles_ref.dtype != jnp.bfloat16 or not AS_WORDS:
            rows = pl.ds(column * _TILE + row, S, stride=stride)
            return tiles_ref[side, rows].astype(jnp.float32)
        # A word holds a lane of two tokens, of the first in its lower half.
        rows = pl.ds((column * _TILE + row) // 2, S, stride=stride // 2)
        words = tiles_ref.bitcast(jnp.uint32)[side, rows]
        upper = words & jnp.uint32(0xFFFF0000) if row % 2 else words << 16
        return pltpu.bitcast(upper, jnp.float32)

    pieces = [[piece(k * columns + c) for c in range(columns)] for k in range(K)]
    x_NH = jnp.concatenate([jnp.concatenate(each, axis=1) for each in pieces])
    return x_NH.astype(tiles_ref.dtype)


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
    return product(x_NL, right_angles(LANES).astype(x_NL.dtype), (1, 0))


def _turned(x_NH, across_NL, turns_ref, query):
    """Turned to where a query is, of what is given with its pairs at right angles."""
    cos_1L, sin_1L = (turns_ref[0, n, pl.ds(query, 1)] for n in range(2))
    x_NL = x_NH[:, -LANES:] * cos_1L + across_NL * sin_1L
    if x_NH.shape[1] == LANES:
        return x_NL
    return jnp.concatenate([x_NH[:, :-LANES], x_NL], axis=1)


def turn(rows_ref, query, turns_ref, *, back: bool = False):
    """Turns a query's heads where they lie, in [Q, N, H]; `turns_ref` as above."""
    last = (query, slice(None), pl.ds(rows_ref.shape[2] - LANES, LANES))
    x_NL = rows_ref[last]
    across_NL = _across(x_NL)
    x_NL = _turned(x_NL, -across_NL if back else across_NL, turns_ref, query)
    rows_ref[last] = x_NL.astype(rows_ref.dtype)


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
