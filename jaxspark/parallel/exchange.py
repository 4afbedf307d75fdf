"""Expert parallelism: tokens travel to the experts, and their outputs back.

    y_t = sum_x w_tx expert_e(t,x)(x_t)

The E experts of a layer are shared out over the mesh axes `expert` and `model`, slots
over `data` and `expert`; so tokens travel along `expert` alone, and shards along
`model`, which hold the same tokens, sum what their experts make of them. A pair is a
token and one of its experts. No buffer can overflow, so no pair is ever dropped,
however skewed the routing; but products do not run over room that is empty: a shard
works through the pairs that it got (see `models.layers.expert_pairs`).

    gather   every token goes to every shard, which returns the weighted sums of its
             pairs, over all R X of them, by a reduce-scatter; runs everywhere
    ragged   a token goes once to each shard that has one of its experts, and outputs
             of its pairs come back, to be summed in the order of one device
    padded   the same with all-to-alls of buffers for the worst case instead of ragged
             ones; runs everywhere, for tests

Rows of width D that a shard receives of others, if routing is even:

    gather   (n - 1) T in the tokens' type, and as many sums in float32 back
    ragged   at most (n - 1) min(n, X) / n T, and (n - 1) X / n T back, in their type

    T  tokens of a shard         E  experts of a layer       n  shards along `expert`
    R  rows that a shard gets    X  experts of a token       P  rows a shard sends
    A  pairs of R rows           D  width
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.parallel.axes import EXPERT, EXPERTS, MODEL, index, own, size, total
from pallas_kernels.dispatch import expected_platform
from pallas_kernels.precision import upcast


@runtime_checkable
class Local(Protocol):
    """The experts that a shard has."""

    def __call__(
        self, x_RD: Float[Array, "R D"], experts_RX: Int[Array, "R X"], *, packed: bool
    ) -> Float[Array, "A D"]:
        """Outputs of the A = R X pairs of rows and experts.

        Args:
          x_RD: rows.
          experts_RX: experts of each, among the shard's own; -1 for none.
          packed: outputs of pairs with an expert come first, in their order, and
            anything behind them. Otherwise each has its own row, 0 without an expert.
        """
        ...


# Sends rows of its operand to where they belong in the second's place on each shard;
# further arguments and result are those of `jax.lax.ragged_all_to_all`.
type Transport = Callable[..., Array]
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
    """The weighted sum of each token's experts, wherever they are, in float32.

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
        out_AD = local(x_TD, experts_TX, packed=False)
        out_TXD = upcast(out_AD).reshape(*experts_TX.shape, -1)
        return jnp.sum(weights_TX[..., None] * out_TXD, axis=1)

    def among_own(x_RD, experts_RX):
        mine_RX, here_RX = own(experts_RX, count // shards, EXPERTS)
        return local(x_RD, jnp.where(here_RX, mine_RX, -1), packed=True), here_RX

    def own_sums(x_RD, experts_RX, weights_RX):
        out_AD, here_RX = among_own(x_RD, experts_RX)
        place_A = jnp.cumsum(here_RX.ravel()) - 1
        return _sum_pairs(out_AD, place_A.reshape(here_RX.shape), here_RX, weights_RX)

    n = size(EXPERT)
    if n == 1:
        return total(own_sums(x_TD, experts_TX, weights_TX), MODEL)
    how = how or suitable(len(x_TD), n, experts_TX.shape[1])
    if how == "gather":
        return total(_gather(own_sums, x_TD, experts_TX, weights_TX), MODEL)
    if how not in ("padded", "ragged"):
        raise ValueError(f"unknown exchange {how!r}; expected gather, padded or ragged")
    # Shards of one place along `model` exchange what their own experts take part in;
    # those of the shards with one index along `expert` lie together.
    holder_TX = experts_TX // (count // shards)
    of_model = size(MODEL)
    kept_TX = (experts_TX >= 0) & (holder_TX % of_model == index(MODEL))
    to_TX = jnp.where(kept_TX, holder_TX // of_model, n)
    transport: Transport = partial(jax.lax.ragged_all_to_all, axis_name=EXPERT)
    if how == "padded":
        transport = _padded_all_to_all
    received = _there_and_back(
        transport, lambda *rows: among_own(*rows)[0], x_TD, experts_TX, to_TX, n
    )
    return total(_sum_pairs(*received, kept_TX, weights_TX), MODEL)


def suitable(tokens: int, shards: int, top_k: int) -> str:
    """The exchange for so many tokens per shard.

    Few tokens, as in decoding, are quickest gathered: two collectives of a few hundred
    kilobytes, whose start costs more than their bytes. Ragged ones pay where they move
    less, that is with more shards than experts per token.
    """
    if expected_platform() == "cpu" or tokens < _MANY or shards <= top_k:
        return "gather"
    return "ragged"


def _gather(own_sums, x_TD, experts_TX, weights_TX):
    rows = len(x_TD)
    fill = partial(_pad_rows, more=-rows % _TILE)
    with jax.named_scope("dispatch"):
        x_RD, experts_RX, weights_RX = _gathered(
            fill(x_TD), fill(experts_TX, value=-1), fill(weights_TX)
        )
    y_RD = own_sums(x_RD, experts_RX, weights_RX)
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


def _there_and_back(
    transport: Transport,
    outputs: Callable[[Array, Array], Array],
    x_TD: Float[Array, "T D"],
    experts_TX: Int[Array, "T X"],
    to_TX: Int[Array, "T X"],
    n: int,
) -> tuple[Float[Array, "A D"], Int[Array, "T X"]]:
    """Outputs of a shard's pairs, and where in them each pair's lies.

    What a shard gets lies in the order of senders, what it sends in that of receivers.

    Args:
      transport: of rows.
      outputs: of the pairs of rows and experts that a shard got, packed.
      x_TD: tokens.
      experts_TX: experts of each.
      to_TX: the shard that each is on, n for pairs that are left out.
      n: shards.
    """
    (T, X), me = to_TX.shape, index(EXPERT)
    to_nTX = to_TX == jnp.arange(n)[:, None, None]
    wanted_nT = jnp.any(to_nTX, axis=2)
    sent_n2 = jnp.stack(
        [jnp.sum(wanted_nT, axis=1), jnp.sum(to_nTX, axis=(1, 2))], axis=1
    )
    # Rows and pairs that every shard sends to every other.
    rows_nn, pairs_nn = jnp.moveaxis(
        jax.lax.all_gather(sent_n2.astype(jnp.int32), EXPERT), 2, 0
    )
    places = T * min(n, X)
    place_P = jnp.cumsum(wanted_nT.ravel()) - 1
    place_P = jnp.where(wanted_nT.ravel(), place_P, places)
    token_P = (
        jnp.full((places,), T).at[place_P].set(jnp.tile(jnp.arange(T), n), mode="drop")
    )

    def send(x_T, there):
        return transport(
            x_T.at[token_P].get(mode="fill", fill_value=0),
            there,
            _before(rows_nn, axis=1)[me],
            rows_nn[me],
            _before(rows_nn, axis=0)[me],
            rows_nn[:, me],
        )

    with jax.named_scope("dispatch"):
        x_RD = send(x_TD, jax.lax.empty((n * T, x_TD.shape[1]), x_TD.dtype))
        experts_RX = send(experts_TX, jnp.full((n * T, X), -1, experts_TX.dtype))
    out_AD = outputs(x_RD, experts_RX)
    with jax.named_scope("combine"):
        # In the order of receivers already: their rows lie one behind the other.
        out_AD = transport(
            out_AD,
            jax.lax.empty((T * X, out_AD.shape[1]), out_AD.dtype),
            _before(pairs_nn, axis=0)[:, me],
            pairs_nn[:, me],
            _before(pairs_nn, axis=1)[:, me],
            pairs_nn[me],
        )
    order_A = jnp.argsort(to_TX.ravel(), stable=True)
    return out_AD, jnp.argsort(order_A).reshape(T, X)


def _before(sizes_nn, *, axis: int):
    """How much lies before each of what lies along an axis."""
    return jnp.cumsum(sizes_nn, axis=axis) - sizes_nn


def _padded_all_to_all(x, there, starts_n, sizes_n, targets_n, got_n):
    """`jax.lax.ragged_all_to_all` along `expert`, where there is none."""
    swap = partial(
        jax.lax.all_to_all,
        axis_name=EXPERT,
        split_axis=0,
        concat_axis=0,
        tiled=True,
    )
    place_C = jnp.arange(len(x))
    rows_nCD = swap(x.at[starts_n[:, None] + place_C].get(mode="fill", fill_value=0))
    target_nC = swap(targets_n)[:, None] + place_C
    target_nC = jnp.where(place_C < got_n[:, None], target_nC, len(there))
    return there.at[target_nC].set(rows_nCD, mode="drop")


def _sum_pairs(out_AD, place_TX, kept_TX, weights_TX):
    """Weighted sums of the outputs of each token's pairs that are kept."""
    out_XTYZ = apart(out_AD)[place_TX.T]
    out_XTYZ = jnp.where(kept_TX.T[..., None, None], upcast(out_XTYZ), 0)
    y_TYZ = jnp.sum(weights_TX.T[..., None, None] * out_XTYZ, axis=0)
    return y_TYZ.reshape(len(place_TX), -1)


def apart(x_RD: Float[Array, "R D"]) -> Float[Array, "R Y Z"]:
    """Rows in the shape in which each lies by itself in a TPU's memory.

    There, rows of a matrix lie among eight others. Single ones are read, written and
    sent where they lie only if they lie apart, and else in a copy of the whole array.
    """
    R, D = x_RD.shape
    word = 4 // x_RD.dtype.itemsize  # numbers of as many rows lie in one
    return x_RD.reshape(R, word, D // word) if word and D % word == 0 else x_RD[:, None]
