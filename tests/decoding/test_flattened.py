"""Flattened models are models to programs, and nothing of them is compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspark.decoding.flattened import flattened, unflattens


class Layer(nnx.Module):
    def __init__(self, seed: int):
        self.product = nnx.Linear(3, 5, rngs=nnx.Rngs(seed))
        self.scale = 2.0


def program():
    """A fresh jitted one, and the list of what it was traced for."""
    traced = []

    @jax.jit
    @unflattens
    def run(layer: Layer, x, *, bias=0.0):
        traced.append(type(layer))
        return layer.scale * layer.product(x) + bias

    return run, traced


def test_a_flattened_model_gives_what_the_model_gives():
    run, traced = program()
    layer, x = Layer(0), jnp.ones((2, 3))
    wanted = run(layer, x, bias=1.0)
    np.testing.assert_array_equal(run(flattened(layer), x, bias=1.0), wanted)
    assert traced == [Layer, Layer]


def test_copies_of_a_model_share_a_program_and_keep_their_weights():
    run, traced = program()
    x = jnp.ones((2, 3))
    found = [run(flattened(Layer(seed)), x) for seed in (0, 1, 0)]
    assert len(traced) == 1
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_models_of_other_structures_get_programs_of_their_own():
    run, traced = program()
    other, x = Layer(0), jnp.ones((2, 3))
    other.scale = 3.0
    found = [run(flattened(layer), x) for layer in (Layer(0), other)]
    assert len(traced) == 2
    np.testing.assert_allclose(found[1], 1.5 * found[0], rtol=1e-6)
