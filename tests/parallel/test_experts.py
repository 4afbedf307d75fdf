"""Experts on several devices: every exchange gives what one device gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxspark.configs.targets import deepseek_v4_tiny
from jaxspark.models.layers.expert_pairs import SLACK, Pairs, block_size
from jaxspark.models.layers.experts import Experts, Routing
from jaxspark.parallel import exchange
from jaxspark.parallel.axes import SLOTS
from jaxspark.parallel.mesh import make_mesh
from jaxspark.parallel.rules import Rule

TOKENS, TOP_K = 32, 2
SKEWS = ("spread", "one expert", "one shard", "nothing but padding")


@pytest.fixture(scope="module")
def experts():
    config = deepseek_v4_tiny(16)
    made = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert made.count == 16
    return made


def routed(skew, random):
    x_TD = random.normal(size=(TOKENS, 128)).astype(np.float32)
    weights_TX = random.uniform(0.1, 1, (TOKENS, TOP_K)).astype(np.float32)
    experts_TX = np.stack(
        [random.permutation(16)[:TOP_K] for _ in range(TOKENS)]
    ).astype(np.int32)
    slots_T = np.where(np.arange(TOKENS) % 8 == 7, -1, 0).astype(np.int32)
    if skew == "one expert":
        experts_TX[:] = 5
    elif skew == "one shard":
        experts_TX[:] = [0, 1]
    elif skew == "nothing but padding":
        slots_T[:] = -1
    return x_TD, experts_TX, weights_TX, slots_T


def outputs(experts, x_TD, experts_TX, weights_TX, slots_T):
    scores_TE = jnp.zeros((len(x_TD), experts.count))
    routing = Routing(experts_TX, weights_TX, scores_TE)
    return experts(x_TD, routing, slots_T, jnp.int32(0))


def loss(experts, x_TD, weights_TX, experts_TX, slots_T):
    """A shard's own part, so that gradients of all shards add up."""
    y_TD = outputs(experts, x_TD, experts_TX, weights_TX, slots_T)
    return jnp.sum(jnp.sin(y_TD)), y_TD


gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_blocks_are_as_many_as_pairs_need():
    """A shard of 8 takes one for its share, all that it takes if it gets everything."""

    def pairs_of(experts_RX):
        return Pairs.of(jnp.asarray(experts_RX), 4)

    size = block_size(1024, share=8)
    assert size == SLACK * 1024 / 8
    experts_RX = np.full((512, 2), -1)
    experts_RX[::8] = [0, 3]
    assert pairs_of(experts_RX).blocks(size) == 1
    experts_RX[:, 1] = 2
    pairs = pairs_of(experts_RX)
    number = int(pairs.blocks(size))
    assert number == np.ceil((512 + 64) / size)
    blocks = [pairs.block(jnp.int32(each), size) for each in range(number)]
    np.testing.assert_array_equal(
        sum(block.group_sizes_E for block in blocks), [64, 0, 512, 0]
    )
    ranks = np.concatenate([block.rank_A for block in blocks])
    assert len(set(ranks)) == len(ranks)
    np.testing.assert_array_equal(np.sort(ranks)[: 512 + 64], np.arange(512 + 64))
    assert pairs_of(np.full((512, 2), -1)).blocks(size) == 0


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("how", ["gather", "padded"])
@pytest.mark.parametrize("mesh", ["expert:8", "data:2,expert:2,model:2"])
def test_no_token_is_dropped(experts, mesh, how, skew, random, monkeypatch):
    monkeypatch.setattr(exchange, "suitable", lambda *_: how)
    # What is not initialized is zeros on a CPU, elsewhere anything.
    monkeypatch.setattr(
        jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)
    )
    x_TD, experts_TX, weights_TX, slots_T = routed(skew, random)
    (dw, dx_TD, dweights_TX), y_TD = gradients(
        experts, x_TD, weights_TX, experts_TX, slots_T
    )
    whole = make_mesh(mesh)
    rows = P(SLOTS)
    spec = jax.tree.map(
        lambda leaf: Rule("", "", -3, ("expert", "model")).spec(leaf.shape), experts
    )

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=whole,
        in_specs=(spec, rows, rows, rows, rows),
        out_specs=((spec, rows, rows), rows),
        check_vma=False,
    )
    def sharded(experts, x_TD, weights_TX, experts_TX, slots_T):
        (dw, dx_TD, dweights_TX), y_TD = jax.grad(
            loss, argnums=(0, 1, 2), has_aux=True
        )(experts, x_TD, weights_TX, experts_TX, slots_T)
        # Shards along `data` hold the same experts and other tokens.
        return (jax.lax.psum(dw, "data"), dx_TD, dweights_TX), y_TD

    (dw_, dx_, dweights_), y_ = sharded(experts, x_TD, weights_TX, experts_TX, slots_T)
    np.testing.assert_allclose(y_, y_TD, atol=1e-5)
    if "model" in mesh:
        return  # Training has no such axis.
    for seen, expected in zip(
        jax.tree.leaves((dw_, dx_, dweights_)),
        jax.tree.leaves((dw, dx_TD, dweights_TX)),
    ):
        # Gradients are sums over all tokens: their rounding grows with them.
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(seen, expected, atol=1e-5 * scale)
