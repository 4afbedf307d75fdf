"""top_k: the same places, whether scores are sorted or not."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import top_k
from pallas_kernels.index_scores.ref import best_of_eights
from pallas_kernels.top_k.api import IMPLEMENTATIONS

C = 1024 + 77
LIMITS = np.array([0, 1, 2, 127, 128, 129, 300, C - 1, C])


def chosen(scores, limits, k, implementation, best=None):
    run = jax.jit(top_k, static_argnames=("k", "implementation"))
    scores, limits = jnp.asarray(scores), jnp.asarray(limits)
    simulated = plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    )
    with simulated if implementation == "mosaic_gpu" else nullcontext():
        found = run(scores, limits, best, k=k, implementation=implementation)
        return np.asarray(jax.block_until_ready(found))


def plain(scores, limits, k):
    """Of each row, sorted; lower places first among equals."""
    for row, limit in zip(scores, limits):
        best = np.argsort(-(row[:limit] + 0.0), kind="stable")[:k]
        yield sorted([*best, *[-1] * (min(k, len(row)) - len(best))])


def implementations(*counts):
    """Each with the numbers of places that it may be asked for."""
    for name, each in IMPLEMENTATIONS.items():
        shape = jax.ShapeDtypeStruct((len(LIMITS), C), "float32")
        for k in counts:
            if each.supports(shape, None, None, k=k) is None:
                yield name, k


@pytest.mark.parametrize(("name", "k"), [*implementations(1, 3, 60, 100, 2 * C)])
def test_the_best_places_below_the_limit_are_chosen(name, k):
    random = np.random.default_rng()
    scores = random.normal(size=(len(LIMITS), C)).astype(np.float32)
    scores *= 10.0 ** random.integers(-30, 30, size=(len(LIMITS), 1))
    found = np.sort(chosen(scores, LIMITS, k, name))
    assert found.tolist() == list(plain(scores, LIMITS, k))


@pytest.mark.parametrize(("name", "k"), [*implementations(30, 200)])
def test_of_equal_scores_the_first_are_chosen(name, k):
    """Rectified scores are often 0, of either sign; -inf is a score like others."""
    random = np.random.default_rng()
    scores = random.choice([0.0, -0.0, 1.0, -1.0, -np.inf], size=(len(LIMITS), C))
    scores = scores.astype(np.float32)
    found = np.sort(chosen(scores, LIMITS, k, name))
    assert found.tolist() == list(plain(scores, LIMITS, k))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_choice_may_begin_among_the_best_of_every_eight(name):
    """In rows too long for one stage; behind a limit, scores may be no numbers."""
    random = np.random.default_rng()
    long, limits = 4096 + 100, np.array([0, 7, 300, 4100, 4196])
    scores = random.choice([0.0, -1.0, 2.0, -np.inf], size=(len(limits), long))
    scores = scores.astype(np.float32)
    scores[1::2] = random.normal(size=scores[1::2].shape)
    expected = [*plain(scores, limits, 60)]
    scores[np.arange(long) >= limits[:, None]] = np.nan
    best = best_of_eights(jnp.asarray(scores), limits)
    assert best.shape[1] == -(-long // 8)
    found = np.sort(chosen(scores, limits, 60, name, best))
    assert found.tolist() == expected


def test_few_scores_are_refused_by_name():
    with pytest.raises(ValueError, match="bisection is for .* of a row, not 8"):
        chosen(np.zeros((1, 8), np.float32), np.array([8]), 2, "bisection")
    with pytest.raises(ValueError, match="two_stage is for .* 16 k .* not 8 for 2"):
        chosen(np.zeros((1, 8), np.float32), np.array([8]), 2, "two_stage")
