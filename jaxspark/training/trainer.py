"""Training steps of a drafter: pure functions, and the loop's settings.

The target is frozen; so are its embedding and LM head, of which a pruned drafter has
some rows. A step sums gradients of the objective's numerators over micro-batches and
divides by the summed weights, so accumulation changes nothing but memory.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from jaxspark.drafters import Drafter, DSparkDrafter, Eagle3Drafter
from jaxspark.settings import random_key, standard_settings
from jaxspark.training.blocks import sample_blocks
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import Features
from jaxspark.training.forward import DraftVocabulary
from jaxspark.training.forward_dspark import dspark_sums
from jaxspark.training.forward_eagle3 import eagle3_sums
from jaxspark.training.objective import DSPARK, Objective, Sums

OPTIMIZERS = ("muon", "adam")
FORWARDS: dict[Any, Any] = {DSparkDrafter: dspark_sums, Eagle3Drafter: eagle3_sums}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a drafter is trained; defaults are the released recipe's where it has one.

    Attributes:
      steps: optimizer steps.
      learning_rate: at its highest.
      warmup: part of the steps in which it rises.
      cooldown: part of the steps, the last, in which it falls to a tenth.
      clip: largest global norm of a gradient.
      sequences: packed sequences per micro-batch.
      accumulate: micro-batches per step.
      anchors: blocks per sequence.
      block_length: rows per block.
      feature_noise: noise on the taps while training, relative to their size.
      seed: of data order and anchors.
      objective: what is minimised.
      optimizer: `muon` (matrices; Adam for the rest) or `adam`.
      dtype: of activations and, with Muon, of gradients and momenta; parameters are
        float32.
    """

    steps: int
    learning_rate: float = 6e-4
    warmup: float = 0.04
    cooldown: float = 0.3
    clip: float = 1.0
    sequences: int = 4
    accumulate: int = 1
    anchors: int = 64
    block_length: int = 7
    feature_noise: float = 0.0
    seed: int = 0
    objective: Objective = field(default=DSPARK)
    optimizer: str = "muon"
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("steps", "sequences", "accumulate", "anchors", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.feature_noise < 0:
            raise ValueError(
                f"feature_noise must not be negative, got {self.feature_noise}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}; expected one of {OPTIMIZERS}"
            )
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > 1:
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


def is_trained(path: tuple, variable: nnx.Variable) -> bool:
    """Whether a drafter's array is trained: all parameters but rows of the head."""
    return isinstance(variable, nnx.Param) and path[0] != "lm_head"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
      trained: the drafter's trained parameters.
      optimizer: the optimizer's state.
      step: steps taken.
    """

    trained: Any
    optimizer: Any
    step: jax.Array


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A drafter, its target and its configuration, ready to take steps."""

    graphdef: Any
    frozen: Any
    target: Any
    config: TrainConfig

    @classmethod
    @standard_settings()
    def create(
        cls, drafter: Drafter, target, config: TrainConfig
    ) -> tuple["Trainer", TrainState]:
        """A trainer and the state before the first step.

        A drafter without a confidence head has no confidence term, whatever the
        objective: it would add a constant.

        Raises:
          ValueError: the drafter does not fit the target, or drafts shorter blocks.
        """
        drafter.check_target(target.config)
        if config.block_length > drafter.block_length:
            raise ValueError(
                f"block_length {config.block_length} is more than the drafter's "
                f"{drafter.block_length}"
            )
        if getattr(drafter, "confidence_head", None) is None:
            objective = replace(config.objective, confidence=0.0)
            config = replace(config, objective=objective)
        graphdef, trained, frozen = nnx.split(drafter, is_trained, ...)  # type: ignore[misc]
        # Steps donate their state; the caller's drafter keeps its arrays.
        trained = jax.tree.map(jnp.array, trained)
        state = TrainState(
            trained=trained,
            optimizer=config.transformation().init(trained),
            step=jnp.zeros((), jnp.int32),
        )
        trainer = cls(graphdef=graphdef, frozen=frozen, target=target, config=config)
        return trainer, state

    def drafter(self, state: TrainState):
        """The drafter with a state's parameters."""
        return nnx.merge(self.graphdef, state.trained, self.frozen)

    @standard_settings()
    def step(
        self, state: TrainState, microbatches: list[tuple[Packed, Features]]
    ) -> tuple[TrainState, Sums]:
        """One optimizer step; donates `state`."""
        first, *rest = microbatches
        total = self._gradients(state, *first, 0)
        for index, (batch, features) in enumerate(rest, 1):
            total = _add(total, self._gradients(state, batch, features, index))
        grads, sums = total
        return _update(state, grads, sums.weight, config=self.config), sums

    def _gradients(self, state, batch, features, index, call=None):
        return (call or _gradients)(
            state.trained,
            self.frozen,
            self.target,
            batch,
            features,
            _key(self.config.seed, state.step, index),
            graphdef=self.graphdef,
            config=self.config,
        )

    @standard_settings()
    def lower(self, state: TrainState, batch: Packed, features: Features):
        """The lowered gradient of one micro-batch, to compile and measure."""
        return self._gradients(state, batch, features, 0, _gradients.lower)

    @standard_settings()
    def evaluate(self, state: TrainState, batch: Packed, features: Features) -> Sums:
        """The objective's sums on held-out data, always at the same anchors."""
        return _evaluate(
            state.trained,
            self.frozen,
            self.target,
            batch,
            features,
            graphdef=self.graphdef,
            config=self.config,
        )


def _key(seed: int, step: jax.Array, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(random_key(seed), step), index)


def _sums(trained, frozen, target, batch, features, key, graphdef, config) -> Sums:
    dtype = jnp.dtype(config.dtype)
    cast = jax.tree.map(
        lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, (trained, frozen)
    )
    drafter = nnx.merge(graphdef, *cast)
    vocabulary = DraftVocabulary.of(drafter, target)
    blocks = sample_blocks(
        key,
        batch,
        anchors=config.anchors,
        block_length=config.block_length,
        draftable_V=vocabulary.draftable_V,
    )
    return FORWARDS[type(drafter)](
        drafter, target, batch, features, blocks, vocabulary, config.objective
    )


@partial(jax.jit, static_argnames=("graphdef", "config"))
def _gradients(
    trained, frozen, target, batch, features, key, *, graphdef, config
) -> tuple[Any, Sums]:
    """Gradient of the objective's numerator, and the sums."""
    if config.feature_noise:
        noise_key = jax.random.fold_in(key, 1)
        features = features.with_noise(noise_key, config.feature_noise)

    def numerator(trained):
        sums = _sums(trained, frozen, target, batch, features, key, graphdef, config)
        return sums.numerator, sums

    return jax.grad(numerator, has_aux=True)(trained)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def _evaluate(trained, frozen, target, batch, features, *, graphdef, config) -> Sums:
    key = random_key(0)
    return _sums(trained, frozen, target, batch, features, key, graphdef, config)


@partial(jax.jit, donate_argnums=0)
def _add(total, new):
    return jax.tree.map(jnp.add, total, new)


@partial(jax.jit, static_argnames=("config",), donate_argnums=0)
def _update(state: TrainState, grads, weight, *, config: TrainConfig) -> TrainState:
    # A batch may hold not a single row that counts; then the gradient is 0.
    scaled = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-6), grads)
    updates, optimizer = config.transformation().update(
        scaled, state.optimizer, state.trained
    )
    return replace(
        state,
        trained=optax.apply_updates(state.trained, updates),
        optimizer=optimizer,
        step=state.step + 1,
    )
