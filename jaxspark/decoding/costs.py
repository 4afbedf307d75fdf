"""What rounds cost: seconds by draft length and token bucket.

Measured by `jaxspark.calibration.profile`, or taken from a roofline.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspark.decoding.forecast import Forecast
from jaxspark.parallel.axes import SLOTS, max_of, total


@dataclass(frozen=True)
class CostCurve:
    """Seconds of rounds that draft so many tokens, by what they verify.

    Attributes:
      draft_length: drafts proposed for each slot; 0 for rounds without a drafter.
      sizes: token buckets, ascending.
      seconds: of a round with each bucket; never falling. Inside a program an array
        where they are told while it runs, see `Costs.timed`.
    """

    draft_length: int
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self):
        if self.draft_length < 0:
            raise ValueError(f"a draft length is at least 0, got {self.draft_length}")
        check_buckets(self.sizes)
        if len(self.seconds) != len(self.sizes):
            raise ValueError(
                f"{len(self.sizes)} token buckets, but seconds for "
                f"{len(self.seconds)}; give one each"
            )
        if isinstance(self.seconds, Array):
            return
        if not all(0 < t < math.inf for t in self.seconds):
            raise ValueError(f"seconds must be positive and finite, got {self.seconds}")
        if any(a > b for a, b in zip(self.seconds, self.seconds[1:])):
            raise ValueError(f"seconds must never fall, got {self.seconds}")

    def interpolate(self, tokens: Int[Array, "..."]) -> Float[Array, "..."]:
        """Seconds, linear between buckets."""
        sizes = jnp.array(self.sizes, jnp.float32)
        return jnp.interp(tokens, sizes, jnp.asarray(self.seconds, jnp.float32))

    def best_bucket(
        self, forecast: Forecast
    ) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The bucket that is worth most per second, by index.

        Returns:
          index: of the smallest one among equals.
          rate: its worth per second, see `Forecast.worth`; -1 if drafts that must be
            verified fit none.
        """
        forecast = forecast.first(self.draft_length)
        worth_N = forecast.worth()
        sizes = jnp.array(self.sizes)
        drafts = jnp.clip(sizes - forecast.anchors, 0, len(worth_N) - 1)
        fits = sizes >= max_of(forecast.anchors + jnp.sum(forecast.min_drafts_B))
        rates = total(worth_N[drafts], SLOTS) / jnp.asarray(self.seconds, jnp.float32)
        rates = jnp.where(fits, rates, -1.0)
        index = jnp.argmax(rates)
        return index, rates[index]


@dataclass(frozen=True)
class Costs:
    """What a round costs.

    Attributes:
      curves: of some draft lengths, ascending. Length 0, rounds without drafts, should
        be one of them: what is not known is never chosen.
    """

    curves: tuple[CostCurve, ...]

    def __post_init__(self):
        lengths = self.draft_lengths
        if not lengths or any(a >= b for a, b in zip(lengths, lengths[1:])):
            raise ValueError(f"draft lengths must be ascending, got {lengths}")

    @property
    def draft_lengths(self) -> tuple[int, ...]:
        """Draft lengths whose costs are known."""
        return tuple(curve.draft_length for curve in self.curves)

    @property
    def seconds(self) -> list[float]:
        """Of every branch: of each curve's buckets in turn."""
        return [seconds for curve in self.curves for seconds in curve.seconds]

    def curve_for(self, length: int) -> CostCurve:
        """Costs of rounds that draft so many tokens, or the next more that is known.

        Raises:
          ValueError: only shorter ones are known.
        """
        for curve in self.curves:
            if curve.draft_length >= length:
                return curve
        raise ValueError(
            f"costs are known of draft lengths {self.draft_lengths}, not of {length}"
        )

    def timed(self, seconds_J: Float[Array, " J"]) -> "Costs":
        """The same branches with other `seconds`."""
        curves, begin = [], 0
        for curve in self.curves:
            end = begin + len(curve.sizes)
            seconds = cast(tuple[float, ...], seconds_J[begin:end])
            curves.append(replace(curve, seconds=seconds))
            begin = end
        return Costs(tuple(curves))


def guessed_costs(
    slots: int, block_length: int, sizes: tuple[int, ...] | None = None
) -> Costs:
    """Costs until rounds are timed: draft lengths and token buckets worth a program.

    A round of one token per slot takes 1; every further token a tenth of a slot's, and
    every draft as much.

    Args:
      slots: of one shard.
      block_length: most drafts per round.
      sizes: token buckets; None takes some of `bucket_ladder`'s.
    """
    if sizes is None:
        sizes = _ladder(slots, block_length, (4 / 3, 2, 4, 8, 16))
    curves = []
    for length, holding in bucket_ladders(slots, block_length, sizes).items():
        seconds = (1 + 0.1 * (size / slots - 1 + length) for size in holding)
        curves.append(CostCurve(length, holding, tuple(seconds)))
    return Costs(tuple(curves))


def check_buckets(sizes: tuple[int, ...]) -> None:
    """Raises `ValueError` unless token buckets ascend."""
    if not sizes or any(a >= b for a, b in zip(sizes, sizes[1:])):
        raise ValueError(f"token buckets must be ascending, got {sizes}")


def bucket_ladder(slots: int, draft_length: int) -> tuple[int, ...]:
    """Token buckets from little more than one token per slot to every draft.

    Finer where rounds are small; multiples of 8, which matrix units like, where they
    are not. What a bucket wastes is spent on drafts, and every bucket is a program to
    compile.
    """
    return _ladder(slots, draft_length, (4 / 3, 5 / 3, 2, 3, 4, 5, 6, 8, 12, 16))


def _ladder(slots: int, draft_length: int, steps: tuple[float, ...]) -> tuple[int, ...]:
    """Token buckets of so many tokens per slot, and of every draft."""
    full = slots * (draft_length + 1)
    sizes = (round(slots * step) for step in steps)
    sizes = (size if size < 12 else -(-size // 8) * 8 for size in sizes)
    return within_ladder((*sizes, full), full)


def within_ladder(sizes: tuple[int, ...], full: int) -> tuple[int, ...]:
    """Those of `sizes` that a round of at most `full` tokens can use."""
    return tuple(sorted({min(size, full) for size in sizes}))


def bucket_ladders(
    slots: int, block_length: int, sizes: tuple[int, ...] | None = None
) -> dict[int, tuple[int, ...]]:
    """Token buckets worth a program, by the draft lengths that are.

    Args:
      slots: of one shard.
      block_length: most drafts per round.
      sizes: token buckets to choose from; None takes a ladder up to every draft.
    """
    if sizes is None:
        sizes = bucket_ladder(slots, block_length)
    return {
        length: _holding(within_ladder(sizes, slots * (length + 1)), slots)
        for length in draft_ladder(block_length)
    }


def _holding(sizes: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Those that a round of all slots can use; the last one is checked elsewhere."""
    return tuple(size for size in sizes if size >= slots) or sizes[-1:]


def draft_ladder(block_length: int) -> tuple[int, ...]:
    """Draft lengths worth a program: none, powers of two up to 2/3 of a block, all."""
    powers = {2**n for n in range(8) if 3 * 2**n <= 2 * block_length}
    return tuple(sorted({0, *powers, block_length}))
