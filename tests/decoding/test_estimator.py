"""What is learned of acceptance in the loop: from what, how well, and how alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxspark.decoding import Estimator
from jaxspark.decoding.logistic import Prior, newton_step, solve_small

# v, w and a; and d, by place.
PLANTED = (np.array([0.6, 0.8, -0.5]), np.array([0.3, 0.0, -0.4]))
SLOTS, G = 16, 3


def blocks(random, count, planted=PLANTED):
    """Signals of blocks, and how many of their drafts were accepted."""
    confidence_NG = random.normal(0.5, 1.2, (count, G)).astype(np.float32)
    certainty_NG = random.normal(0.0, 1.5, (count, G)).astype(np.float32)
    (v, w, a), d_G = planted
    logits_NG = v * confidence_NG + w * certainty_NG + a + d_G
    held_NG = random.random((count, G)) < 1 / (1 + np.exp(-logits_NG))
    return confidence_NG, certainty_NG, np.cumprod(held_NG, axis=1).sum(axis=1)


def play(estimator, state, random, rounds, *, planted=PLANTED, sampled=True, most=G):
    """The state after rounds that verify `most` drafts of every slot."""
    observed = jax.jit(lambda state, **seen: state.observed(estimator, **seen))
    for _ in range(rounds):
        confidence_BG, certainty_BG, held_B = blocks(random, SLOTS, planted)
        state = observed(
            state,
            confidence_BG=jnp.array(confidence_BG),
            certainty_BG=jnp.array(certainty_BG),
            sampled_B=jnp.full((SLOTS,), sampled),
            judged_B=jnp.array(np.minimum(held_B + 1, most), jnp.int32),
            accepted_B=jnp.array(np.minimum(held_B, most), jnp.int32),
        )
    return state


def test_planted_coefficients_are_found():
    estimator = Estimator(blocks=4096)
    state = play(estimator, estimator.empty(SLOTS, G), np.random.default_rng(0), 256)
    shared_X, d_G = PLANTED
    place_G = shared_X[2] + d_G
    np.testing.assert_allclose(state.shared_BRX[0, 1, :2], shared_X[:2], atol=0.1)
    seen_G = state.shared_BRX[0, 1, 2] + state.places_BRG[0, 1]
    np.testing.assert_allclose(seen_G, place_G, atol=0.15)


def test_greedy_slots_teach_nothing_about_sampled_ones():
    estimator = Estimator()
    start = estimator.empty(SLOTS, G)
    state = play(estimator, start, np.random.default_rng(0), 16, sampled=False)
    assert np.abs(state.shared_BRX - start.shared_BRX)[:, 0].min() > 0.01
    np.testing.assert_array_equal(state.shared_BRX[:, 1], start.shared_BRX[:, 1])
    np.testing.assert_array_equal(state.places_BRG[:, 1], start.places_BRG[:, 1])


def test_cutting_blocks_does_not_bias_what_is_learned():
    # Where only first drafts are verified, nothing is learned of the others' places.
    estimator = Estimator(blocks=4096)
    state = estimator.empty(SLOTS, G)
    state = play(estimator, state, np.random.default_rng(1), 256, most=1)
    (v, w, a), d_G = PLANTED
    seen = state.shared_BRX[0, 1]
    np.testing.assert_allclose(seen[:2], (v, w), atol=0.1)
    assert seen[2] + state.places_BRG[0, 1, 0] == pytest.approx(a + d_G[0], abs=0.1)
    np.testing.assert_allclose(state.places_BRG[0, 1, 1:], 0.0, atol=1e-6)


def test_what_changes_is_followed():
    estimator, random = Estimator(blocks=512), np.random.default_rng(2)
    state = play(estimator, estimator.empty(SLOTS, G), random, 64)
    other = (PLANTED[0] * [1, 1, 0] + [0, 0, 1.5], PLANTED[1])
    state = play(estimator, state, random, 32, planted=other)
    assert state.shared_BRX[0, 1, 2] > 0.9


def test_slots_that_take_no_part_are_not_remembered():
    estimator = Estimator(blocks=64, every=100)
    state, zeros_BG = estimator.empty(SLOTS, G), jnp.zeros((SLOTS, G))
    for round_ in range(3):
        judged_B = jnp.zeros((SLOTS,), jnp.int32).at[5].set(1 + round_ % 2)
        state = state.observed(
            estimator,
            confidence_BG=zeros_BG,
            certainty_BG=zeros_BG,
            sampled_B=jnp.ones((SLOTS,), bool),
            judged_B=judged_B,
            accepted_B=judged_B - 1,
        )
    assert state.judged_Bn.ravel()[:4].tolist() == [1, 2, 1, 0]
    assert state.place_B.tolist() == [3] * SLOTS and state.judged_Bn.sum() == 4


def test_the_oldest_blocks_make_room():
    estimator = Estimator(blocks=1)
    state = estimator.empty(SLOTS, G)
    n = state.judged_Bn.shape[1]
    assert n == 8
    before = play(estimator, state, np.random.default_rng(3), n)
    after = play(estimator, before, np.random.default_rng(4), n - 1)
    kept = (np.asarray(after.confidence_BnG) == before.confidence_BnG).all(axis=2)
    assert kept.sum() == SLOTS


def test_steps_end_at_the_mode():
    random = np.random.default_rng(5)
    confidence_NG, certainty_NG, held_N = blocks(random, 200)
    x_NGX = jnp.stack([confidence_NG, certainty_NG, np.ones_like(certainty_NG)], -1)
    # The mode is found in float64, which JAX's arrays would not be.
    held_N1 = np.asarray(held_N)[:, None]
    happened_NG, known_NG = np.arange(G) < held_N1, np.arange(G) <= held_N1
    prior = Prior(mean=(1.0, 0.0, 0.0), precision=(4.0, 8.0, 0.25), place_precision=4.0)
    at = prior.coefficients(G)
    step = jax.jit(lambda at: newton_step(at, prior, x_NGX, happened_NG, known_NG))
    for _ in range(8):
        at = step(at)

    def loss(theta):
        b, d = theta[:3], theta[3:]
        z = np.asarray(x_NGX, np.float64) @ b + d
        nats = np.where(known_NG, np.logaddexp(0, z) - happened_NG * z, 0).sum()
        off = b - prior.mean
        return nats + off @ (off * prior.precision) / 2 + 2 * d @ d

    mode = minimize(loss, np.zeros(6), method="BFGS").x
    np.testing.assert_allclose(at.shared_X, mode[:3], atol=1e-3)
    np.testing.assert_allclose(at.places_G, mode[3:], atol=1e-3)


def test_drafts_that_all_held_leave_coefficients_finite():
    prior = Estimator().prior
    x_NGX, all_NG = jnp.full((500, G, 3), 10.0), jnp.ones((500, G), bool)
    at = prior.coefficients(G)
    for _ in range(50):
        at = newton_step(at, prior, x_NGX, all_NG, all_NG)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(at))
    at = newton_step(at, prior, x_NGX, ~all_NG, all_NG)
    assert np.abs(at.shared_X).max() < 10


def test_small_systems_are_solved():
    root = np.random.default_rng(6).normal(size=(3, 3))
    left, right = root @ root.T + np.eye(3), np.arange(3.0)
    np.testing.assert_allclose(
        solve_small(jnp.array(left, jnp.float32), jnp.array(right, jnp.float32)),
        np.linalg.solve(left, right),
        rtol=1e-4,
    )


@pytest.mark.parametrize("change", [{"every": 0}, {"blocks": 0}])
def test_estimators_that_never_learn_are_refused(change):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Estimator(**change)
