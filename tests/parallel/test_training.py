"""Training on meshes: the steps of one device, its state spread."""

from dataclasses import replace

import jax
import pytest

from jaxspark.exactness.tiny_models import tiny_models
from jaxspark.parallel.mesh import make_mesh, shard
from jaxspark.training.config import TrainConfig
from jaxspark.training.features import FeatureSource
from jaxspark.training.objective import Objective
from jaxspark.training.trainer import Trainer
from tests import zoo
from tests.training import made

CONFIG = TrainConfig(
    steps=2,
    sequences=8,
    anchors=4,
    block_length=3,
    objective=Objective(),
    optimizer="adam",
)


def stepped(mesh, kind):
    """The state after a step, what it summed, and where its largest array lies."""
    model = zoo.target()
    drafter = zoo.drafter(kind, model)
    packed = made.packed(*[made.LENGTH] * 8)
    features = FeatureSource(model, drafter.config.target_layer_ids)(packed)

    def run():
        trainer, state = Trainer.create(drafter, model, CONFIG)
        return trainer.step(state, [(packed, features)])

    if mesh is None:
        return run()
    with jax.set_mesh(make_mesh(mesh)):
        return run()


@pytest.mark.parametrize(
    "kind", ["dspark-gated", pytest.param("eagle3-pruned", marks=pytest.mark.long)]
)
def test_a_step_on_a_mesh_is_that_of_one_device(kind):
    alone, sums = stepped(None, kind)
    state, there = stepped("data:2,expert:4", kind)
    made.close(jax.device_get(state), jax.device_get(alone))
    made.close(jax.device_get(there), jax.device_get(sums))
    largest = max(jax.tree.leaves(state.trained), key=lambda leaf: leaf.size)
    [part] = {shard.data.size for shard in largest.addressable_shards}
    assert part == largest.size // 8


@pytest.mark.parametrize(
    "family", ["dense", pytest.param("deepseek_v4", marks=pytest.mark.long)]
)
def test_a_sharded_target_says_what_one_device_hears(family):
    """Each shard its own sequences, of different numbers of documents."""
    model, _ = tiny_models(family, zoo.VOCAB + 3, drafters=(), shards=8)
    packed = made.packed(20, 25, 40, 9, 30, 7, 3, 48)
    assert len(packed.index_P) == 4
    alone = FeatureSource(model, (0, 1))(packed)
    with jax.set_mesh(make_mesh("data:2,expert:2,model:2")):
        there = FeatureSource(shard(model), (0, 1))(packed)
    made.close(there, alone)


def test_a_batch_that_cannot_be_shared_out_is_named():
    model = zoo.target()
    drafter = zoo.drafter("dspark-gated", model)
    with jax.set_mesh(make_mesh("data:8")):
        with pytest.raises(ValueError, match="3 sequences .* evenly over 8 shards"):
            Trainer.create(drafter, model, replace(CONFIG, sequences=3))
