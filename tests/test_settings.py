"""What the program that imports us chose globally changes nothing that is decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspark import load_target
from jaxspark.decoding import (
    DecodeOptions,
    Sampling,
    decode_round,
    init_state,
    prefill,
    sampling,
)
from jaxspark.drafters import NgramDrafter
from jaxspark.exactness.global_settings import SETTINGS
from jaxspark.exactness.tiny_models import DRAFTERS, tiny_models
from jaxspark.generation import generate
from tests.checkpoints import tiny

JITTED = [setting for setting in SETTINGS.values() if not setting.eager]
PROMPT = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
SEEDS, POSITIONS = np.arange(3, dtype=np.uint32), np.int32([5, 6, 7])


@pytest.fixture(scope="module")
def target():
    return tiny.target()


def noise(rows=slice(None)):
    ids = np.arange(300, dtype=np.int32)
    return np.asarray(sampling.position_noise(SEEDS[rows], POSITIONS[rows], ids))


def uniform(rows=slice(None)):
    """Random numbers such as decide what is accepted."""
    keys = sampling.keys(sampling.Stream.ACCEPT, SEEDS[rows], POSITIONS[rows])
    return np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys))


@pytest.mark.parametrize("setting", JITTED, ids=lambda each: each.name)
def test_the_noise_of_a_position_is_the_same_under_every_setting(setting):
    expected = noise()
    with setting.applied():
        np.testing.assert_array_equal(noise(), expected)


@pytest.mark.parametrize("drawn", [noise, uniform])
def test_a_row_is_the_same_alone_and_beside_others(drawn):
    np.testing.assert_array_equal(drawn()[1:2], drawn(slice(1, 2)))


def test_another_generator_would_be_noticed(monkeypatch):
    """Draws of "rbg" under `vmap` come from the first key of the batch."""
    monkeypatch.setattr(
        sampling, "random_key", lambda seed: jax.random.key(seed, impl="rbg")
    )
    with pytest.raises(AssertionError):
        test_a_row_is_the_same_alone_and_beside_others(uniform)


@pytest.mark.parametrize(
    "name",
    ["enable_x64=True", "numpy_dtype_promotion=strict", "numpy_rank_promotion=raise"],
)
def test_rounds_inside_a_callers_jit(target, name):
    drafter = NgramDrafter()
    options = DecodeOptions(block_length=drafter.block_length, coupling="gumbel")
    sampled = {"temperature": 1.0, "seed": [3]}
    [plain] = generate(
        target, [PROMPT], max_new_tokens=6, coupling="gumbel", temperature=1.0, seed=[3]
    )
    with SETTINGS[name].applied():
        state = init_state(
            target.model,
            drafter,
            [PROMPT],
            [len(PROMPT) + 6],
            Sampling.of(1, **sampled),
            block_length=drafter.block_length,
        )
        state = prefill(target.model, drafter, state, chunk=16)
        step = jax.jit(lambda old: decode_round(target.model, drafter, old, options))
        while state.live_B.any():
            state = step(state)
    tokens = np.asarray(state.tokens_BS)[0, len(PROMPT) : int(state.lengths_B[0])]
    assert tokens.tolist() == plain.tokens
    assert state.lengths_B.dtype == jnp.int32


@pytest.mark.parametrize("setting", JITTED, ids=lambda each: each.name)
def test_a_target_is_loaded_alike(tmp_path, setting):
    folder = tiny.write_folder(tmp_path / "m", tiny.LLAMA, tiny.weights(tiny.LLAMA))
    with setting.applied():
        model = load_target(folder).model
    leaves = jax.tree.leaves(model)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_modules_are_built_with_the_same_types():
    def types():
        made = [
            jax.eval_shape(lambda family=family: tiny_models(family, 12))
            for family in DRAFTERS
        ]
        return [leaf.dtype for leaf in jax.tree.leaves(made)]

    expected = types()
    with SETTINGS["enable_x64=True"].applied():
        assert types() == expected
