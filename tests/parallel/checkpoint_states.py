"""States of training with known numbers; as a program, one side of checkpoints' way.

`python -m tests.parallel.checkpoint_states` is one process of a job: it saves states in
shards, and finds what one device saved in its own shards, to the bit.
"""

import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxspark.exactness.tiny_models import tiny_v4
from jaxspark.parallel.mesh import make_mesh, place
from jaxspark.parallel.processes import Job, keep_output_apart
from jaxspark.parallel.rules import (
    path_name,
    replicated_specs,
    spread_specs,
    training_specs,
)
from jaxspark.training.config import TrainConfig
from jaxspark.training.run import Checkpoints
from jaxspark.training.trainer import TrainState, is_trained
from tests import zoo

MESH = "data:2,expert:4"
THERE, BACK = 1, 2


def drafter_shapes() -> TrainState:
    """What a drafter's training keeps, with momenta in bfloat16."""
    drafter = nnx.eval_shape(lambda: zoo.drafter("dspark-gated", zoo.target()))
    trained = nnx.split(drafter, is_trained, ...)[1]
    config = TrainConfig(steps=2, dtype="bfloat16")
    return _shapes(trained, config.transformation())


def v4_shapes() -> TrainState:
    """What DeepSeek-V4's own training keeps."""
    model = nnx.eval_shape(lambda: tiny_v4(64, shards=8))
    return _shapes(nnx.split(model, nnx.Param, ...)[1], optax.adam(1e-3))


KINDS = {
    "drafter": (drafter_shapes, spread_specs),
    "deepseek_v4": (v4_shapes, training_specs),
}


def _shapes(trained, optimizer: optax.GradientTransformation) -> TrainState:
    moments = jax.eval_shape(optimizer.init, trained)
    return TrainState(trained, moments, jax.ShapeDtypeStruct((), jnp.int32))


def filled(shapes: TrainState, step: int) -> TrainState:
    """Numbers that follow from a leaf's path and the step, whatever their type."""

    def numbers(path, leaf):
        if path_name(path) == "step":
            return np.int32(step)
        seed = zlib.crc32(path_name(path).encode()) + step
        drawn = np.random.default_rng(seed).normal(0, 9, leaf.shape)
        return np.asarray(drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(numbers, shapes)


def zeros(shapes: TrainState) -> TrainState:
    """What is there before a checkpoint is restored."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def in_shards(state: TrainState, specs) -> TrainState:
    """A state on the mesh in use."""
    trained, optimizer = (place(x, specs) for x in (state.trained, state.optimizer))
    return TrainState(trained, optimizer, place(state.step, replicated_specs))


def save(folder: Path, state: TrainState) -> None:
    """Saves a state, and waits until it is whole."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(state)
    checkpoints.close()


def check_equal(state: TrainState, expected: TrainState) -> None:
    """Every shard that is here has the very numbers."""
    for mine, whole in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        for shard in mine.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])


def main() -> None:
    """Saves each kind of state in shards; restores what one device saved."""
    job = Job.of_environment(os.environ, heartbeat_seconds=30)
    assert job is not None
    keep_output_apart()
    job.connect()
    with jax.set_mesh(make_mesh(MESH)):
        for kind, (shapes, specs) in KINDS.items():
            described = shapes()
            save(Path(kind) / "there", in_shards(filled(described, THERE), specs))
            empty = in_shards(zeros(described), specs)
            restored = Checkpoints(Path(kind) / "back").restore(empty)
            check_equal(restored, filled(described, BACK))
    if not jax.process_index():
        print("equal")


if __name__ == "__main__":
    main()
