"""Schedulers: how many drafts of each slot the target verifies.

A scheduler is a pure function of the proposal's confidences, usable on its own. It
runs inside the compiled round, so nothing waits for the host.
"""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Scheduler(Protocol):
    """Chooses verification lengths; hashable, as part of the compiled round."""

    def __call__(self, confidence_BG: Float[Array, "B G"]) -> Int[Array, " B"]:
        """Verification length of each slot, 0..G."""


@dataclass(frozen=True)
class Fixed:
    """Verifies the first `length` drafts of every slot, all of them by default."""

    length: int | None = None

    def __post_init__(self):
        if self.length is not None and self.length < 0:
            raise ValueError(f"a verification length is at least 0, got {self.length}")

    def __call__(self, confidence_BG: Float[Array, "B G"]) -> Int[Array, " B"]:
        """The same length for every slot."""
        slots, block_length = confidence_BG.shape
        length = block_length if self.length is None else self.length
        return jnp.full((slots,), min(length, block_length), jnp.int32)
