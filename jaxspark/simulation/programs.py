"""The programs that a slice would run, lowered for it with nothing allotted.

Each is what runs there: the same functions, of arrays that are only described.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxspark.configs import drafters as draft_configs
from jaxspark.decoding import DecodeOptions, DecodeState, decode, prefill
from jaxspark.decoding.compiling import compiler_options
from jaxspark.drafters import DSparkDrafter, MTPDrafter
from jaxspark.parallel.mesh import check_mesh, constrain, slots_per_shard
from jaxspark.parallel.rules import (
    parameter_specs,
    replicated_specs,
    row_specs,
    spread_specs,
    state_specs,
    training_specs,
)
from jaxspark.simulation.chips import abstract
from jaxspark.training.config import TrainConfig
from jaxspark.training.data.packing import Packed
from jaxspark.training.features import features_program
from jaxspark.training.pretraining import Parts, pretraining_gradients
from jaxspark.training.trainer import Trainer, TrainState, is_trained

WHAT = ("decode", "prefill", "train_draft", "train")
PREFILL_CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program, lowered.

    Attributes:
      lowered: to be compiled.
      arguments: what it holds, described, by name.
      growing: names of arguments that grow with slots and positions.
      tokens: that one chip with slots of its own works on in a pass.
      once: what one run of it is called.
      rows: what is shared out over the chips.
      options: of the compiler.
    """

    lowered: Any
    arguments: Mapping[str, Any] = field(repr=False)
    growing: tuple[str, ...] = ()
    tokens: int
    once: str = "step"
    rows: str = "slots"
    options: Mapping[str, str | bool] | None = None

    def bytes_per_chip(self, name: str) -> float:
        """Of an argument."""
        return float(sum(map(_bytes_per_chip, jax.tree.leaves(self.arguments[name]))))


def _bytes_per_chip(leaf: jax.ShapeDtypeStruct) -> float:
    assert leaf.sharding is not None
    size = 1
    for axis in leaf.sharding.shard_shape(leaf.shape):
        size *= axis
    return size * jnp.dtype(leaf.dtype).itemsize


def lower_decoding(
    what: str,
    mesh: Mesh,
    target: Any,
    drafter: Any,
    *,
    slots: int,
    capacity: int,
    block_length: int,
) -> Program:
    """A round of decoding, or a chunk of prefill.

    Args:
      what: "decode" (rounds that draft and verify whole blocks) or "prefill".
      mesh: in use.
      target: a described model, see `abstract_models`.
      drafter: likewise.
      slots: requests decoded together.
      capacity: cache positions of each.
      block_length: drafts of a round.

    Raises:
      ValueError: the model, the drafter or the slots cannot be shared out.
    """
    for model in (target, drafter):
        check_mesh(model, mesh)
    own = slots_per_shard(slots)
    state = jax.eval_shape(
        lambda: DecodeState.empty(
            target,
            drafter,
            slots=slots,
            capacity=capacity,
            block_length=block_length,
        )
    )
    held = (
        abstract(mesh, target, parameter_specs(target)),
        abstract(mesh, drafter, parameter_specs(drafter)),
        abstract(mesh, state, state_specs(state)),
        abstract(mesh, jax.ShapeDtypeStruct((), jnp.int32), PartitionSpec()),
    )
    options = None
    if what == "decode":
        chosen = DecodeOptions(block_length=block_length).resolve(drafter, own)
        tokens, options = chosen.sizes(own)[-1], compiler_options()
        lowered = decode.lower(*held, options=chosen)
    else:
        tokens = own * PREFILL_CHUNK
        lowered = prefill.lower(*held, chunk=PREFILL_CHUNK)
    state = held[2]
    caches = {
        "caches of the target": state.target_cache,
        "caches of the drafter": state.draft_cache,
    }
    return Program(
        lowered=lowered,
        arguments={
            "weights of the target": held[0],
            "weights of the drafter": held[1],
            **caches,
            "rest of the state": replace(state, target_cache=(), draft_cache=()),
        },
        growing=tuple(caches),
        tokens=tokens,
        once="round" if what == "decode" else "chunk",
        options=options,
    )


def lower_draft_training(
    mesh: Mesh, target: Any, *, sequences: int, length: int, block_length: int
) -> Program:
    """A step of a DSpark drafter's training, the target's features included.

    Args:
      mesh: in use.
      target: a described model.
      sequences: of a batch, of one document each.
      length: of each, in tokens.
      block_length: rows of a block.

    Raises:
      ValueError: the model, the drafter or the sequences cannot be shared out.
    """
    own = slots_per_shard(sequences)
    described = draft_configs.dspark(target.config, block_size=block_length)
    drafter = nnx.eval_shape(lambda: DSparkDrafter(described, rngs=nnx.Rngs(0)))
    for model in (target, drafter):
        check_mesh(model, mesh)
    config = TrainConfig(
        steps=1,
        sequences=sequences,
        block_length=block_length,
        dtype=jnp.dtype(target.dtype).name,
    )
    graphdef, trained, frozen = nnx.split(drafter, is_trained, ...)  # type: ignore[misc]
    optimizer = jax.eval_shape(config.transformation().init, trained)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(
        trained=abstract(mesh, trained, spread_specs(trained)),
        optimizer=abstract(mesh, optimizer, spread_specs(optimizer)),
        step=abstract(mesh, step, PartitionSpec()),
    )
    trainer = Trainer(
        graphdef=graphdef,
        frozen=abstract(mesh, frozen, replicated_specs(frozen)),
        target=abstract(mesh, target, parameter_specs(target)),
        config=config,
    )
    batch = _one_document_each(sequences, length)
    taps = described.target_layer_ids
    features_of, _, tokens, static = features_program(target, batch, taps)
    batch, tokens = (abstract(mesh, each, row_specs(each)) for each in (batch, tokens))

    @partial(jax.jit, donate_argnums=0)
    def trained_step(state, frozen, target, batch, tokens):
        features = features_of(target, tokens, **static)
        whole = replace(trainer, frozen=frozen, target=target)
        return whole.apply(state, [(batch, features)])

    return Program(
        lowered=trained_step.lower(
            state, trainer.frozen, trainer.target, batch, tokens
        ),
        arguments={
            "weights of the target": trainer.target,
            "parameters of the drafter": (state.trained, trainer.frozen),
            "memory of the optimizer": state.optimizer,
            "sequences": (batch, tokens),
        },
        growing=("sequences",),
        tokens=own * length,
        rows="sequences",
    )


def _one_document_each(sequences: int, length: int) -> Packed:
    shape = sequences, length
    return Packed(
        ids_PS=np.zeros(shape, np.int32),
        positions_PS=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        documents_PS=np.zeros(shape, np.int32),
        trainable_PS=np.ones(shape, bool),
        index_P=np.arange(sequences, dtype=np.int32),
    )


def lower_training(mesh: Mesh, target: Any, *, texts: int, length: int) -> Program:
    """A step of DeepSeek-V4's own training, with multi-token prediction and Adam.

    Args:
      mesh: in use.
      target: a described DeepSeek-V4.
      texts: of a batch.
      length: of each, in tokens.

    Raises:
      ValueError: the model or the texts cannot be shared out.
    """
    check_mesh(target, mesh)
    own = slots_per_shard(texts)
    config, dtype = target.config, target.dtype
    mtp = nnx.eval_shape(lambda: MTPDrafter(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, trained, fixed = nnx.split((target, mtp), nnx.Param, ...)  # type: ignore[misc]
    optimizer = optax.adam(1e-4)
    moments = jax.eval_shape(optimizer.init, trained)
    parts = Parts(
        abstract(mesh, trained, training_specs(trained)),
        abstract(mesh, fixed, replicated_specs(fixed)),
        graph,
    )
    moments = abstract(mesh, moments, training_specs(moments))
    batch = (
        jax.ShapeDtypeStruct((texts, length), jnp.int32),
        jax.ShapeDtypeStruct((texts,), jnp.int32),
    )
    batch = abstract(mesh, batch, row_specs(batch))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parts, moments, ids_BQ, counts_B):
        grads, loss, _ = pretraining_gradients(parts, ids_BQ, counts_B)
        updates, moments = optimizer.update(grads, moments)
        trained = optax.apply_updates(parts.trained, updates)
        return constrain(trained, training_specs), moments, loss

    return Program(
        lowered=step.lower(parts, moments, *batch),
        arguments={
            "parameters": (parts.trained, parts.fixed),
            "memory of the optimizer": moments,
            "texts": batch,
        },
        growing=("texts",),
        tokens=own * length,
        rows="texts",
    )
