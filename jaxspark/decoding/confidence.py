"""From confidence logits to survival probabilities.

The confidence head says for each draft how likely it is accepted once all before it
are. Calibrated, its product is the chance that a block survives up to that draft
(paper sections 3.2.1 and 3.2.2):

    a_j = sigmoid(c_1 / t_1 + w_1 s_1 + b_1) ... sigmoid(c_j / t_j + w_j s_j + b_j)

s is the certainty of the drafts (see `Drawn`). The head does not see it, and it tells
much: above all under the gumbel coupling, where a draft that wins by far is the
target's choice too unless the two models differ by as much.

Acceptance follows other laws at temperature 0 (all or nothing) than when sampling, and
under another coupling, so temperatures t, weights w and biases b are kept by coupling
and sampling temperature.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspark.decoding.couplings import COUPLINGS, Coupling


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperatures of a drafter's confidences under one coupling.

    Attributes:
      coupling: the one they were fitted under.
      fitted_at: sampling temperatures they were fitted at, ascending; a request takes
        those of the nearest, a greedy one only those of 0, a sampled one only others.
        Where there are none, confidences are taken as they are.
      temperatures: for each of them one temperature per draft.
      biases: likewise what is added to a scaled logit; None for zeros.
      weights: likewise what certainty counts; None for nothing.
      prior_blocks: likewise the survival of typical blocks, which is expected of rounds
        before there were any; None if nobody knows.
    """

    coupling: Coupling
    fitted_at: tuple[float, ...]
    temperatures: tuple[tuple[float, ...], ...]
    biases: tuple[tuple[float, ...], ...] | None = None
    weights: tuple[tuple[float, ...], ...] | None = None
    prior_blocks: tuple[tuple[tuple[float, ...], ...], ...] | None = None

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise ValueError(
                f"unknown coupling {self.coupling!r}; expected one of {COUPLINGS}"
            )
        fitted = self.fitted_at
        if not fitted or any(a >= b for a, b in zip(fitted, fitted[1:])):
            raise ValueError(f"fitted_at must be ascending, got {fitted}")
        if fitted[0] < 0:
            raise ValueError(f"a sampling temperature is at least 0, got {fitted[0]}")
        if len(self.temperatures) != len(fitted):
            raise ValueError(
                f"{len(fitted)} sampling temperatures, but confidence temperatures "
                f"for {len(self.temperatures)}; give one row each"
            )
        if len({len(row) for row in self.temperatures}) != 1:
            lengths = [len(row) for row in self.temperatures]
            raise ValueError(f"rows of temperatures differ in length: {lengths}")
        if not all(t > 0 for row in self.temperatures for t in row):
            raise ValueError(f"temperatures must be positive, got {self.temperatures}")
        for name in ("biases", "weights"):
            rows = getattr(self, name)
            if rows is None:
                continue
            shapes = [tuple(map(len, x)) for x in (self.temperatures, rows)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"rows of temperatures have {shapes[0]} numbers, rows of {name} "
                    f"{shapes[1]}; give one of each"
                )

        if self.prior_blocks is not None:
            shape = len(fitted), self.block_length
            blocks = {len(each) for each in self.prior_blocks}
            drafts = {len(block) for each in self.prior_blocks for block in each}
            if (
                len(self.prior_blocks) != shape[0]
                or len(blocks) != 1
                or drafts != {shape[1]}
            ):
                raise ValueError(
                    f"prior_blocks must be as many blocks of {shape[1]} drafts for "
                    f"each of {shape[0]} sampling temperatures, got {self.prior_blocks}"
                )

    @property
    def block_length(self) -> int:
        """Drafts it has temperatures for."""
        return len(self.temperatures[0])

    @classmethod
    def identity(cls, block_length: int, coupling: Coupling) -> "Calibration":
        """Takes confidences as they are."""
        row = (1.0,) * block_length
        return cls(coupling=coupling, fitted_at=(1.0,), temperatures=(row,))

    def check(self, block_length: int, coupling: Coupling) -> None:
        """Raises `ValueError` if it is not for such rounds."""
        if block_length > self.block_length:
            raise ValueError(
                f"the calibration has temperatures for {self.block_length} drafts, "
                f"rounds draft {block_length}; calibrate at that block length"
            )
        if coupling != self.coupling:
            raise ValueError(
                f"the calibration was fitted under coupling {self.coupling!r}, rounds "
                f"use {coupling!r}"
            )

    def survival(
        self,
        confidence_BG: Float[Array, "B G"],
        certainty_BG: Float[Array, "B G"],
        temperature_B: Float[Array, " B"],
    ) -> Float[Array, "B G"]:
        """Chance that the first j + 1 drafts of each slot are all accepted.

        See `logits`.
        """
        logits_BG = self.logits(confidence_BG, certainty_BG, temperature_B)
        return jnp.cumprod(jax.nn.sigmoid(logits_BG), axis=1)

    def logits(
        self,
        confidence_BG: Float[Array, "B G"],
        certainty_BG: Float[Array, "B G"],
        temperature_B: Float[Array, " B"],
    ) -> Float[Array, "B G"]:
        """Of P(draft j accepted | all before it accepted).

        Args:
          confidence_BG: logits.
          certainty_BG: how decided the drafts were.
          temperature_B: the sampling temperature of each slot.
        """
        row_B, fitted_B = self._nearest(temperature_B)
        length = confidence_BG.shape[1]

        def of_slots(rows, neutral: float) -> Float[Array, "B G"]:
            rows_BG = jnp.array(rows, jnp.float32)[row_B, :length]
            return jnp.where(fitted_B[:, None], rows_BG, neutral)

        logits_BG = confidence_BG / of_slots(self.temperatures, 1.0)
        if self.weights is not None:
            logits_BG += of_slots(self.weights, 0.0) * certainty_BG
        if self.biases is not None:
            logits_BG += of_slots(self.biases, 0.0)
        return logits_BG

    def prior_survival(
        self, block_length: int, temperature_B: Float[Array, " B"]
    ) -> Float[Array, "B U G"] | None:
        """Typical blocks at each slot's sampling temperature; None if not known."""
        if self.prior_blocks is None:
            return None
        row_B, _ = self._nearest(temperature_B)
        return jnp.array(self.prior_blocks, jnp.float32)[row_B, :, :block_length]

    def _nearest(
        self, temperature_B: Float[Array, " B"]
    ) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        """The row fitted nearest to each slot's temperature, and whether it holds.

        Certainty is another quantity where drafts are greedy, and acceptance follows
        another law: a row says nothing of the other regime.
        """
        fitted_R = jnp.array(self.fitted_at)
        other_BR = (temperature_B[:, None] > 0) != (fitted_R > 0)
        distance_BR = jnp.abs(temperature_B[:, None] - fitted_R)
        row_B = jnp.argmin(jnp.where(other_BR, jnp.inf, distance_BR), axis=1)
        return row_B, ~jnp.all(other_BR, axis=1)
