"""Draws in a TPU kernel: a tile of logits in VMEM extends what is known of each row.

Computed: the noise of every token (some 150 vector operations, most of all), two or
three exponentials, and compares. Rows go by eights, a register for 128 tokens of them.
Nothing goes across lanes: each lane keeps draws of its own tokens, in the outputs'
blocks, which stay in VMEM for all tiles; XLA makes one of the 128 (`finished`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels.draws import FAR, NOWHERE, Draws, Rows, combined, fields_of
from pallas_kernels.gumbel import gumbel
from pallas_kernels.ragged import LANES

# A TPU of two cores gives each half of the vocabulary; one of one goes twice.
CORES = 2
SUBLANES = 8
# Rows of a step are a multiple, as bfloat16 lies.
SIXTEEN = 16
VMEM = 48 << 20
# No logit yet; finite, so that differences are.
_LOWEST = -3e38


def columns(rows: Rows, named_R: Int[Array, " R"] | None, padded: int):
    """What is the same for all tokens of a row, in all lanes: floats and integers."""
    R = len(rows.temperature_R)
    floats = jnp.stack([rows.rate_R, rows.sampled_R])
    named_R = jnp.full((R,), -1, jnp.int32) if named_R is None else named_R
    keys_R2 = jnp.zeros((R, 2), jnp.int32) if rows.keys_R2 is None else rows.keys_R2
    integers = jnp.concatenate([keys_R2.T, named_R[None]])

    def in_lanes(x_NR):
        x_NR = jnp.pad(x_NR, ((0, 0), (0, padded - R)))
        return jnp.broadcast_to(x_NR[:, :, None], (*x_NR.shape, LANES))

    return in_lanes(floats), in_lanes(integers)


def outputs(rows: int, certainty: bool):
    """Shapes of draws of each lane, of each core: places, and all else."""
    others = len(fields_of(certainty)) - 1
    return (
        jax.ShapeDtypeStruct((CORES, rows, LANES), jnp.int32),
        jax.ShapeDtypeStruct((CORES, others, rows, LANES), jnp.float32),
    )


def output_blocks(rows: int, place: Callable, *, certainty: bool):
    """A step's blocks of `outputs`, of so many rows.

    Args:
      rows: of a block.
      place: which of a core's blocks a step has, by the grid's indices.
      certainty: as for `outputs`.
    """
    others = len(fields_of(certainty)) - 1
    return (
        pl.BlockSpec((1, rows, LANES), lambda c, *at: (c, place(c, *at), 0)),
        pl.BlockSpec((1, others, rows, LANES), lambda c, *at: (c, 0, place(c, *at), 0)),
    )


def finished(outputs, rows: Rows, certainty: bool) -> Draws:
    """One draw of each row from those of all lanes and cores."""
    places, others = outputs
    R = len(rows.temperature_R)

    def parts_first(x_CRb):
        return jnp.moveaxis(x_CRb[:, :R], 2, 1).reshape(-1, R)

    values = [places, *jnp.moveaxis(others, 1, 0)]
    names = fields_of(certainty)
    parts = Draws(**{n: parts_first(x) for n, x in zip(names, values, strict=True)})
    return combined(parts, rows.rate_R)


def begin(place_ref, others_ref, certainty: bool):
    """Nothing is drawn yet."""
    place_ref[...] = jnp.full(place_ref.shape, NOWHERE, jnp.int32)
    start = {"logit_R": _LOWEST, "top_R": _LOWEST}
    start |= {"noise_R": -jnp.inf, "named_R": -jnp.inf}
    for i, name in enumerate(fields_of(certainty)[1:]):
        value = start.get(name, 0.0)
        others_ref[0, i] = jnp.full(others_ref.shape[2:], value, jnp.float32)


class Tile(NamedTuple):
    """The tokens of a tile.

    Attributes:
      start: place of the first.
      end: places that there are in all.
      first: id of place 0.
      ids_ref: their ids, int32 [1, .], where they are not the places behind `first`.
    """

    start: Array
    end: int
    first: Array
    ids_ref: Array | None


def extend(
    r, z_ref, tile: Tile, columns, outputs, *, certainty: bool, noisy: bool
) -> None:
    """Draws of eight rows of a tile's logits [R, .] beside what was drawn before."""
    floats_ref, integers_ref = columns
    place_ref, others_ref = outputs
    names = fields_of(certainty)
    at = pl.ds(pl.multiple_of(r * SUBLANES, SUBLANES), SUBLANES)
    rate, sampled = floats_ref[0, at], floats_ref[1, at]
    first, second, named = (integers_ref[i, at] for i in range(3))
    values = [others_ref[0, i, at] for i in range(len(names) - 1)]
    draws = Draws(**dict(zip(names, [place_ref[0, at], *values], strict=True)))
    tokens = []
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    for k in range(0, z_ref.shape[1], LANES):
        place = tile.start + k + lane
        logit = jnp.where(place < tile.end, z_ref[at, k : k + LANES], -jnp.inf)
        ids = tile.first + place
        if tile.ids_ref is not None:
            ids = jnp.broadcast_to(tile.ids_ref[:, k : k + LANES], lane.shape)
        noise = gumbel(first, second, ids) * sampled if noisy else None
        tokens.append(Token(logit, place, ids, noise))
    draws = extended(draws, tokens, rate, named)
    place_ref[0, at] = draws.place_R
    for i, name in enumerate(names[1:]):
        others_ref[0, i, at] = getattr(draws, name)


class Token(NamedTuple):
    """One more token for every row and lane.

    Attributes:
      logit: z; -inf is none.
      place: where it stands.
      id: by which it is named.
      noise: n; None is 0.
    """

    logit: Array
    place: Array
    id: Array
    noise: Array | None


def extended(draws: Draws, tokens: list[Token], rate, named) -> Draws:
    """With more tokens, whose places ascend and lie behind all before."""
    top = draws.top_R
    for token in tokens:
        top = jnp.maximum(top, token.logit)
    below = jnp.maximum((draws.top_R - top) * rate, FAR)
    keep = jnp.exp(below)
    mass, whole = keep * draws.mass_R, draws.whole_R
    spread, others = draws.spread_R, draws.others_R
    if whole is not None:
        whole = jnp.exp(draws.top_R - top) * whole
    if spread is not None:
        spread = keep * spread + below * mass
    if others is not None:
        others = keep * others
    best = (draws.logit_R - top) * rate + draws.noise_R
    logit, noise, place = draws.logit_R, draws.noise_R, draws.place_R
    found = draws.named_R
    for token in tokens:
        a = (token.logit - top) * rate
        weight = jnp.exp(a)
        mass += weight
        if whole is not None:
            whole += jnp.exp(token.logit - top)
        if spread is not None:
            spread += weight * jnp.maximum(a, FAR)
        score = a if token.noise is None else a + token.noise
        if others is not None:
            others += jnp.exp(jnp.minimum(score, best))
        better = score > best
        best = jnp.where(better, score, best)
        logit = jnp.where(better, token.logit, logit)
        place = jnp.where(better, token.place, place)
        noise = jnp.where(better, 0.0 if token.noise is None else token.noise, noise)
        found = jnp.where(token.id == named, token.logit, found)
    return Draws(
        place_R=place,
        logit_R=logit,
        noise_R=noise,
        top_R=top,
        mass_R=mass,
        named_R=found,
        whole_R=whole,
        spread_R=spread,
        others_R=others,
    )
