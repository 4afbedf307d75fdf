"""Training steps of a drafter: pure functions, made for one configuration.

The target is frozen; so are its embedding and LM head, of which a pruned drafter has
some rows. A step sums gradients of the objective's numerators over micro-batches and
divides by the summed weights, so accumulation changes nothing but memory.

On a mesh the sequences of a batch are shared out over its shards. A trainer is given
those of this process's shards; alone, a process has them all.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxspark.drafters import Drafter, DSparkDrafter, Eagle3Drafter
from jaxspark.parallel.mesh import constrain, place, replicated, shard
from jaxspark.parallel.rows import abstract_rows, from_own_rows, own_rows
from jaxspark.parallel.rules import replicated_specs, spread_specs
from jaxspark.settings import random_key, standard_settings
from jaxspark.training.blocks import sample_blocks
from jaxspark.training.config import TrainConfig
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import Features
from jaxspark.training.forward import DraftVocabulary
from jaxspark.training.forward_dspark import dspark_sums
from jaxspark.training.forward_eagle3 import eagle3_sums
from jaxspark.training.objective import Sums

FORWARDS: dict[Any, Any] = {DSparkDrafter: dspark_sums, Eagle3Drafter: eagle3_sums}


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
        trained = place(jax.tree.map(jnp.array, trained), spread_specs)
        own_rows(config.sequences)
        state = TrainState(
            trained=trained,
            optimizer=_start(trained, config=config),
            step=place(jnp.zeros((), jnp.int32), replicated_specs),
        )
        frozen, target = place(frozen, replicated_specs), shard(target)
        trainer = cls(graphdef=graphdef, frozen=frozen, target=target, config=config)
        return trainer, state

    def drafter(self, state: TrainState):
        """The drafter with a state's parameters."""
        return nnx.merge(self.graphdef, state.trained, self.frozen)

    @standard_settings()
    def step(
        self, state: TrainState, microbatches: list[tuple[Packed, Features]]
    ) -> tuple[TrainState, Sums]:
        """One optimizer step; donates `state`.

        Args:
          state: before it.
          microbatches: this process's sequences and their features.
        """
        return self.apply(state, [from_own_rows(each) for each in microbatches])

    def apply(
        self, state: TrainState, microbatches: list[tuple[Packed, Features]]
    ) -> tuple[TrainState, Sums]:
        """`step` of arrays over all processes; may be traced."""
        first, *rest = microbatches
        total = self._gradients(state, *first, 0)
        for index, (batch, features) in enumerate(rest, 1):
            total = _add(total, self._gradients(state, batch, features, index))
        grads, sums = total
        return _update(state, grads, sums.weight, config=self.config), sums

    def _gradients(self, state, batch, features, index, call: Any = None):
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
        """The lowered gradient of one whole micro-batch, to compile and measure."""
        batch, features = abstract_rows((batch, features))
        return self._gradients(state, batch, features, 0, _gradients.lower)

    @standard_settings()
    def evaluate(self, state: TrainState, batch: Packed, features: Features) -> Sums:
        """The objective's sums on held-out data, always at the same anchors.

        Args:
          state: whose parameters are evaluated.
          batch: this process's sequences.
          features: of theirs.
        """
        return _evaluate(
            state.trained,
            self.frozen,
            self.target,
            *from_own_rows((batch, features)),
            graphdef=self.graphdef,
            config=self.config,
        )


@partial(jax.jit, static_argnames=("config",))
def _start(trained, *, config: TrainConfig):
    """What the optimizer remembers before the first step."""
    return constrain(config.transformation().init(trained), spread_specs)


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

    grads, sums = jax.grad(numerator, has_aux=True)(trained)
    return constrain(grads, spread_specs), replicated(sums)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def _evaluate(trained, frozen, target, batch, features, *, graphdef, config) -> Sums:
    key = random_key(0)
    return replicated(
        _sums(trained, frozen, target, batch, features, key, graphdef, config)
    )


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
    trained = optax.apply_updates(state.trained, updates)
    return replace(
        state,
        trained=constrain(trained, spread_specs),
        optimizer=constrain(optimizer, spread_specs),
        step=state.step + 1,
    )
