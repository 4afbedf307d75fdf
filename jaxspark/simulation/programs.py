"""The programs that a slice would run, lowered for it with nothing allotted.

Each is what runs there: the same functions, of arrays that are only described.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxspark.decoding import DecodeOptions, DecodeState, decode, prefill
from jaxspark.decoding.compiling import compiler_options
from jaxspark.drafters import MTPDrafter
from jaxspark.parallel.mesh import check_mesh, constrain, slots_per_shard
from jaxspark.parallel.rules import (
    parameter_specs,
    replicated_specs,
    row_specs,
    state_specs,
    training_specs,
)
from jaxspark.simulation.chips import abstract
from jaxspark.training.pretraining import Parts, pretraining_gradients

WHAT = ("decode", "prefill", "train")
PREFILL_CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program, lowered.

    Attributes:
      lowered: to be compiled.
      arguments: what it holds, described, by name.
      growing: names of arguments that grow with slots and positions.
      tokens: that one chip with slots of its own works on in a pass.
      options: of the compiler.
    """

    lowered: Any
    arguments: Mapping[str, Any] = field(repr=False)
    growing: tuple[str, ...] = ()
    tokens: int
    options: Mapping[str, str] | None = None

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
        options=options,
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
    )
