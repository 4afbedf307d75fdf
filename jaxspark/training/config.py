"""How a drafter is trained."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxspark.configuration import Configuration, option
from jaxspark.training.objective import DSPARK, Objective

OPTIMIZERS = ("muon", "adam")


@dataclass(frozen=True, kw_only=True)
class Recipe(Configuration):
    """Steps and batches; defaults are the released recipe's where it has one."""

    steps: int = option("Optimizer steps.", at_least=1)
    optimizer: str = option(
        "Optimizer of matrices; the rest has Adam.", "muon", choices=OPTIMIZERS
    )
    learning_rate: float = option("Learning rate at its highest.", 6e-4)
    warmup: float = option(
        "Part of the steps in which the learning rate rises.", 0.04, at_least=0
    )
    cooldown: float = option(
        "Part of the steps, the last, in which it falls to a tenth.", 0.3, at_least=0
    )
    clip: float = option("Largest global norm of a gradient.", 1.0)
    sequences: int = option("Packed sequences per micro-batch.", 4, at_least=1)
    accumulate: int = option("Micro-batches per step.", 1, at_least=1)
    anchors: int = option("Blocks per sequence.", 64, at_least=1)
    feature_noise: float = option(
        "Noise on the taps while training, relative to their size; helps if data are "
        "few.",
        0.0,
        at_least=0,
    )
    seed: int = option("Seed of the data's order, anchors and weights.", 0)

    def __post_init__(self):
        super().__post_init__()
        if self.warmup + self.cooldown > 1:
            raise ValueError(
                "warmup and cooldown are parts of the steps, together at most 1; got "
                f"{self.warmup} and {self.cooldown}"
            )

    def schedule(self) -> optax.Schedule:
        """Learning rate by step: rises, stays, falls to a tenth."""
        rise = max(1, round(self.warmup * self.steps))
        fall = round(self.cooldown * self.steps)
        rate = self.learning_rate
        return optax.join_schedules(
            [
                optax.linear_schedule(rate / rise, rate, rise),
                optax.constant_schedule(rate),
                optax.linear_schedule(rate, rate / 10, max(fall, 1)),
            ],
            [rise, self.steps - fall],
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """A recipe for one drafter.

    Attributes:
      block_length: rows per block.
      objective: what is minimized.
      dtype: of activations and, with Muon, of gradients and momenta; parameters are
        float32.
    """

    block_length: int = option("Rows per block.", 7, at_least=1)
    objective: Objective = field(default=DSPARK)
    dtype: str = "float32"

    def transformation(self) -> optax.GradientTransformation:
        """What turns gradients into updates; no weight decay."""
        clip = optax.clip_by_global_norm(self.clip)
        if self.optimizer == "adam":
            return optax.chain(clip, optax.adam(self.schedule(), b2=0.99))
        # Orthogonalising costs as much as the gradient of a small batch: in bfloat16,
        # where activations are, half of that.
        dtype = jnp.dtype(self.dtype)
        cast = optax.stateless(
            lambda grads, _: jax.tree.map(lambda g: g.astype(dtype), grads)
        )
        muon = optax.contrib.muon(
            self.schedule(), adam_b2=0.99, consistent_rms=0.2, mu_dtype=dtype
        )
        return optax.chain(clip, cast, muon)
