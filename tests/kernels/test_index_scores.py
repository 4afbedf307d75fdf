"""index_scores: weighted sums of rectified products, as plain loops make them."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import index_scores
from pallas_kernels.index_scores.api import IMPLEMENTATIONS, scores_and_best
from tests.kernels.test_indexer_topk import KEYS, case


def simulated(implementation):
    """The memory that an implementation runs in."""
    if implementation == "xla":
        return nullcontext()
    return plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    )


def scored(index, tokens, limits, implementation):
    run = jax.jit(partial(index_scores, implementation=implementation))
    operands = (index.q_TNH, index.keys, index.weights_TN, tokens, limits)
    with simulated(implementation):
        return np.asarray(jax.block_until_ready(run(*operands)))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scores_below_the_limits(name, paged):
    """Integers, so that sums are exact; limits around the edges of chunks."""
    index, tokens, expected = case((11, 0, 2), 4, 3, dtype=jnp.bfloat16, paged=paged)
    limits = np.zeros(len(expected), int)
    real = np.flatnonzero(np.asarray(tokens.slots_T) >= 0)
    edges = [0, 1, 63, 64, 65, 127, 128, 129, 255, 256, KEYS - 1, KEYS, 200]
    limits[real] = edges
    mine = scored(index, tokens, jnp.asarray(limits), name)
    for t in real:
        np.testing.assert_array_equal(mine[t, : limits[t]], expected[t, : limits[t]])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_limits_all_scores_count(name):
    index, tokens, expected = case((3, 1), 4, 3, dtype=jnp.bfloat16)
    real = np.asarray(tokens.slots_T) >= 0
    np.testing.assert_array_equal(
        scored(index, tokens, None, name)[real], expected[real]
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_best_of_every_eight_is_told(name):
    """Of pages too short for it, the kernel leaves it to XLA."""
    for paged in (False, True):
        index, tokens, scores = case((7, 0, 2), 4, 3, dtype=jnp.bfloat16, paged=paged)
        real = np.flatnonzero(np.asarray(tokens.slots_T) >= 0)
        limits = np.zeros(len(scores), int)
        limits[real] = [0, 1, 7, 8, 9, 300, KEYS, 64, 201]
        run = partial(scores_and_best, implementation=name)
        with simulated(name):
            operands = (index.q_TNH, index.keys, index.weights_TN, tokens)
            found = jax.jit(run)(*operands, jnp.asarray(limits))
            mine, best = map(np.asarray, jax.block_until_ready(found))
        assert best.shape == (len(scores), KEYS // 8)
        for t in real:
            np.testing.assert_array_equal(mine[t, : limits[t]], scores[t, : limits[t]])
            expected = np.where(np.arange(KEYS) < limits[t], scores[t], -np.inf)
            some = -(-limits[t] // 8)
            expected = expected.reshape(-1, 8).max(1)[:some]
            np.testing.assert_array_equal(best[t, :some], expected)


def test_gradients_are_those_of_the_reference():
    index, tokens, scores = case((3, 1), 4, 3, dtype=jnp.bfloat16)
    keys = index.keys
    clean = jnp.nan_to_num(keys.rows_LBCH)
    limits = jnp.asarray(np.arange(len(scores)) * 40 % KEYS)
    seen = np.arange(KEYS) < np.asarray(limits)[:, None]
    seen &= (np.asarray(tokens.slots_T) >= 0)[:, None]

    def loss(name, q, rows, w):
        table = type(keys)(rows, keys.layer)
        found = index_scores(q, table, w, tokens, limits, implementation=name)
        return jnp.sum(jnp.where(seen, found, 0.0) ** 2)

    arguments = (index.q_TNH, clean, index.weights_TN)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        mine = jax.grad(partial(loss, "mosaic_gpu"), (0, 1, 2))(*arguments)
    expected = jax.grad(partial(loss, "xla"), (0, 1, 2))(*arguments)
    for a, b in zip(mine, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max())


def test_what_the_kernel_cannot_do_is_said():
    index, tokens, scores = case((2,), 4, 3)
    operands = (index.q_TNH, index.keys, index.weights_TN, tokens)
    with pytest.raises(ValueError, match=r"bfloat16, .* got \['float32'\]"):
        index_scores(*operands, implementation="mosaic_gpu")
