"""DeepSeek-V4's own training on a mesh: the gradients of one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.drafters import MTPDrafter
from jaxspark.models import DeepSeekV4
from jaxspark.parallel.mesh import make_mesh
from jaxspark.training.pretraining import Parts, pretraining_gradients
from tests.training import made

CONFIG = replace(
    deepseek_v4_tiny(64), compress_ratios=(0, 4, 4), hc_sinkhorn_iters=2, hidden_size=64
)


@pytest.fixture(scope="module")
def alone():
    """Models, texts of different lengths, and what one device makes of them."""
    random = np.random.default_rng(0)
    ids_BQ = jnp.asarray(random.integers(0, 64, (8, 40)), jnp.int32)
    counts_B = jnp.array([40, 33, 5, 1, 17, 40, 9, 26], jnp.int32)
    models = DeepSeekV4(CONFIG, rngs=nnx.Rngs(0)), MTPDrafter(CONFIG, rngs=nnx.Rngs(1))
    parts = Parts.of(*models)
    found = jax.device_get(pretraining_gradients(parts, ids_BQ, counts_B))
    return models, ids_BQ, counts_B, found


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data:2,expert:4"])
def test_gradients_are_those_of_one_device(alone, mesh):
    models, ids_BQ, counts_B, (grads, value, metrics) = alone
    with jax.set_mesh(make_mesh(mesh)):
        parts = Parts.of(*models)
        there = pretraining_gradients(parts, ids_BQ, counts_B)
    made.close(jax.device_get(there[1:]), (value, metrics))
    made.close(jax.device_get(there[0]), grads)
    for grad, parameter in zip(*map(jax.tree.leaves, (there[0], parts.trained))):
        where = parameter.sharding
        assert grad.sharding.is_equivalent_to(where, grad.ndim)
        if parameter.size >= 2**12:
            [size] = {each.data.size for each in parameter.addressable_shards}
            assert size == parameter.size // 8
