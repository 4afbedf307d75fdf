"""Warped distributions and the randomness of requests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from jaxspark.decoding.couplings import CoupledSampler
from jaxspark.decoding.sampling import (
    Sampling,
    Stream,
    keys,
    position_noise,
    warp,
    warped_at,
)
from jaxspark.parallel import vocabulary


def sorted_warp(logits_V, temperature, top_k, top_p, min_p):
    """The definition, by sorting, in float64."""
    if temperature == 0:
        p_V = np.zeros(len(logits_V))
        p_V[np.argmax(logits_V)] = 1
        return p_V
    scaled = logits_V.astype(np.float64) / temperature
    p_V = np.exp(scaled - scaled.max())
    p_V /= p_V.sum()
    best = p_V.max()
    order = np.argsort(-p_V)
    kept = np.zeros(len(p_V), bool)
    kept[order[: top_k or len(p_V)]] = True
    mass = np.cumsum(p_V[order] * kept[order]) / p_V[kept].sum()
    if top_p < 1:
        kept[order[np.searchsorted(mass, top_p) + 1 :]] = False
    kept &= p_V >= min_p * best
    return np.where(kept, p_V, 0) / p_V[kept].sum()


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.0),
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.3, top_p=0.8),
        dict(temperature=1.0, min_p=0.2),
        dict(temperature=0.9, top_k=12, top_p=0.6, min_p=0.05),
        dict(temperature=1.0, top_k=10_000, top_p=1e-6),
    ],
    ids=str,
)
def test_warp_equals_its_definition_by_sorting(settings):
    logits_RV = np.random.default_rng(3).normal(0, 3, (4, 200)).astype(np.float32)
    seen_RV = np.exp(warp(jnp.asarray(logits_RV), Sampling.of(4, **settings)))
    full = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | settings
    for logits_V, seen_V in zip(logits_RV, seen_RV):
        np.testing.assert_allclose(seen_V, sorted_warp(logits_V, **full), atol=2e-6)


def test_each_slot_has_its_own_parameters():
    logits_RV = jnp.tile(jnp.linspace(0.0, 3.0, 8), (4, 1))
    sampling = Sampling.of(
        4, temperature=[0, 1, 1, 1], top_k=[0, 2, 0, 0], min_p=[0, 0, 0.5, 0]
    )
    support = (np.exp(warp(logits_RV, sampling)) > 0).sum(axis=1).tolist()
    assert support == [1, 2, 2, 8]


@pytest.mark.parametrize("top_k", [[0, 0, 0, 0], [0, 3, 0, 2]], ids=str)
def test_single_tokens_have_the_probability_that_warp_gives_them(top_k):
    logits_RV = np.random.default_rng(4).normal(0, 3, (4, 200)).astype(np.float32)
    logits_RV[0, 150:153] = 20  # the first of these is the greedy token
    sampling = Sampling.of(4, temperature=[0, 1, 1e-37, 1.3], top_k=top_k)
    row_NM = np.arange(4)[:, None]
    token_NM = np.argsort(-logits_RV, axis=1, kind="stable")[:, :6]
    seen_NM = warped_at(jnp.asarray(logits_RV), sampling, row_NM, token_NM)
    expected_RV = warp(jnp.asarray(logits_RV), sampling)
    np.testing.assert_allclose(seen_NM, expected_RV[row_NM, token_NM], rtol=1e-6)
    assert seen_NM[0].tolist() == [0.0] + 5 * [-np.inf]


def test_the_largest_of_a_vocabulary_is_the_first_of_equals():
    x = np.random.default_rng(5).integers(0, 4, (50, 30)).astype(np.float32)
    x[0], x[1], x[2, 4:] = -np.inf, np.inf, np.nan
    found = vocabulary.argmax(jnp.asarray(x)).tolist()
    assert found[:2] == [0, 0] and found[3:] == x[3:].argmax(axis=1).tolist()
    assert 0 <= found[2] < 30  # whatever it is, it is a token


def test_greedy_ties_go_to_the_lowest_id():
    log_p_RV = warp(jnp.array([[1.0, 3.0, 3.0, 0.0]]), Sampling.of(1))
    assert np.exp(log_p_RV).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    "settings", [dict(temperature=1e-37), dict(top_p=1e-40)], ids=str
)
def test_extreme_values_keep_the_best_token(settings):
    logits_RV = jnp.array([[0.0, 40.0, 39.0]])
    sampling = Sampling.of(1, **(dict(temperature=1.0) | settings))
    p_V = np.exp(warp(logits_RV, sampling))[0]
    assert p_V.tolist() == [0.0, 1.0, 0.0]


def test_noise_belongs_to_seed_and_position_alone():
    seeds, positions = jnp.array([5, 5, 6], jnp.uint32), jnp.array([9, 10, 9])
    ids = jnp.arange(16)
    noise = position_noise(seeds, positions, ids)
    alone = position_noise(seeds[1:2], positions[1:2], ids)
    np.testing.assert_array_equal(noise[1:2], alone)
    assert len({row.tobytes() for row in np.asarray(noise)}) == 3


def test_noise_is_that_of_jax_whichever_tokens_are_asked_for():
    seeds, positions = jnp.arange(5, dtype=jnp.uint32), jnp.arange(5) + 9
    keys_R = keys(Stream.NOISE, seeds, positions)
    whole = jax.vmap(lambda key: jax.random.gumbel(key, (300,), mode="low"))(keys_R)
    for ids in (np.arange(300), np.array([299, 0, 77]), np.array([], int)):
        seen = position_noise(seeds, positions, jnp.asarray(ids, jnp.int32))
        np.testing.assert_array_equal(seen, whole[:, ids])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("seed", -3),
        ("temperature", [0.0, 1.0, 2.0]),
        ("seed", 0.5),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling.of(2, **{name: value})


def test_python_and_numpy_numbers_share_a_program():
    traces = []

    @jax.jit
    def count(sampling):
        traces.append(1)
        return sampling.temperature

    for value in (1, 1.0, np.float64(1), np.float32(1), [1.0, 1.0]):
        count(Sampling.of(2, temperature=value))
    assert len(traces) == 1


# Certainty --------------------------------------------------------------------------

LOGITS_BW = np.random.default_rng(8).normal(0, 2, (3, 50)).astype(np.float32)


def drafted(coupling, seed=0, **settings):
    sampling = Sampling.of(3, seed=seed + np.arange(3), **settings)
    sampler = CoupledSampler(coupling, sampling, jnp.arange(3) + 7)
    drawn = sampler(jnp.asarray(LOGITS_BW), 2, None)
    return [np.asarray(each) for each in jax.tree.leaves(drawn)]


def test_under_rejection_sharpness_is_minus_the_entropy_whatever_is_drawn():
    tokens, certainty = zip(
        *(drafted("rejection", seed, temperature=0.7)[::2] for seed in range(20))
    )
    p_BW = np.exp(LOGITS_BW / 0.7) / np.exp(LOGITS_BW / 0.7).sum(1, keepdims=True)
    np.testing.assert_allclose(certainty[0], (p_BW * np.log(p_BW)).sum(1), rtol=1e-5)
    assert np.ptp(tokens, axis=0).any() and not np.ptp(certainty, axis=0).any()


def odds_of_the_best(score_BW):
    chance_B = np.max(scipy.special.softmax(score_BW, axis=1), axis=1)
    return np.log(chance_B / (1 - chance_B))


def test_under_gumbel_sharpness_is_the_odds_of_the_draft_noise_included():
    tokens, log_q_BW, certainty = drafted("gumbel", temperature=1.0)
    score_BW = log_q_BW + position_noise(
        np.arange(3, dtype=np.uint32), jnp.arange(3) + 10, jnp.arange(50)
    )
    assert tokens.tolist() == np.argmax(score_BW, axis=1).tolist()
    np.testing.assert_allclose(certainty, odds_of_the_best(score_BW), rtol=1e-4)


def test_these_odds_are_what_gumbel_noise_on_the_target_leaves_the_draft():
    _, log_q_BW, certainty = drafted("gumbel", temperature=1.0)
    score_BW = log_q_BW + position_noise(
        np.arange(3, dtype=np.uint32), jnp.arange(3) + 10, jnp.arange(50)
    )
    errors_NBW = np.random.default_rng(0).gumbel(size=(20_000, *score_BW.shape))
    stays_NB = np.argmax(score_BW + errors_NBW, axis=2) == np.argmax(score_BW, axis=1)
    expected = scipy.special.expit(certainty)
    np.testing.assert_allclose(stays_NB.mean(axis=0), expected, atol=0.02)


@pytest.mark.parametrize("coupling", ["rejection", "gumbel"])
def test_greedy_drafts_are_judged_by_their_logits_in_any_company(coupling):
    for temperature in (0.0, [0.0, 1.0, 0.0]):
        certainty = drafted(coupling, temperature=temperature)[2]
        np.testing.assert_allclose(
            certainty[::2], odds_of_the_best(LOGITS_BW)[::2], rtol=1e-4
        )


@pytest.mark.parametrize("coupling", ["rejection", "gumbel"])
def test_sharpness_is_finite_where_one_token_is_left(coupling):
    certainty = drafted(coupling, temperature=1.0, top_k=1)[2]
    expected = {"rejection": 0.0, "gumbel": 10.0}[coupling]
    np.testing.assert_allclose(certainty, expected, atol=1e-5)
