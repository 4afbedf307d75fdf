"""DeepSeek-V4's training step has the same gradients with simulated TPU kernels."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.drafters import MTPDrafter
from jaxspark.models import DeepSeekV4, FlatTokens
from jaxspark.training.deepseek_v4 import pretraining_loss
from tests.simulated import tpu_kernels, v4_for_kernels

VOCAB, LENGTHS = 23, (13, 4)

pytestmark = pytest.mark.usefixtures("compiled_soon")


def step():
    """Loss and gradients of all parameters, by a new program.

    A layer of each kind: CSA with hashed experts, HCA, and multi-token prediction's
    with a window alone.
    """
    small = {"n_routed_experts": 4, "hc_sinkhorn_iters": 2}
    config = replace(v4_for_kernels(VOCAB), compress_ratios=(4, 8), **small)
    models = tuple(
        kind(config, rngs=nnx.Rngs(seed))
        for seed, kind in enumerate((DeepSeekV4, MTPDrafter))
    )
    models[0].embed_tokens.weight[...] *= 30.0
    ids_BQ = np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), max(LENGTHS)))
    zeros = jnp.zeros(len(LENGTHS), jnp.int32)
    tokens = FlatTokens.from_rows(jnp.asarray(ids_BQ), zeros, jnp.array(LENGTHS))
    graph, params, rest = nnx.split(models, nnx.Param, ...)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        model, mtp = nnx.merge(graph, params, rest)
        loss, metrics = pretraining_loss(model, tokens, mtp)
        return loss, metrics.index

    (loss, index), grads = jax.block_until_ready(run(params))
    assert index > 0
    return loss, dict(nnx.to_flat_state(grads))


@pytest.fixture(scope="module")
def expected():
    """By XLA."""
    return step()


def simulated(monkeypatch):
    """By kernels."""
    # Simulated memory is a side effect, which JAX does not compute again.
    monkeypatch.setattr(jax, "checkpoint", lambda run: run)
    with tpu_kernels() as traced:
        found = step()
    layers = 3
    twice = ("grouped_matmul", "hyper_connections", "hyper_mix")
    ran = {"sparse_attention": layers} | dict.fromkeys(twice, 2 * layers)
    assert ran.items() <= traced.items()
    return found


def far(mine, theirs) -> float:
    """The largest difference, relative to the largest number."""
    mine, theirs = (np.asarray(each.get_value()) for each in (mine, theirs))
    assert np.isfinite(mine).all()
    return np.abs(mine - theirs).max() / np.abs(theirs).max()


@pytest.mark.long
def test_kernels_give_every_parameter_the_references_gradient(expected, monkeypatch):
    loss, grads = simulated(monkeypatch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert grads.keys() == expected[1].keys()
    errors = {path: far(grads[path], theirs) for path, theirs in expected[1].items()}
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} parameters, worst {worst}: {errors[worst]:.1e}")
    assert errors[worst] <= 1e-4, worst
