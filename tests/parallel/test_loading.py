"""Weights go straight into their shards, and nothing else is held meanwhile."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspark import load_drafter, load_target
from jaxspark.checkpoints import save_deepseek_v4, save_target
from jaxspark.checkpoints.shards import Assembly
from jaxspark.checkpoints.tree import named_parameters
from jaxspark.configs.drafters import deepseek_v4_dspark
from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.drafters import DeepSeekV4DSpark
from jaxspark.exactness.tiny_models import tiny_dense, tiny_v4
from jaxspark.models import DeepSeekV4
from jaxspark.parallel.mesh import make_mesh, shard, sharding_for
from jaxspark.target import Target


def same_in_shards(mine, whole):
    mine, whole = named_parameters(mine), named_parameters(whole)
    assert mine.keys() == whole.keys()
    for path, parameter in mine.items():
        leaves = jax.tree.leaves(parameter)
        for leaf, expected in zip(leaves, jax.tree.leaves(whole[path]), strict=True):
            name = path
            if len(leaves) == 2:
                name += ".scales" if leaf.dtype == np.uint8 else ".elements"
            where = sharding_for(name, leaf.shape)
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim), path
            np.testing.assert_array_equal(leaf, expected, err_msg=path)


@pytest.mark.parametrize(
    "quantized", [True, pytest.param(False, marks=pytest.mark.long)]
)
def test_deepseek_v4_is_loaded_into_shards(tmp_path, quantized):
    model = DeepSeekV4(deepseek_v4_tiny(16), rngs=nnx.Rngs(0))
    stages = DeepSeekV4DSpark(deepseek_v4_dspark(model.config), rngs=nnx.Rngs(1))
    save_deepseek_v4(tmp_path / "v4", model, stages, quantized=quantized)
    options = {"keep_quantized": quantized}
    whole = load_target(tmp_path / "v4", **options)
    drafter = load_drafter(tmp_path / "v4", whole)
    # Scales of blocks cannot be cut where heads can.
    mesh = "data:1,expert:8" if quantized else "data:2,expert:2,model:2"
    with jax.set_mesh(make_mesh(mesh)):
        target = load_target(tmp_path / "v4", **options)
        same_in_shards(target.model, whole.model)
        same_in_shards(load_drafter(tmp_path / "v4", target), drafter)


def test_dense_models_are_loaded_into_shards(tmp_path):
    model = tiny_dense(16, shards=8)
    save_target(tmp_path / "dense", Target(model=model))
    with jax.set_mesh(make_mesh("data:4,model:2")):
        same_in_shards(load_target(tmp_path / "dense").model, model)
        same_in_shards(shard(model), model)


def test_a_part_is_wanted_where_a_shard_is_here(random):
    numbers = random.normal(size=(2, 8, 3, 6)).astype(np.float32)
    with jax.set_mesh(make_mesh("expert:8")):
        where = sharding_for("mlp.experts.down_proj", numbers.shape)
        array = Assembly(numbers.shape, np.float32, where)
        for layer in range(2):
            for expert in range(8):
                assert array.wants((layer, expert, 0, 0), (3, 6))
                array.add((layer, expert, 0, 0), numbers[layer, expert])
        whole = array.finish()
    assert whole.sharding == where
    np.testing.assert_array_equal(whole, numbers)


def test_what_cannot_be_shared_out_is_named_before_it_is_moved():
    with jax.set_mesh(make_mesh("expert:8")):
        with pytest.raises(ValueError, match="4 experts cannot be shared out evenly"):
            shard(tiny_v4(16))
