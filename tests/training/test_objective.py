"""The objective against independent NumPy, and its gradient by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspark.calibration.reliability import roc_auc
from jaxspark.training.blocks import sample_blocks
from jaxspark.training.forward import DraftVocabulary
from jaxspark.training.forward_dspark import dspark_sums
from jaxspark.training.objective import (
    Objective,
    VocabularyTerms,
    reduce_terms,
    summary,
)
from jaxspark.training.trainer import is_trained
from jaxspark.training.vocabulary_loss import vocabulary_terms
from tests import zoo
from tests.training import made

G, N, W = 3, 5, 7
OBJECTIVE = Objective(ce=0.1, l1=0.9, confidence=1.0, soft_ce=0.4)


def numbers(seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (G, N, W))
    confidence = random.normal(0, 1, (G, N))
    # A pruned vocabulary: the target keeps some mass elsewhere.
    p = random.dirichlet(np.ones(W + 1), (G, N))[..., :W]
    labels = random.integers(0, W + 1, (G, N))
    valid = np.cumprod(random.random((G, N)) < 0.8, axis=0).astype(bool)
    return logits, confidence, p, labels, valid


def numpy_loss(logits, confidence, p, labels, valid):
    """The objective row by row, in float64."""
    total = weight = 0.0
    for j in range(G):
        for n in range(N):
            if not valid[j, n]:
                continue
            w = np.exp(-j / 4)
            q = np.exp(logits[j, n] - logits[j, n].max())
            q /= q.sum()
            l1 = np.abs(q - p[j, n]).sum() + 1 - p[j, n].sum()
            ce = -np.log(q[labels[j, n]]) if labels[j, n] < W else 0.0
            c, accept = 1 / (1 + np.exp(-confidence[j, n])), 1 - l1 / 2
            bce = -accept * np.log(c) - (1 - accept) * np.log(1 - c)
            soft = -(p[j, n] / p[j, n].sum() * np.log(q)).sum()
            total += w * (0.1 * ce + 0.9 * l1 + 1.0 * bce + 0.4 * soft)
            weight += w
    return total, weight


def ours(logits, confidence, p, labels, valid):
    """Our sums; with the identity as head, hidden states are logits."""
    valid = jnp.asarray(valid)
    numerator, terms = vocabulary_terms(
        OBJECTIVE,
        jnp.asarray(logits, jnp.float32),
        None,
        None,
        jnp.eye(W),
        jnp.log(jnp.asarray(p, jnp.float32)),
        jnp.zeros((G, N)),
        jnp.asarray(labels),
        OBJECTIVE.weights(valid),
    )
    confidence = jnp.asarray(confidence, jnp.float32)
    return reduce_terms(numerator, terms, confidence, valid, OBJECTIVE)


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_numpy(seed):
    values = numbers(seed)
    sums = ours(*values)
    total, weight = numpy_loss(*values)
    np.testing.assert_allclose(sums.numerator, total, rtol=1e-5)
    np.testing.assert_allclose(sums.weight, weight, rtol=1e-6)


def test_gradient_of_the_loss_equals_a_numpy_finite_difference():
    logits, confidence, p, labels, valid = numbers(4)
    gradient = jax.grad(lambda x: ours(x, confidence, p, labels, valid).numerator)(
        jnp.asarray(logits, jnp.float32)
    )

    # The confidence's goal is held at its value, so its term has no such gradient.
    def without_confidence(x):
        total, _ = numpy_loss(x, confidence, p, labels, valid)
        q = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        accept = 1 - (np.abs(q - p).sum(-1) + 1 - p.sum(-1)) / 2
        c = 1 / (1 + np.exp(-confidence))
        bce = -accept * np.log(c) - (1 - accept) * np.log(1 - c)
        return total - (valid * np.exp(-np.arange(G) / 4)[:, None] * bce).sum()

    random = np.random.default_rng(0)
    for _ in range(10):
        place = tuple(random.integers(0, size) for size in logits.shape)
        step = np.zeros_like(logits)
        step[place] = 1e-5
        above, below = (without_confidence(logits + s) for s in (step, -step))
        slope = (above - below) / 2e-5
        np.testing.assert_allclose(gradient[place], slope, atol=2e-4)


def test_gradient_of_the_parameters_equals_a_finite_difference():
    """Through backbone and heads, in a random direction."""
    model, batch = zoo.target(), made.packed(20, 25)
    drafter = zoo.drafter("dspark-rnn", model)
    features = made.features(model, drafter, batch)
    graphdef, trained, frozen = nnx.split(drafter, is_trained, ...)
    blocks = sample_blocks(jax.random.key(0), batch, anchors=8, block_length=G)
    # L1 has kinks and the confidence's goal is stopped; the smooth terms suffice.
    smooth = Objective(ce=1.0, l1=0.0, confidence=0.0, soft_ce=0.5)

    @jax.jit
    def loss(trained):
        merged = nnx.merge(graphdef, trained, frozen)
        vocabulary = DraftVocabulary.of(merged, model)
        sums = dspark_sums(merged, model, batch, features, blocks, vocabulary, smooth)
        return sums.numerator / sums.weight

    gradient = jax.grad(loss)(trained)
    random = np.random.default_rng(1)
    direction = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 1, x.shape), x.dtype), trained
    )
    slope = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
    )
    step = 1e-3

    def at(sign):
        moved = jax.tree.map(lambda x, d: x + sign * step * d, trained, direction)
        return float(loss(moved))

    difference = (at(1) - at(-1)) / (2 * step)
    np.testing.assert_allclose(difference, slope, rtol=0.02, atol=1e-3)


def test_rows_that_do_not_count_may_be_anything():
    logits, confidence, p, labels, valid = numbers(1)
    clean = ours(logits, confidence, p, labels, valid)
    logits[~valid] = np.nan
    made.close(ours(logits, confidence, p, labels, valid), clean, atol=0)


def test_accepted_length_is_one_plus_the_expected_prefix():
    logits, confidence, p, labels, _ = numbers(2)
    valid = np.ones((G, N), bool)
    figures = summary(ours(logits, confidence, p, labels, valid), OBJECTIVE)
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    accept = 1 - (np.abs(q - p).sum(-1) + 1 - p.sum(-1)) / 2
    expected = 1 + np.cumprod(accept, axis=0).sum(axis=0).mean()
    np.testing.assert_allclose(figures["accepted_length"], expected, rtol=1e-5)


def test_ranking_is_that_of_accepted_drafts_on_the_average():
    random = np.random.default_rng(0)
    accept = random.beta(1, 2, (2, 50_000))
    told = np.log(accept / (1 - accept)) + random.normal(0, 1, accept.shape)
    nothing = jnp.zeros(accept.shape)
    terms = VocabularyTerms(nothing, jnp.asarray(2 - 2 * accept), nothing, nothing > 0)
    valid = jnp.ones(accept.shape, bool)
    sums = reduce_terms(jnp.zeros(()), terms, jnp.asarray(told), valid, OBJECTIVE)
    figures = summary(sums, OBJECTIVE)
    survived = np.cumprod(random.random(accept.shape) < accept, axis=0).astype(bool)
    for name, forecast in (
        ("auc", np.cumprod(1 / (1 + np.exp(-told)), axis=0)),
        ("auc_possible", np.cumprod(accept, axis=0)),
    ):
        seen = [roc_auc(*each) for each in zip(forecast, survived)]
        np.testing.assert_allclose(figures[name], seen, atol=0.01)
    assert all(a < b < 0.9 for a, b in zip(figures["auc"], figures["auc_possible"]))


def test_gradients_of_the_heads_equal_those_of_the_plain_formula():
    """Head, latent and output matrix, against automatic differentiation."""
    random = np.random.default_rng(0)
    shapes = dict(hidden=(G, N, 6), latent=(G, N, 4), w2=(W, 4))
    trained = {
        k: jnp.asarray(random.normal(0, 1, s), jnp.float32) for k, s in shapes.items()
    }
    head = jnp.asarray(random.normal(0, 1, (W, 6)), jnp.float32)
    target = jnp.asarray(random.normal(0, 1, (G, N, 6)), jnp.float32)
    log_z = jax.nn.logsumexp(target @ head.T, axis=-1) + 0.1
    *_, labels, valid = numbers(0)
    weights = OBJECTIVE.weights(jnp.asarray(valid))

    def fused(trained):
        return vocabulary_terms(
            OBJECTIVE, *trained.values(), head, target, log_z, labels, weights
        )[0]

    def plain(trained):
        logits = jnp.einsum("WD,GND->GNW", head, trained["hidden"])
        logits += jnp.einsum("WR,GNR->GNW", trained["w2"], trained["latent"])
        log_q, p = (
            jax.nn.log_softmax(logits),
            jnp.exp(target @ head.T - log_z[..., None]),
        )
        l1 = jnp.abs(jnp.exp(log_q) - p).sum(-1) + 1 - p.sum(-1)
        is_label = jnp.arange(W) == labels[..., None]
        ce = -(is_label * log_q).sum(-1)
        soft = -(p * log_q).sum(-1) / p.sum(-1)
        return (weights * (0.1 * ce + 0.9 * l1 + 0.4 * soft)).sum()

    made.close(jax.value_and_grad(fused)(trained), jax.value_and_grad(plain)(trained))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ce=-1.0), "must not be negative"),
        (dict(ce=0.0, l1=0.0), "must be positive"),
        (dict(decay=0.0), r"decay must lie in \(0, 1\], got 0.0"),
    ],
    ids=str,
)
def test_impossible_objectives_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Objective(**change)
