"""A logistic regression small enough to be fitted inside the decode loop.

    P(draft j accepted | all before it accepted) = sigmoid(b . x + d_j)

x are a few signals of the draft, the constant 1 last, and b what they count for, the
same at every place of a block; d_j is what place j adds. Both have Gaussian priors, so
that the mode exists, is unique and lies near the prior mean where little was seen.

The mode is found by Newton's method. Places meet only through b: with b eliminated the
Hessian is diagonal, so a step solves a system as small as x is (a Schur complement),
and no library routine is called on the way. Steps are damped: none moves a coefficient
by more than 1, which keeps the first ones from overshooting.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxspark.parallel.axes import SLOTS, total

_LONGEST_STEP = 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coefficients:
    """Of one regression.

    Attributes:
      shared_X: b.
      places_G: d.
    """

    shared_X: Float[Array, " X"]
    places_G: Float[Array, " G"]

    def logits(self, signals_NGX: Float[Array, "*N G X"]) -> Float[Array, "*N G"]:
        """b . x + d_j, as a sum that no platform rounds to bfloat16."""
        drafted = signals_NGX.shape[-2]
        weighted_NG = jnp.sum(signals_NGX * self.shared_X, axis=-1)
        return weighted_NG + self.places_G[:drafted]


@dataclass(frozen=True)
class Prior:
    """What is believed before anything was seen.

    Attributes:
      mean: of b; that of d is 0.
      precision: of each coefficient in b, 1 / variance.
      place_precision: of d.
    """

    mean: tuple[float, ...]
    precision: tuple[float, ...]
    place_precision: float

    def coefficients(self, places: int) -> Coefficients:
        """The prior means."""
        return Coefficients(
            jnp.array(self.mean, jnp.float32), jnp.zeros((places,), jnp.float32)
        )


def newton_step(
    at: Coefficients,
    prior: Prior,
    signals_NGX: Float[Array, "N G X"],
    happened_NG: Bool[Array, "N G"],
    known_NG: Bool[Array, "N G"],
) -> Coefficients:
    """One damped step towards the mode, over the observations of all shards of slots.

    Args:
      at: where to start.
      prior: of the coefficients.
      signals_NGX: x of each observation.
      happened_NG: whether the draft was accepted.
      known_NG: observations that count.
    """
    chance_NG = jax.nn.sigmoid(at.logits(signals_NGX))
    error_NG = jnp.where(known_NG, happened_NG - chance_NG, 0.0)
    weight_NG = jnp.where(known_NG, chance_NG * (1 - chance_NG), 0.0)
    weighted_NGX = weight_NG[..., None] * signals_NGX
    outer_NGXX = weighted_NGX[..., None, :] * signals_NGX[..., None]
    sums = (
        jnp.sum(error_NG[..., None] * signals_NGX, axis=(0, 1)),
        jnp.sum(error_NG, axis=0),
        jnp.sum(outer_NGXX, axis=(0, 1)),
        jnp.sum(weighted_NGX, axis=0),
        jnp.sum(weight_NG, axis=0),
    )
    slope_X, slope_G, shared_XX, mixed_GX, own_G = total_of(sums)
    precision_X = jnp.array(prior.precision, jnp.float32)
    slope_X -= precision_X * (at.shared_X - jnp.array(prior.mean, jnp.float32))
    slope_G -= prior.place_precision * at.places_G
    shared_XX += jnp.diag(precision_X)
    own_G += prior.place_precision

    scaled_GX = mixed_GX / own_G[:, None]
    left_XX = shared_XX - jnp.sum(mixed_GX[:, :, None] * scaled_GX[:, None], axis=0)
    right_X = slope_X - jnp.sum(scaled_GX * slope_G[:, None], axis=0)
    move_X = solve_small(left_XX, right_X)
    move_G = slope_G / own_G - jnp.sum(scaled_GX * move_X, axis=1)
    longest = jnp.maximum(jnp.max(jnp.abs(move_X)), jnp.max(jnp.abs(move_G)))
    damping = jnp.minimum(1.0, _LONGEST_STEP / jnp.maximum(longest, 1e-12))
    return Coefficients(at.shared_X + damping * move_X, at.places_G + damping * move_G)


def total_of[T](sums: T) -> T:
    """Sums over the observations of all shards of slots."""
    return jax.tree.map(lambda x: total(x, SLOTS), sums)


def solve_small(
    left_XX: Float[Array, "X X"], right_X: Float[Array, " X"]
) -> Float[Array, " X"]:
    """The solution of a positive definite system, by elimination, unrolled."""
    size = len(right_X)
    rows = jnp.concatenate([left_XX, right_X[:, None]], axis=1)
    for pivot in range(size):
        row = rows[pivot] / rows[pivot, pivot]
        others = jnp.arange(size) != pivot
        rows = jnp.where(others[:, None], rows - rows[:, pivot, None] * row, row[None])
    return rows[:, -1]
