"""Expert parallelism: tokens travel to the experts, and their outputs back.

    y_t = sum_x w_tx expert_e(t,x)(x_t)

The E experts of a layer are shared out over the mesh axes `expert` and `model`, slots
over `data` and `expert`; so tokens travel along `expert` alone, and shards along
`model`, which hold the same tokens, sum what their experts make of them. A token
goes once to each shard that has one of its experts, with all its routes; the shard
multiplies those that are its own and returns their weighted sum. No buffer can
overflow, so no token is ever dropped, however skewed the routing.

Rows that travel per layer and shard, each way, of n shards with T tokens of width D:

    gather   (n - 1) T   tokens to everybody, sums by a reduce-scatter; runs everywhere
    padded   (n - 1) T   one all-to-all of buffers with room for every token; runs
                         everywhere, and is what the others are held against
    ragged   about min(n, X) T   only tokens that are wanted; TPUs and GPUs

    T  tokens of a shard         E  experts of a layer       n  shards along `expert`
    R  rows that a shard works   X  experts of a token       C  rows of a buffer, T
       through, its own or not   P  rows a shard sends       D  width
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.parallel.axes import EXPERT, EXPERTS, MODEL, index, own, size, total
from pallas_kernels.dispatch import expected_platform

# Maps rows, their experts among a shard's own (-1: another's, or none) and weights to
# the weighted sums of those experts' outputs, in the type that sums travel in.
type Local = Callable[
    [Float[Array, "R D"], Int[Array, "R X"], Float[Array, "R X"]], Float[Array, "R D"]
]
# On TPUs rows are tiled by eights: fewer, and a reduce-scatter becomes an all-reduce.
_TILE = 8
# From so many tokens per shard on what is sent counts, below only how often.
_MANY = 64


def exchange(
    local: Local,
    x_TD: Float[Array, "T D"],
    experts_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"],
    *,
    count: int,
    how: str | None = None,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts, wherever they are.

    Args:
      local: a shard's own experts.
      x_TD: tokens.
      experts_TX: experts of each, -1 for none.
      weights_TX: of their outputs.
      count: E, experts on all shards.
      how: "gather", "padded" or "ragged"; None takes what suits, see `suitable`.

    Raises:
      ValueError: there is no such exchange.
    """
    shards = size(EXPERTS)
    if shards == 1:
        return local(x_TD, experts_TX, weights_TX)

    def among_own(x_RD, experts_RX, weights_RX):
        mine_RX, here_RX = own(experts_RX, count // shards, EXPERTS)
        return local(x_RD, jnp.where(here_RX, mine_RX, -1), weights_RX)

    n = size(EXPERT)
    if n == 1:
        return total(among_own(x_TD, experts_TX, weights_TX), MODEL)
    how = how or suitable(len(x_TD), n, experts_TX.shape[1])
    if how == "gather":
        return total(_gather(among_own, x_TD, experts_TX, weights_TX), MODEL)
    if how not in ("padded", "ragged"):
        raise ValueError(f"unknown exchange {how!r}; expected gather, padded or ragged")
    # Experts of the shards with one index along `expert` lie together.
    to_TX = jnp.where(experts_TX < 0, n, experts_TX // (count // n))
    wanted_nT = jnp.any(to_TX[..., None] == jnp.arange(n), axis=1).T
    run = _padded if how == "padded" else _ragged
    return total(run(among_own, x_TD, experts_TX, weights_TX, wanted_nT), MODEL)


def suitable(tokens: int, shards: int, top_k: int) -> str:
    """The exchange for so many tokens per shard.

    Few tokens, as in decoding, are quickest gathered: two collectives of a few hundred
    kilobytes, whose start costs more than their bytes. Ragged ones pay where they move
    less, that is with more shards than experts per token.
    """
    if expected_platform() == "cpu" or tokens < _MANY or shards <= top_k:
        return "gather"
    return "ragged"


def _gather(local, x_TD, experts_TX, weights_TX):
    rows = len(x_TD)
    fill = partial(_pad_rows, more=-rows % _TILE)
    with jax.named_scope("dispatch"):
        x_RD, experts_RX, weights_RX = _gathered(
            fill(x_TD), fill(experts_TX, value=-1), fill(weights_TX)
        )
    y_RD = local(x_RD, experts_RX, weights_RX)
    with jax.named_scope("combine"):
        y_TD = jax.lax.psum_scatter(y_RD, EXPERT, tiled=True)
    return y_TD[:rows]


def _pad_rows(x, *, more: int, value=0):
    return jnp.pad(x, ((0, more), (0, 0)), constant_values=value) if more else x


@jax.custom_vjp
def _gathered(x_TD, experts_TX, weights_TX):
    """All shards' tokens and routes, by two collectives.

    Routes go as one array of int32, through which no gradient would pass by itself.
    """
    x_RD, routes_RY = (
        jax.lax.all_gather(x, EXPERT, tiled=True)
        for x in (x_TD, _routes(experts_TX, weights_TX))
    )
    return x_RD, *_unpacked(routes_RY)


def _routes(experts_TX, weights_TX) -> Int[Array, "T 2*X"]:
    """Experts and weights in one array, so that one collective takes both."""
    bits_TX = jax.lax.bitcast_convert_type(weights_TX, jnp.int32)
    return jnp.concatenate([experts_TX, bits_TX], axis=1)


def _unpacked(routes_RY):
    experts_RX, bits_RX = jnp.split(routes_RY, 2, axis=1)
    return experts_RX, jax.lax.bitcast_convert_type(bits_RX, jnp.float32)


def _forward(*operands):
    return _gathered(*operands), None


def _backward(_, cotangents):
    dx_RD, _, dweights_RX = cotangents
    dx_TD, dweights_TX = (
        jax.lax.psum_scatter(d, EXPERT, tiled=True) for d in (dx_RD, dweights_RX)
    )
    return dx_TD, None, dweights_TX


_gathered.defvjp(_forward, _backward)


def _padded(local, x_TD, experts_TX, weights_TX, wanted_nT: Bool[Array, "n T"]):
    n, T = wanted_nT.shape
    place_nT = jnp.where(wanted_nT, jnp.cumsum(wanted_nT, axis=1) - 1, T)
    token_nT = jnp.broadcast_to(jnp.arange(T), (n, T))
    token_nC = (
        jnp.full((n, T), T)
        .at[jnp.arange(n)[:, None], place_nT]
        .set(token_nT, mode="drop")
    )
    with jax.named_scope("dispatch"):
        x_RD, experts_RX, weights_RX = (
            _all_to_all(_rows(x, token_nC, value)).reshape(n * T, -1)
            for x, value in ((x_TD, 0), (experts_TX, -1), (weights_TX, 0))
        )
    y_RD = local(x_RD, experts_RX, weights_RX)
    with jax.named_scope("combine"):
        y_PD = _all_to_all(y_RD.reshape(n, T, -1)).reshape(n * T, -1)
    return _sum_rows(y_PD, token_nC.ravel(), T)


def _all_to_all(x_nC):
    return jax.lax.all_to_all(x_nC, EXPERT, 0, 0, tiled=True)


def _rows(x_T, token_P, value):
    """Rows by token; `value` where there is none."""
    return x_T.at[token_P].get(mode="fill", fill_value=value)


def _sum_rows(y_PD, token_P, tokens: int):
    """Of every token the sum of its rows."""
    zeros_TD = jnp.zeros((tokens, y_PD.shape[1]), y_PD.dtype)
    return zeros_TD.at[token_P].add(y_PD, mode="drop")


def _ragged(local, x_TD, experts_TX, weights_TX, wanted_nT: Bool[Array, "n T"]):
    n, T = wanted_nT.shape
    me = index(EXPERT)
    sent_n = jnp.sum(wanted_nT, axis=1, dtype=jnp.int32)
    # Of every shard to every other. What a shard gets lies in the order of senders,
    # what it sends in that of receivers.
    sent_nn = jax.lax.all_gather(sent_n, EXPERT)
    got_n = sent_nn[:, me]
    there_nn = jnp.cumsum(sent_nn, axis=0) - sent_nn
    here_nn = jnp.cumsum(sent_nn, axis=1) - sent_nn
    rows = T * min(n, experts_TX.shape[1])
    place_P = jnp.cumsum(wanted_nT.ravel()) - 1
    place_P = jnp.where(wanted_nT.ravel(), place_P, rows)
    token_P = (
        jnp.full((rows,), T).at[place_P].set(jnp.tile(jnp.arange(T), n), mode="drop")
    )

    def send(x_T, value):
        out = jnp.full((n * T, x_T.shape[1]), value, x_T.dtype)
        return jax.lax.ragged_all_to_all(
            _rows(x_T, token_P, value),
            out,
            here_nn[me],
            sent_n,
            there_nn[me],
            got_n,
            axis_name=EXPERT,
        )

    with jax.named_scope("dispatch"):
        # Weights by themselves: gradients pass through them.
        x_RD, weights_RX = send(x_TD, 0), send(weights_TX, 0)
        experts_RX = send(experts_TX, -1)
    y_RD = local(x_RD, experts_RX, weights_RX)
    with jax.named_scope("combine"):
        y_PD = jax.lax.ragged_all_to_all(
            y_RD,
            jnp.zeros((rows, y_RD.shape[1]), y_RD.dtype),
            there_nn[:, me],
            got_n,
            here_nn[:, me],
            sent_n,
            axis_name=EXPERT,
        )
    return _sum_rows(y_PD, token_P, T)
